// Gradients of weights put off: a backward pass with a tape computes input gradients alone and notes what the weights'
// gradients need; run() adds those later. This is the second half of a split backward (pipeline/schedule.h,
// backward_weight). Small parameters (norms, convolutions, gates, biases of no Linear) are not put off.
#pragma once

#include "core/arena.h"
#include "core/tensor.h"
#include "model/parameters.h"

#include <vector>

namespace deltapipe {

class Linear;
struct Context;

class WeightTape {
 public:
  /// Empties the tape. Output gradients are copied into `keep`; inputs too where `copy_inputs` says that the layers'
  /// own ones will be gone by then (recomputed activations). Of a range of layers the tape is for the first `layers`;
  /// 0: for all.
  void begin(Arena& keep, bool copy_inputs, std::int64_t layers = 0);
  /// Whether weights' gradients of the i-th layer of a range are put off.
  bool takes(std::int64_t i) const { return layers_ == 0 || i < layers_; }
  /// The linear layer lives until run(); `x` is not written before end_layer().
  void add(const Context& c, const Linear& layer, const Tensor& dy, const Tensor& x);
  /// What is noted from here on belongs to other layers than `layer` (ParameterSpec::layer).
  void end_layer(std::int64_t layer);
  /// Adds all weight gradients, in the order noted, and empties the tape. `complete` is told of each layer's end.
  void run(const Context& c, const GradientsComplete& complete = {});

 private:
  struct Entry {
    const Linear* linear;  // null: the end of a layer
    Tensor dy, x;
    const void* source;  // where x was when it was noted
    std::int64_t layer = 0;
  };
  Arena* keep_ = nullptr;
  bool copy_inputs_ = false;
  std::int64_t layers_ = 0;
  std::vector<Entry> entries_;
};

}  // namespace deltapipe
