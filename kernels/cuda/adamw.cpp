// The contracts of kernels/adamw.h on CUDA: float32 state with param in bfloat16 or float32, or all in bfloat16.
#include "kernels/adamw.h"

#include "kernels/cuda/launches.h"
#include "kernels/cuda/typed.h"

#include <cmath>

namespace deltapipe::kernels::cuda {

decltype(kernels::adamw) adamw;
decltype(kernels::adamw_bfloat16) adamw_bfloat16;

namespace {

AdamWConstants constants_of(const AdamWStep& step) {
  const auto n = static_cast<double>(step.step);
  return {
      .gradient_scale = static_cast<float>(step.gradient_scale),
      .beta1 = static_cast<float>(step.beta1),
      .rest1 = static_cast<float>(1 - step.beta1),
      .beta2 = static_cast<float>(step.beta2),
      .rest2 = static_cast<float>(1 - step.beta2),
      .keep = static_cast<float>(1 - step.learning_rate * step.weight_decay),
      .rate = static_cast<float>(step.learning_rate / (1 - std::pow(step.beta1, n))),
      .correction = static_cast<float>(1 / std::sqrt(1 - std::pow(step.beta2, n))),
      .epsilon = static_cast<float>(step.epsilon),
  };
}

}  // namespace

void adamw(const Stream& stream, const AdamWStep& step, const Tensor& master, const Tensor& gradient,
           const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& param) {
  const char* call = "adamw";
  require_dtype(master, DType::f32, "adamw: master");
  const AdamWConstants c = constants_of(step);
  for_type(param.dtype, call, [&]<class P>() {
    check(adamw<P>(c, floats(master), floats(gradient), floats(exp_avg), floats(exp_avg_sq), pointer<P>(param, call),
                   master.dim(0), native(stream)),
          call);
  });
}

void adamw_bfloat16(const Stream& stream, const AdamWStep& step, const StochasticRounding& rounding,
                    const Tensor& weights, const Tensor& gradient, const Tensor& exp_avg, const Tensor& exp_avg_sq) {
  const RoundingBits random{
      .seed = rounding.seed,
      .stream = rounding.stream + 0x9E3779B97F4A7C15u * static_cast<std::uint64_t>(step.step),
      .offset = static_cast<std::uint64_t>(rounding.offset),
  };
  check(adamw_bfloat16(constants_of(step), random, bits(weights), floats(gradient), bits(exp_avg), bits(exp_avg_sq),
                       weights.dim(0), native(stream)),
        "adamw_bfloat16");
}

}  // namespace deltapipe::kernels::cuda
