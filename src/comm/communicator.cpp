#include "comm/communicator.h"

#include "comm/block_copy.h"
#include "core/log.h"

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

Pending::Pending(Pending&& other) noexcept : operation_(std::exchange(other.operation_, nullptr)) {}

Pending& Pending::operator=(Pending&& other) noexcept {
  std::swap(operation_, other.operation_);
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
  release.operation->wait(stream);
}

Communicator::Communicator(int rank, int size, std::string axis) : rank_(rank), size_(size), axis_(std::move(axis)) {
  require(size >= 1 && rank >= 0 && rank < size, "Communicator: rank outside its axis");
}

void Communicator::count_message(Purpose purpose, std::size_t bytes) {
  Traffic& t = traffic_[static_cast<std::size_t>(purpose)];
  ++t.messages;
  t.bytes += bytes;
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

void Communicator::send(const Stream& stream, const Tensor& x, int to, Purpose purpose, int tag) {
  const Transfer transfer{to, x, tag};
  start_checked_exchange(stream, {&transfer, 1}, {}, purpose, "send").wait(stream);
}

void Communicator::receive(const Stream& stream, const Tensor& x, int from, Purpose purpose, int tag) {
  const Transfer transfer{from, x, tag};
  start_checked_exchange(stream, {}, {&transfer, 1}, purpose, "receive").wait(stream);
}

void Communicator::exchange(const Stream& stream, std::span<const Transfer> sends, std::span<const Transfer> receives,
                            Purpose purpose) {
  start_checked_exchange(stream, sends, receives, purpose, "exchange").wait(stream);
}

Pending Communicator::start_exchange(const Stream& stream, std::span<const Transfer> sends,
                                     std::span<const Transfer> receives, Purpose purpose) {
  return start_checked_exchange(stream, sends, receives, purpose, "exchange");
}

void Communicator::all_reduce_sum(const Stream& stream, const Tensor& x, Purpose purpose, Arena& workspace) {
  const auto scope = workspace.scope();
  start_all_reduce_sum(stream, x, purpose, workspace).wait(stream);
}

Pending Communicator::start_all_reduce_sum(const Stream& stream, const Tensor& x, Purpose purpose, Arena& workspace) {
  if (!can_sum(x.dtype)) fail<InternalError>("all_reduce_sum: {} cannot be summed here", name_of(x.dtype));
  const std::int64_t elements = all_reduce_scratch(x.numel(), x.dtype);
  const Tensor scratch = elements > 0 ? workspace.allocate(x.dtype, {elements}, "all-reduce scratch") : Tensor();
  if (stream.is_dry() || size_ == 1 || x.numel() == 0) return {};
  return do_all_reduce(stream, x, scratch, purpose);
}

void Communicator::all_gather(const Stream& stream, const Tensor& part, const Tensor& whole, Purpose purpose) {
  start_all_gather(stream, part, whole, purpose).wait(stream);
}

Pending Communicator::start_all_gather(const Stream& stream, const Tensor& part, const Tensor& whole, Purpose purpose) {
  check_parts(part, whole, size_, "all_gather");
  if (stream.is_dry() || part.numel() == 0) return {};
  if (size_ == 1) {
    copy_all(stream, part, whole);
    return {};
  }
  return do_all_gather(stream, part, whole, purpose);
}

void Communicator::reduce_scatter_sum(const Stream& stream, const Tensor& whole, const Tensor& part, Purpose purpose,
                                      Arena& workspace) {
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
  return do_reduce_scatter(stream, whole, part, scratch, purpose);
}

void Communicator::broadcast(const Stream& stream, const Tensor& x, int root, Purpose purpose) {
  require(root >= 0 && root < size_, "broadcast: root outside the axis");
  if (stream.is_dry() || size_ == 1) return;
  do_broadcast(stream, x, root, purpose);
}

void Communicator::barrier(const Stream& stream, Purpose purpose) {
  if (stream.is_dry() || size_ == 1) return;
  do_barrier(stream, purpose);
}

}  // namespace deltapipe
