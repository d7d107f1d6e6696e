#include "model/weight_tape.h"

#include "kernels/elementwise.h"
#include "model/linear.h"

#include <algorithm>

namespace deltapipe {

void WeightTape::begin(Arena& keep, bool copy_inputs, std::int64_t layers) {
  keep_ = &keep;
  copy_inputs_ = copy_inputs;
  layers_ = layers;
  entries_.clear();
}

void WeightTape::add(const Context& c, const Linear& layer, const Tensor& dy, const Tensor& x) {
  require(keep_ != nullptr, "WeightTape::add: begin was not called");
  const auto copy = [&](const Tensor& t, const char* label) {
    const Tensor kept = keep_->allocate(t.dtype, t.shape, label);
    kernels::copy_cast(c.stream, t, kept);
    return kept;
  };
  Entry entry{&layer, copy(dy, "output gradient, kept"), x, x.data};
  if (copy_inputs_) {
    // Several layers' input, as that of the projections of one mixer, is kept once.
    const auto same = std::find_if(entries_.rbegin(), entries_.rend(), [&](const Entry& e) {
      return e.linear == nullptr || (e.source == x.data && e.x.shape == x.shape);
    });
    const bool is_kept = same != entries_.rend() && same->linear != nullptr;
    entry.x = is_kept ? same->x : copy(x, "input, kept");
  }
  entries_.push_back(entry);
}

void WeightTape::end_layer(std::int64_t layer) { entries_.push_back({nullptr, {}, {}, nullptr, layer}); }

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
