// Gradients of weights put off: a backward pass with a tape computes input gradients alone and notes what the weights'
// gradients need; run() adds those later. This is the second half of a split backward (pipeline/schedule.h,
// backward_weight). Small parameters (norms, convolutions, gates, biases of no Linear) are not put off.
#pragma once

#include "core/arena.h"
#include "core/tensor.h"

#include <vector>

namespace deltapipe {

class Linear;
struct Context;

class WeightTape {
 public:
  /// Empties the tape. Output gradients are copied into `keep`; inputs too where `copy_inputs` says that the layers'
  /// own ones will be gone by then (recomputed activations).
  void begin(Arena& keep, bool copy_inputs);
  /// The linear layer lives until run().
  void add(const Context& c, const Linear& layer, const Tensor& dy, const Tensor& x);
  /// Adds all weight gradients, in the order noted, and empties the tape.
  void run(const Context& c);

 private:
  struct Entry {
    const Linear* layer;
    Tensor dy, x;
  };
  Arena* keep_ = nullptr;
  bool copy_inputs_ = false;
  std::vector<Entry> entries_;
};

}  // namespace deltapipe
