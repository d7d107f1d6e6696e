// AdamW: Adam with decoupled weight decay. Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019,
// Algorithm 2, with the schedule multiplier folded into the learning rate and decay times learning rate as in
// torch.optim.AdamW; epsilon is added outside the square root, after its bias correction.
//   g = gradient_scale * gradient
//   m = beta1 m + (1 - beta1) g                     v = beta2 v + (1 - beta2) g^2
//   w = w (1 - learning_rate weight_decay) - learning_rate / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) +
//   epsilon)
#pragma once

#include "core/stream.h"
#include "core/tensor.h"

#include <cstdint>

namespace deltapipe::kernels {

struct AdamWStep {
  double learning_rate = 0;
  double beta1 = 0.9, beta2 = 0.95;  // in [0, 1)
  double epsilon = 1e-8;             // >= 0
  double weight_decay = 0;
  std::int64_t step = 1;      // counts from 1, for the bias corrections
  double gradient_scale = 1;  // clipping and averaging, applied to the gradient before anything else
};

/// One update of n parameters. master (w), gradient, exp_avg (m), exp_avg_sq (v): [n], all float32 or all float64;
/// master and both moments are updated in place, gradient is only read. param [n] float32, float64 or bfloat16 becomes
/// the new master rounded to nearest (to bfloat16 by way of float32); it may be the very memory of master, no other
/// overlap is allowed. Constants are prepared in double; elements are computed in master's dtype.
/// Throws InternalError for wrong shapes, dtypes or constants.
void adamw(const Stream& stream, const AdamWStep& step, const Tensor& master, const Tensor& gradient,
           const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& param);

}  // namespace deltapipe::kernels
