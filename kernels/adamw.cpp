#include "kernels/adamw.h"

#include "kernels/dispatch.h"

namespace deltapipe::kernels {

DELTAPIPE_KERNEL(adamw)
DELTAPIPE_KERNEL(adamw_bfloat16)

namespace {

void check_constants(const AdamWStep& step, const char* call) {
  if (step.step < 1) fail<InternalError>("{}: step {} does not count from 1", call, step.step);
  if (!(step.beta1 >= 0 && step.beta1 < 1 && step.beta2 >= 0 && step.beta2 < 1)) {
    fail<InternalError>("{}: beta {} or {} is not in [0, 1)", call, step.beta1, step.beta2);
  }
  if (!(step.epsilon >= 0)) fail<InternalError>("{}: epsilon {} is negative", call, step.epsilon);
}

}  // namespace

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
  check_constants(step, "adamw");
  DELTAPIPE_DISPATCH(stream, adamw, stream, step, master, gradient, exp_avg, exp_avg_sq, param);
}

void adamw_bfloat16(const Stream& stream, const AdamWStep& step, const StochasticRounding& rounding,
                    const Tensor& weights, const Tensor& gradient, const Tensor& exp_avg, const Tensor& exp_avg_sq) {
  require(weights.shape.rank() == 1, "adamw_bfloat16: weights is not [n]");
  check_dtype(weights, DType::bf16, "adamw_bfloat16: weights");
  check_tensor(gradient, weights.shape, DType::f32, "adamw_bfloat16: gradient");
  check_tensor(exp_avg, weights.shape, DType::bf16, "adamw_bfloat16: exp_avg");
  check_tensor(exp_avg_sq, weights.shape, DType::bf16, "adamw_bfloat16: exp_avg_sq");
  require(rounding.offset >= 0, "adamw_bfloat16: the offset is negative");
  check_constants(step, "adamw_bfloat16");
  DELTAPIPE_DISPATCH(stream, adamw_bfloat16, stream, step, rounding, weights, gradient, exp_avg, exp_avg_sq);
}

}  // namespace deltapipe::kernels
