// The contract of kernels/adamw.h on CUDA: float32 state, param in bfloat16 or float32.
#include "kernels/adamw.h"

#include "kernels/cuda/launches.h"
#include "kernels/cuda/typed.h"

#include <cmath>

namespace deltapipe::kernels::cuda {

decltype(kernels::adamw) adamw;

void adamw(const Stream& stream, const AdamWStep& step, const Tensor& master, const Tensor& gradient,
           const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& param) {
  const char* call = "adamw";
  require_dtype(master, DType::f32, "adamw: master");
  const auto n = static_cast<double>(step.step);
  const AdamWConstants c{
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
  for_type(param.dtype, call, [&]<class P>() {
    check(adamw<P>(c, floats(master), floats(gradient), floats(exp_avg), floats(exp_avg_sq), pointer<P>(param, call),
                   master.dim(0), native(stream)),
          call);
  });
}

}  // namespace deltapipe::kernels::cuda
