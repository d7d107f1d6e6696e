#include "comm/communicator.h"

#include "comm/block_copy.h"
#include "core/log.h"
#include "core/trace.h"

#include <exception>
#include <utility>

namespace deltapipe {
namespace {

struct Releaser {
  PendingOperation* operation;
  ~Releaser() {
    if (operation != nullptr) operation->release();
  }
};

/// A call as a span of the trace. Calls within a call are part of it.
class TracedCall {
 public:
  TracedCall(const Communicator& communicator, const Stream& stream, Purpose purpose, const char* name) {
    if (!trace::is_on() || open_ != nullptr || communicator.size() == 1 || stream.is_dry()) return;
    open_ = this;
    communicator_ = &communicator;
    before_ = communicator.traffic(purpose);
    purpose_ = purpose;
    event_.track = trace::Track::communication;
    event_.category = communicator.axis();
    event_.name = name;
    event_.purpose = name_of(purpose);
    event_.begin_ns = trace::now_ns();
  }
  ~TracedCall() {
    if (communicator_ == nullptr) return;
    open_ = nullptr;
    const Traffic& now = communicator_->traffic(purpose_);
    event_.messages += now.messages - before_.messages;
    event_.bytes += now.bytes - before_.bytes;
    event_.end_ns = trace::now_ns();
    trace::record(event_);
  }
  /// Counts what was sent before, unless this call is part of another.
  void take(Traffic& sent) {
    if (communicator_ == nullptr) return;
    event_.messages += sent.messages;
    event_.bytes += sent.bytes;
    sent = {};
  }
  /// Whether what `communicator` sends now is counted by the open span.
  static bool counts(const Communicator* communicator, Purpose purpose) {
    return open_ != nullptr && open_->communicator_ == communicator && open_->purpose_ == purpose;
  }
  TracedCall(const TracedCall&) = delete;
  TracedCall& operator=(const TracedCall&) = delete;

