#include "model/weight_tape.h"

#include "kernels/elementwise.h"
#include "model/linear.h"

namespace deltapipe {

void WeightTape::begin(Arena& keep, bool copy_inputs) {
  keep_ = &keep;
  copy_inputs_ = copy_inputs;
  entries_.clear();
}

void WeightTape::add(const Context& c, const Linear& layer, const Tensor& dy, const Tensor& x) {
  require(keep_ != nullptr, "WeightTape::add: begin was not called");
  const auto copy = [&](const Tensor& t, const char* label) {
    const Tensor kept = keep_->allocate(t.dtype, t.shape, label);
    kernels::copy_cast(c.stream, t, kept);
    return kept;
  };
  entries_.push_back({&layer, copy(dy, "output gradient, kept"), copy_inputs_ ? copy(x, "input, kept") : x});
}

void WeightTape::end_layer(std::int64_t layer) { entries_.push_back({nullptr, {}, {}, layer}); }

void WeightTape::run(const Context& c, const GradientsComplete& complete) {
  for (const Entry& e : entries_) {
    if (e.linear != nullptr) {
      e.linear->backward_weight(c, e.dy, e.x);
    } else if (complete) {
      complete(e.layer);
    }
  }
  entries_.clear();
}

}  // namespace deltapipe
