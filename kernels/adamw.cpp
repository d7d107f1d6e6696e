#include "kernels/adamw.h"

#include "kernels/dispatch.h"

namespace deltapipe::kernels {

DELTAPIPE_KERNEL(adamw)

void adamw(const Stream& stream, const AdamWStep& step, const Tensor& master, const Tensor& gradient,
           const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& param) {
  require(master.shape.rank() == 1, "adamw: master is not [n]");
  require(master.dtype == DType::f32 || master.dtype == DType::f64, "adamw: master is not float32 or float64");
  check_shape(gradient, master.shape, "adamw: gradient");
  check_dtype(gradient, master.dtype, "adamw: gradient");
  check_shape(exp_avg, master.shape, "adamw: exp_avg");
  check_dtype(exp_avg, master.dtype, "adamw: exp_avg");
  check_shape(exp_avg_sq, master.shape, "adamw: exp_avg_sq");
  check_dtype(exp_avg_sq, master.dtype, "adamw: exp_avg_sq");
  check_shape(param, master.shape, "adamw: param");
  require(param.dtype == DType::f32 || param.dtype == DType::f64 || param.dtype == DType::bf16,
          "adamw: param is not float32, float64 or bfloat16");
  require(param.data != master.data || param.dtype == master.dtype, "adamw: param is master, but of another dtype");
  require(step.step >= 1, "adamw: step does not count from 1");
  require(step.beta1 >= 0 && step.beta1 < 1 && step.beta2 >= 0 && step.beta2 < 1, "adamw: a beta is not in [0, 1)");
  require(step.epsilon >= 0, "adamw: epsilon is negative");
  DELTAPIPE_DISPATCH(stream, adamw, stream, step, master, gradient, exp_avg, exp_avg_sq, param);
}

}  // namespace deltapipe::kernels