 private:
  static inline const TracedCall* open_ = nullptr;  // communication is one thread's alone
  const Communicator* communicator_ = nullptr;
  Traffic before_;
  Purpose purpose_ = Purpose::control;
  trace::Event event_;
};

void check_parts(const Tensor& part, const Tensor& whole, int ranks, const char* operation) {
  if (part.dtype != whole.dtype || part.numel() * ranks != whole.numel()) {
    fail<InternalError>("{}: the whole {} {} is not {} parts {} {}", operation, name_of(whole.dtype), whole.shape.str(),
                        ranks, name_of(part.dtype), part.shape.str());
  }
}

}  // namespace

std::string_view name_of(Purpose purpose) {
  switch (purpose) {
    case Purpose::hidden_state: return "hidden_state";
    case Purpose::hidden_gradient: return "hidden_gradient";
    case Purpose::conv_halo: return "conv_halo";
    case Purpose::kda_state: return "kda_state";
    case Purpose::attention_kv: return "attention_kv";
    case Purpose::gradients: return "gradients";
    case Purpose::weights: return "weights";
    case Purpose::control: return "control";
    case Purpose::data: return "data";
  }
  return "?";
}

Pending::Pending(Pending&& other) noexcept
    : operation_(std::exchange(other.operation_, nullptr)),
      traced_(other.traced_),
      wait_name_(other.wait_name_),
      purpose_(other.purpose_) {}

Pending& Pending::operator=(Pending&& other) noexcept {
  std::swap(operation_, other.operation_);
  std::swap(traced_, other.traced_);
  std::swap(wait_name_, other.wait_name_);
  std::swap(purpose_, other.purpose_);
  return *this;
}

Pending::~Pending() {
  if (operation_ == nullptr) return;
  if (std::uncaught_exceptions() == 0) log::error("a started communication was dropped before it had finished");
  operation_->release();
}

bool Pending::test() {
  if (operation_ == nullptr) return true;
  Releaser release{std::exchange(operation_, nullptr)};  // also when the operation throws
  if (release.operation->test()) return true;
  std::swap(operation_, release.operation);
  return false;
}

void Pending::wait(const Stream& stream) {
  if (operation_ == nullptr) return;
  const Releaser release{std::exchange(operation_, nullptr)};
  if (traced_ == nullptr) {
    release.operation->wait(stream);
    return;
  }
  TracedCall call(*traced_, stream, purpose_, wait_name_);
  call.take(traced_->late_[static_cast<std::size_t>(purpose_)]);
  const trace::Mark begin = trace::mark(stream);
  release.operation->wait(stream);
  trace::Event held_up;  // the stream, by what it waits for
  held_up.track = trace::Track::communication;
  held_up.category = traced_->axis();
  held_up.name = wait_name_;
  held_up.purpose = name_of(purpose_);
  trace::record(held_up, begin, stream);
}

Communicator::Communicator(int rank, int size, std::string axis) : rank_(rank), size_(size), axis_(std::move(axis)) {
  require(size >= 1 && rank >= 0 && rank < size, "Communicator: rank outside its axis");
}

void Communicator::count_message(Purpose purpose, std::size_t bytes) {
  Traffic& t = traffic_[static_cast<std::size_t>(purpose)];
  ++t.messages;
  t.bytes += bytes;
  if (!trace::is_on() || TracedCall::counts(this, purpose)) return;
  Traffic& late = late_[static_cast<std::size_t>(purpose)];
  ++late.messages;
  late.bytes += bytes;
}

Pending Communicator::start_checked_exchange(const Stream& stream, std::span<const Transfer> sends,
                                             std::span<const Transfer> receives, Purpose purpose,
                                             const char* operation) {
  for (const auto& list : {sends, receives}) {
    for (const Transfer& t : list) {
      if (t.peer < 0 || t.peer >= size_ || t.peer == rank_) {
        fail<InternalError>("{} ({}) on axis {}: rank {} of {} has no peer {}", operation, name_of(purpose), axis_,
                            rank_, size_, t.peer);
      }
      require(t.tag >= 0 && t.tag <= max_tag, "exchange: tag outside 0 .. max_tag");
    }
  }
  if (stream.is_dry()) return {};
  return do_exchange(stream, sends, receives, purpose, operation);
}

Pending Communicator::traced(Pending pending, Purpose purpose, const char* wait_name) const {
  if (trace::is_on()) {
    pending.traced_ = this;
    pending.wait_name_ = wait_name;
    pending.purpose_ = purpose;
  }
  return pending;
}

void Communicator::send(const Stream& stream, const Tensor& x, int to, Purpose purpose, int tag) {
  const TracedCall call(*this, stream, purpose, "send");
  const Transfer transfer{to, x, tag};
  traced(start_checked_exchange(stream, {&transfer, 1}, {}, purpose, "send"), purpose, "wait for send").wait(stream);
}

void Communicator::receive(const Stream& stream, const Tensor& x, int from, Purpose purpose, int tag) {
  const TracedCall call(*this, stream, purpose, "receive");
  const Transfer transfer{from, x, tag};
  traced(start_checked_exchange(stream, {}, {&transfer, 1}, purpose, "receive"), purpose, "wait for receive")
      .wait(stream);
}

void Communicator::exchange(const Stream& stream, std::span<const Transfer> sends, std::span<const Transfer> receives,
                            Purpose purpose) {
  const TracedCall call(*this, stream, purpose, "exchange");
  traced(start_checked_exchange(stream, sends, receives, purpose, "exchange"), purpose, "wait for exchange")
      .wait(stream);
}

Pending Communicator::start_exchange(const Stream& stream, std::span<const Transfer> sends,
                                     std::span<const Transfer> receives, Purpose purpose) {
  const TracedCall call(*this, stream, purpose, "start exchange");
  return traced(start_checked_exchange(stream, sends, receives, purpose, "exchange"), purpose, "wait for exchange");
}

void Communicator::connect(std::span<const Route>) {}

void Communicator::all_reduce_sum(const Stream& stream, const Tensor& x, Purpose purpose, Arena& workspace) {
  const TracedCall call(*this, stream, purpose, "all_reduce_sum");
  const auto scope = workspace.scope();
  start_all_reduce_sum(stream, x, purpose, workspace).wait(stream);
}

Pending Communicator::start_all_reduce_sum(const Stream& stream, const Tensor& x, Purpose purpose, Arena& workspace) {
  if (!can_sum(x.dtype)) fail<InternalError>("all_reduce_sum: {} cannot be summed here", name_of(x.dtype));
  const std::int64_t elements = all_reduce_scratch(x.numel(), x.dtype);
  const Tensor scratch = elements > 0 ? workspace.allocate(x.dtype, {elements}, "all-reduce scratch") : Tensor();
  if (stream.is_dry() || size_ == 1 || x.numel() == 0) return {};
  const TracedCall call(*this, stream, purpose, "start all_reduce_sum");
  return traced(do_all_reduce(stream, x, scratch, purpose), purpose, "wait for all_reduce_sum");
}

void Communicator::all_gather(const Stream& stream, const Tensor& part, const Tensor& whole, Purpose purpose) {
  const TracedCall call(*this, stream, purpose, "all_gather");
  start_all_gather(stream, part, whole, purpose).wait(stream);
}

Pending Communicator::start_all_gather(const Stream& stream, const Tensor& part, const Tensor& whole, Purpose purpose) {
  check_parts(part, whole, size_, "all_gather");
  if (stream.is_dry() || part.numel() == 0) return {};
  if (size_ == 1) {
    copy_all(stream, part, whole);
    return {};
  }
  const TracedCall call(*this, stream, purpose, "start all_gather");
  return traced(do_all_gather(stream, part, whole, purpose), purpose, "wait for all_gather");
}

void Communicator::reduce_scatter_sum(const Stream& stream, const Tensor& whole, const Tensor& part, Purpose purpose,
                                      Arena& workspace) {
  const TracedCall call(*this, stream, purpose, "reduce_scatter_sum");
  const auto scope = workspace.scope();
  start_reduce_scatter_sum(stream, whole, part, purpose, workspace).wait(stream);
}

Pending Communicator::start_reduce_scatter_sum(const Stream& stream, const Tensor& whole, const Tensor& part,
                                               Purpose purpose, Arena& workspace) {
  if (!can_sum(whole.dtype)) {
    fail<InternalError>("reduce_scatter_sum: {} cannot be summed here", name_of(whole.dtype));
  }
  check_parts(part, whole, size_, "reduce_scatter_sum");
  const std::int64_t elements = reduce_scatter_scratch(part.numel(), part.dtype);
  const Tensor scratch = elements > 0 ? workspace.allocate(part.dtype, {elements}, "reduce-scatter scratch") : Tensor();
  if (stream.is_dry() || part.numel() == 0) return {};
  if (size_ == 1) {
    copy_all(stream, whole, part);
    return {};
  }
  const TracedCall call(*this, stream, purpose, "start reduce_scatter_sum");
  return traced(do_reduce_scatter(stream, whole, part, scratch, purpose), purpose, "wait for reduce_scatter_sum");
}

void Communicator::broadcast(const Stream& stream, const Tensor& x, int root, Purpose purpose) {
  require(root >= 0 && root < size_, "broadcast: root outside the axis");
  if (stream.is_dry() || size_ == 1) return;
  const TracedCall call(*this, stream, purpose, "broadcast");
  do_broadcast(stream, x, root, purpose);
}

void Communicator::barrier(const Stream& stream, Purpose purpose) {
  if (stream.is_dry() || size_ == 1) return;
  const TracedCall call(*this, stream, purpose, "barrier");
  do_barrier(stream, purpose);
}

}  // namespace deltapipe
