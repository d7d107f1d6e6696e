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

/// Where the random bits of stochastic rounding come from. Element e of a parameter, counted in the whole parameter,
/// takes them from r = philox(seed, stream + 0x9E3779B97F4A7C15 step, e / 2) of core/random.h, in words a = r[0] and
/// b = r[1] where e is even, a = r[2] and b = r[3] where it is odd: the weight the low 16 bits of a, exp_avg the high
/// ones, exp_avg_sq the low 16 bits of b. So they depend neither on how a parameter is sharded nor on the device.
struct StochasticRounding {
  std::uint64_t seed = 0;
  std::uint64_t stream = 0;  // of the parameter: stream_of(name)
  std::int64_t offset = 0;   // >= 0: index in the whole parameter of the first element given
};

/// The same update without a master copy. weights (w), exp_avg, exp_avg_sq: [n] bfloat16, updated in place; gradient
/// [n] float32 is only read; nothing may overlap. Everything is computed in float32 from the values at rest, the weight
/// with the moments before they are rounded, each sum of products by fused multiply-add, so that all devices give the
/// same bits. Then each of the three is rounded stochastically: x between two neighbouring bfloat16 becomes the one
/// farther from zero with probability (its distance to the nearer one over their spacing), by adding 16 random bits
/// below the kept ones; the expected value is x itself. What a bfloat16 holds exactly stays, infinities and NaN too.
/// Throws InternalError for wrong shapes, dtypes or constants.
void adamw_bfloat16(const Stream& stream, const AdamWStep& step, const StochasticRounding& rounding,
                    const Tensor& weights, const Tensor& gradient, const Tensor& exp_avg, const Tensor& exp_avg_sq);

}  // namespace deltapipe::kernels
