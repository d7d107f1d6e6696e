#include "train/state_ferry.h"

#include "core/error.h"

namespace deltapipe {

StateFerry::StateFerry(Arena& device, DType dtype, std::size_t states) {
  require(states <= most_states, "StateFerry: too many states");
  for (Slot& slot : slots_) {
    for (std::size_t i = 0; i < states; ++i) {
      slot.states[i] = device.allocate(dtype, {piece}, "optimizer states on their way");
    }
  }
}

std::span<const Tensor> StateFerry::bring(const Stream& stream, std::span<const Tensor> states, std::int64_t begin,
                                          std::int64_t end) {
  const Device device = stream.device();
  if (!in_) {
    in_.emplace(device);
    out_.emplace(device);
    for (Slot& slot : slots_) {
      slot.filled.emplace(device);
      slot.updated.emplace(device);
      slot.empty.emplace(device);
    }
  }
  Slot& slot = slots_[next_];
  slot.empty->make_wait(in_->get());
  for (std::size_t i = 0; i < states.size(); ++i) {
    brought_[i] = slot.states[i].rows(0, end - begin);
    copy(in_->get(), states[i].rows(begin, end), brought_[i]);
  }
  slot.filled->record(in_->get());
  slot.filled->make_wait(stream);
  return {brought_.data(), states.size()};
}

void StateFerry::take_back(const Stream& stream, std::span<const Tensor> states, std::int64_t begin, std::int64_t end) {
  Slot& slot = slots_[next_];
  next_ = (next_ + 1) % slots;
  slot.updated->record(stream);
  slot.updated->make_wait(out_->get());
  for (std::size_t i = 0; i < states.size(); ++i) copy(out_->get(), brought_[i], states[i].rows(begin, end));
  slot.empty->record(out_->get());
}

/// The host may read or change the states once `stream` has been waited for, and the next piece comes in after that.
void StateFerry::leave(const Stream& stream) {
  for (const Slot& slot : slots_) slot.empty->make_wait(stream);
}

}  // namespace deltapipe
