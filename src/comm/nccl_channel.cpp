#include "comm/nccl_channel.h"

#include "core/log.h"

#include <algorithm>
#include <condition_variable>
#include <exception>
#include <thread>
#include <vector>

namespace deltapipe::nccl {

using Clock = std::chrono::steady_clock;

void check(ncclResult_t result, const char* what, const std::string& axis) {
  if (result == ncclSuccess || result == ncclInProgress) return;
  fail<CommunicationError>("{} on axis {}: NCCL: {}", what, axis, ncclGetErrorString(result));
}

/// Follows all work that has not ended: one thread a process, while there are channels.
class Watchdog {
 public:
  static Watchdog& instance() {
    static auto& watchdog = *new Watchdog();  // its thread ends with the last channel
    return watchdog;
  }

  void add(Channel* channel) {
    const std::lock_guard lock(mutex_);
    channels_.push_back(channel);
    if (channels_.size() > 1) return;
    stop_ = false;
    thread_ = std::thread([this] { run(); });
  }

  /// Returns when the thread has done with the channel.
  void remove(Channel* channel) {
    std::thread ended;
    {
      const std::lock_guard lock(mutex_);
      std::erase(channels_, channel);
      std::erase_if(entries_, [&](const Entry& e) { return e.channel == channel; });
      if (channels_.empty()) {
        stop_ = true;
        ended = std::move(thread_);
      }
    }
    wake_.notify_all();
    if (ended.joinable()) ended.join();
  }

  void watch(Channel* channel, const std::shared_ptr<Work>& work) {
    const std::lock_guard lock(mutex_);
    entries_.push_back({channel, work});
  }

 private:
  struct Entry {
    Channel* channel;
    std::shared_ptr<Work> work;
  };

  void run() {
    constexpr std::chrono::milliseconds pause{20};  // far below any timeout, and nothing to a processor
    std::unique_lock lock(mutex_);
    while (!stop_) {
      std::erase_if(entries_, [](Entry& e) { return has_ended(e); });
      wake_.wait_for(lock, pause);
    }
  }

  /// Also true for work that failed: its channel has been told.
  static bool has_ended(Entry& e) {
    Work& work = *e.work;
    try {
      if (work.ended_.reached()) return true;
      const ncclResult_t state = e.channel->state();
      if (state != ncclSuccess && state != ncclInProgress) {
        e.channel->fail_with(fmt::format("{}: NCCL: {}", work.description_.operation, ncclGetErrorString(state)));
        return true;
      }
      if (!work.ready_since_) {
        if (work.input_ready_.reached()) work.ready_since_ = Clock::now();
        return false;
      }
      const std::chrono::duration<double> waited = Clock::now() - *work.ready_since_;
      if (waited.count() < work.description_.timeout_s) return false;
      e.channel->fail_with(work.description_.silence());
    } catch (const std::exception& error) {  // a fault on the device
      e.channel->fail_with(error.what());
    }
    return true;
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::thread thread_;
  bool stop_ = false;
  std::vector<Channel*> channels_;
  std::vector<Entry> entries_;
};

Channel::Channel(Device device, const ncclUniqueId& id, int ranks, int rank, std::string axis)
    : device_(device), axis_(std::move(axis)), stream_(device, true) {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  nccl::check(ncclCommInitRankConfig(&comm_, ranks, id, rank, &config), "ncclCommInitRankConfig", axis_);
  Watchdog::instance().add(this);
}

Channel::~Channel() {
  Watchdog::instance().remove(this);
  if (aborted_) return;
  if (failed_ || !connected_ || std::uncaught_exceptions() > 0) {
    abort();
    return;
  }
  // Other ranks may still be at work on what this one has ended: all of them come here.
  ncclCommFinalize(comm_);
  const auto deadline = Clock::now() + std::chrono::seconds(10);  // the work itself has ended long before
  while (state() == ncclInProgress && Clock::now() < deadline)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  if (state() == ncclSuccess) {
    ncclCommDestroy(comm_);
  } else {
    abort();
  }
}

bool Channel::is_ready() {
  if (connected_) return true;
  const ncclResult_t now = state();
  nccl::check(now, "connecting", axis_);
  connected_ = now == ncclSuccess;
  return connected_;
}

void Channel::check() {
  if (!failed_) return;
  const std::lock_guard lock(mutex_);
  throw CommunicationError(failure_);
}

void Channel::abort() noexcept {
  const std::lock_guard lock(mutex_);
  if (std::exchange(aborted_, true)) return;
  ncclCommAbort(comm_);
}

void Channel::settle(const Description& description) {
  const auto deadline = Clock::now() + std::chrono::duration<double>(description.timeout_s);
  for (ncclResult_t now = state(); now != ncclSuccess; now = state()) {
    check();
    throw_if_bad(now, description);
    if (Clock::now() >= deadline) {
      fail_with(description.silence());
      check();
    }
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
}

void Channel::throw_if_bad(ncclResult_t result, const Description& description) {
  if (result == ncclSuccess || result == ncclInProgress) return;
  fail_with(fmt::format("{}: NCCL: {}", description.operation, ncclGetErrorString(result)));
  check();
}

void Channel::watch(const std::shared_ptr<Work>& work) { Watchdog::instance().watch(this, work); }

ncclResult_t Channel::state() {
  const std::lock_guard lock(mutex_);
  if (aborted_) return ncclSuccess;
  ncclResult_t result = ncclSuccess;
  const ncclResult_t asked = ncclCommGetAsyncError(comm_, &result);
  return asked == ncclSuccess ? result : asked;
}

void Channel::fail_with(const std::string& message) noexcept {
  {
    const std::lock_guard lock(mutex_);
    if (failed_) return;
    failure_ = message;
    failed_ = true;
  }
  log::error("{}", message);
  abort();
}

}  // namespace deltapipe::nccl
