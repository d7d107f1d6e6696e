// One NCCL communicator with its stream, and the watchdog over the work on all of them. Internal to
// nccl_communicator.cpp; NCCL's header stays here.
#pragma once

#include "core/device_memory.h"
#include "core/error.h"
#include "core/trace.h"

#include <nccl.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

namespace deltapipe::nccl {

/// Throws CommunicationError unless `result` is success or in progress.
void check(ncclResult_t result, const char* what, const std::string& axis);

/// What an error line says of an operation.
struct Description {
  std::string operation;  // "send (hidden_state) on axis pipeline, step 3: rank 0"
  std::string waits_for;  // "its rank 1"
  double timeout_s = 0;
  trace::Event traced;  // what a trace says of it; the channel adds the lane and the time

  std::string silence() const { return fmt::format("{} has waited {:g} s for {}", operation, timeout_s, waits_for); }
};

class Channel;

/// Something given to a channel, until it has ended.
class Work {
 public:
  Work(Device device, Description description)
      : input_ready_(device), ended_(device), description_(std::move(description)) {}

  const Description& description() const { return description_; }
  bool has_ended() const { return ended_.reached(); }
  void make_wait(const Stream& stream) const { ended_.make_wait(stream); }

 private:
  friend class Channel;
  friend class Watchdog;

  Event input_ready_, ended_;
  Description description_;
  std::optional<std::chrono::steady_clock::time_point> ready_since_;  // the watchdog's
};

class Channel {
 public:
  /// Starts to connect: collective over `ranks` ranks that have the same id.
  Channel(Device device, const ncclUniqueId& id, int ranks, int rank, std::string axis);
  /// Ends the communicator; aborts it when work failed or an error is ending the process.
  ~Channel();
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;

  /// All ranks have come. Throws CommunicationError when NCCL failed.
  bool is_ready();
  /// is_ready has said so.
  bool is_connected() const { return connected_; }
  /// Throws CommunicationError when work on this channel has failed.
  void check();
  /// Ends NCCL's kernels and threads. What is queued afterwards does nothing.
  void abort() noexcept;

  /// Gives the channel's stream `call(comm, stream)`, a group of NCCL calls, to run after `input_ready`.
  template <class F>
  std::shared_ptr<Work> run(Description description, const Event& input_ready, const F& call) {
    auto work = std::make_shared<Work>(device_, std::move(description));
    run(work, input_ready, call);
    return work;
  }
  template <class F>
  void run(const std::shared_ptr<Work>& work, const Event& input_ready, const F& call) {
    check();
    const Stream stream = stream_.get();
    input_ready.make_wait(stream);
    work->input_ready_.record(stream);
    const trace::Mark begin = trace::mark(stream);
    ncclResult_t result = ncclSuccess;
    {
      const std::lock_guard lock(mutex_);
      if (!aborted_) {
        result = ncclGroupStart();
        if (result == ncclSuccess) {
          result = call(comm_, static_cast<cudaStream_t>(stream.native()));
          const ncclResult_t group = ncclGroupEnd();
          if (result == ncclSuccess || result == ncclInProgress) result = group;
        }
      }
    }
    throw_if_bad(result, work->description_);
    settle(work->description_);
    work->ended_.record(stream);
    work->description_.traced.lane = axis_;
    trace::record(work->description_.traced, begin, stream);
    watch(work);
  }

 private:
  friend class Watchdog;

  /// Waits until NCCL has queued what it was given: at once, but for the first messages between two ranks.
  void settle(const Description& description);
  /// An error of NCCL fails the channel for good.
  void throw_if_bad(ncclResult_t result, const Description& description);
  void watch(const std::shared_ptr<Work>& work);
  ncclResult_t state();
  void fail_with(const std::string& message) noexcept;

  Device device_;
  std::string axis_;
  StreamOwner stream_;
  std::mutex mutex_;  // over the members below and all calls with comm_: the watchdog may abort at any time
  ncclComm_t comm_ = nullptr;
  bool aborted_ = false;
  std::string failure_;
  std::atomic<bool> failed_ = false;
  bool connected_ = false;
};

}  // namespace deltapipe::nccl
