// Communicator: the ranks along one axis of the mesh and what they send each other. Host memory travels over MPI
// (MpiRuntime::split), an axis of one rank needs neither (SingleRank); device memory travels over NCCL
// (comm/nccl_communicator.h), which differs in what it says there.
//
// Rules
// - Ranks of an axis start the collective operations (reductions, gathers, broadcasts, barriers) in one order. Messages
//   between two ranks with one tag arrive in the order they were sent.
// - Reductions add in rank order, in the tensor's own dtype: the same bits whatever the timing, and on every rank.
// - Nothing hangs: an operation without an answer for CommunicationSettings::timeout_s throws a CommunicationError that
//   names operation, purpose, axis and the silent ranks.
// - On a dry stream every operation checks its arguments, takes its workspace, and returns at once, counting nothing.
// - Every call, and every wait for a started operation, is a span of a trace (core/trace.h) while one is recorded: with
//   the bytes that it sent, so that a trace's bytes are those of the counters. On a CUDA stream that is the host's side
//   of it; the device's is how long the stream waited, and the messages on the communicator's own streams.
// - A start_* operation borrows its tensors, workspace included, until its Pending has been waited for: inputs may be
//   read but not written, outputs not touched. Waiting makes progress for all pending operations of the process.
#pragma once

#include "core/arena.h"
#include "core/stream.h"
#include "core/tensor.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>

namespace deltapipe {

/// What a message is for: the row it is counted in, and a word in error lines.
enum class Purpose : std::uint8_t {
  hidden_state,
  hidden_gradient,
  conv_halo,
  kda_state,
  attention_kv,
  gradients,
  weights,
  control,
  data
};
inline constexpr std::size_t purpose_count = 9;
std::string_view name_of(Purpose purpose);

/// Sent by this rank. A round is one step of messages that had to wait for the step before: 1 for send, receive,
/// exchange, all_gather and each block of reduce_scatter_sum; all_reduce_sum has the rounds of its parts, broadcast and
/// barrier ceil(log2 size).
struct Traffic {
  std::uint64_t messages = 0;
  std::uint64_t bytes = 0;
  std::uint64_t rounds = 0;
  friend bool operator==(const Traffic&, const Traffic&) = default;
};

struct CommunicationSettings {
  double timeout_s = 600.0;                          // of one wait
  std::size_t message_bytes = std::size_t{1} << 30;  // larger messages go in pieces; MPI counts in int
  std::size_t reduce_bytes = std::size_t{8} << 20;   // workspace that a reduction uses at most, about
};

/// An operation that an implementation has started.
class PendingOperation {
 public:
  virtual ~PendingOperation() = default;
  virtual bool test() = 0;
  virtual void wait(const Stream& stream) = 0;
  virtual void release() noexcept = 0;  // abandons what is unfinished and gives the object back to its owner
};

class Communicator;

/// Handle of a started operation. Wait for it before its communicator or its tensors go: dropping it unfinished
/// abandons the operation and is only right when an error is ending the process.
class [[nodiscard]] Pending {
 public:
  Pending() = default;  // nothing to wait for
  explicit Pending(PendingOperation* operation) : operation_(operation) {}
  Pending(Pending&& other) noexcept;
  Pending& operator=(Pending&& other) noexcept;
  ~Pending();

  /// True when finished; makes progress. Throws CommunicationError when a peer failed.
  bool test();
  /// What follows on `stream` sees the results. Throws CommunicationError when a peer failed or is silent.
  void wait(const Stream& stream);

 private:
  friend class Communicator;
  PendingOperation* operation_ = nullptr;
  // For a trace: whose it is, and what its wait is called there. Null: it was not started within a recording.
  const Communicator* traced_ = nullptr;
  const char* wait_name_ = "";
  Purpose purpose_ = Purpose::control;
};

/// One message of an exchange: to or from rank `peer` of the axis. Tags tell messages between the same ranks apart.
struct Transfer {
  int peer = 0;
  Tensor tensor;
  int tag = 0;  // 0 .. max_tag
};

/// One end of a way that messages of Purpose::hidden_state or hidden_gradient will take, whose ranks are not in step.
struct Route {
  int peer = 0;
  int tag = 0;
  bool sends = false;
};

class Communicator {
 public:
  static constexpr int max_tag = 16383;  // half of what every MPI allows

  virtual ~Communicator() = default;
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  const std::string& axis() const { return axis_; }

  // Point to point. A rank never sends to itself; sizes and dtypes agree on both sides.
  void send(const Stream& stream, const Tensor& x, int to, Purpose purpose, int tag = 0);
  void receive(const Stream& stream, const Tensor& x, int from, Purpose purpose, int tag = 0);
  /// All messages at once: no order among them can deadlock. Both lists may be empty.
  void exchange(const Stream& stream, std::span<const Transfer> sends, std::span<const Transfer> receives,
                Purpose purpose);
  Pending start_exchange(const Stream& stream, std::span<const Transfer> sends, std::span<const Transfer> receives,
                         Purpose purpose);

  /// Makes ready what `routes` need, before messages take them and while nothing else is under way: both ends of every
  /// route call it, at the same point of the program. A route that was not prepared is made by its first message, at
  /// the risk that its making and messages under way elsewhere wait for each other. Nothing to do over MPI.
  virtual void connect(std::span<const Route> routes);

  /// x = sum of x over the ranks, in place, float32 or float64.
  void all_reduce_sum(const Stream& stream, const Tensor& x, Purpose purpose, Arena& workspace);
  Pending start_all_reduce_sum(const Stream& stream, const Tensor& x, Purpose purpose, Arena& workspace);
  /// whole = the ranks' parts in rank order; size() * part.numel() elements. `part` may be its own place in `whole`.
  void all_gather(const Stream& stream, const Tensor& part, const Tensor& whole, Purpose purpose);
  Pending start_all_gather(const Stream& stream, const Tensor& part, const Tensor& whole, Purpose purpose);
  /// part = sum over the ranks of this rank's part of `whole`, float32 or float64. `part` may be its own place in
  /// `whole`; the rest of `whole` is not written.
  void reduce_scatter_sum(const Stream& stream, const Tensor& whole, const Tensor& part, Purpose purpose,
                          Arena& workspace);
  Pending start_reduce_scatter_sum(const Stream& stream, const Tensor& whole, const Tensor& part, Purpose purpose,
                                   Arena& workspace);
  /// x of rank `root` reaches every rank.
  void broadcast(const Stream& stream, const Tensor& x, int root, Purpose purpose);
  /// Returns when every rank has called it.
  void barrier(const Stream& stream, Purpose purpose = Purpose::control);

  const Traffic& traffic(Purpose purpose) const { return traffic_[static_cast<std::size_t>(purpose)]; }
  void reset_traffic() { traffic_ = late_ = {}; }

 protected:
  Communicator(int rank, int size, std::string axis);

  // Called with checked arguments on streams that are not dry, and for more than one rank (an exchange: of any size).
  virtual Pending do_exchange(const Stream& stream, std::span<const Transfer> sends, std::span<const Transfer> receives,
                              Purpose purpose, const char* operation) = 0;
  virtual Pending do_all_reduce(const Stream& stream, const Tensor& x, const Tensor& scratch, Purpose purpose) = 0;
  virtual Pending do_all_gather(const Stream& stream, const Tensor& part, const Tensor& whole, Purpose purpose) = 0;
  virtual Pending do_reduce_scatter(const Stream& stream, const Tensor& whole, const Tensor& part,
                                    const Tensor& scratch, Purpose purpose) = 0;
  virtual void do_broadcast(const Stream& stream, const Tensor& x, int root, Purpose purpose) = 0;
  virtual void do_barrier(const Stream& stream, Purpose purpose) = 0;
  /// What reductions take.
  virtual bool can_sum(DType dtype) const { return dtype == DType::f32 || dtype == DType::f64; }
  // Elements of scratch, in the tensor's dtype, that the reductions want.
  virtual std::int64_t all_reduce_scratch(std::int64_t elements, DType dtype) const = 0;
  virtual std::int64_t reduce_scatter_scratch(std::int64_t part_elements, DType dtype) const = 0;

  void count_message(Purpose purpose, std::size_t bytes);
  void count_round(Purpose purpose) { ++traffic_[static_cast<std::size_t>(purpose)].rounds; }

 private:
  Pending start_checked_exchange(const Stream& stream, std::span<const Transfer> sends,
                                 std::span<const Transfer> receives, Purpose purpose, const char* operation);
  /// The same operation, its wait a span of the trace.
  Pending traced(Pending pending, Purpose purpose, const char* wait_name) const;

  int rank_, size_;
  std::string axis_;
  std::array<Traffic, purpose_count> traffic_{};
  // Sent by started operations within spans of other calls, which make progress for all: the next wait's in a trace.
  mutable std::array<Traffic, purpose_count> late_{};
  friend class Pending;
};

/// An axis of one rank: reductions leave and gathers copy what they are given; nothing is counted.
class SingleRank final : public Communicator {
 public:
  explicit SingleRank(std::string axis) : Communicator(0, 1, std::move(axis)) {}

 private:
  Pending do_exchange(const Stream&, std::span<const Transfer>, std::span<const Transfer>, Purpose,
                      const char*) override {
    return {};
  }
  Pending do_all_reduce(const Stream&, const Tensor&, const Tensor&, Purpose) override { return {}; }
  Pending do_all_gather(const Stream&, const Tensor&, const Tensor&, Purpose) override { return {}; }
  Pending do_reduce_scatter(const Stream&, const Tensor&, const Tensor&, const Tensor&, Purpose) override { return {}; }
  void do_broadcast(const Stream&, const Tensor&, int, Purpose) override {}
  void do_barrier(const Stream&, Purpose) override {}
  bool can_sum(DType dtype) const override {  // what any other communicator can
    return dtype == DType::f32 || dtype == DType::f64 || dtype == DType::bf16;
  }
  std::int64_t all_reduce_scratch(std::int64_t, DType) const override { return 0; }
  std::int64_t reduce_scatter_scratch(std::int64_t, DType) const override { return 0; }
};

}  // namespace deltapipe
