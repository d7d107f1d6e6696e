#include "kernels/linear.h"

#include "kernels/dispatch.h"

namespace deltapipe::kernels {

DELTAPIPE_KERNEL(linear_forward)
DELTAPIPE_KERNEL(linear_backward_input)
DELTAPIPE_KERNEL(linear_backward_weight)

void linear_forward(const Stream& stream, const Tensor& x, const Tensor& w, const Tensor& bias, const Tensor& y) {
  require(x.shape.rank() == 2, "linear_forward: x is not [M, I]");
  require(w.shape.rank() == 2, "linear_forward: w is not [O, I]");
  check_tensor(w, {w.dim(0), x.dim(1)}, x.dtype, "linear_forward: w");
  if (bias) check_tensor(bias, {w.dim(0)}, x.dtype, "linear_forward: bias");
  check_tensor(y, {x.dim(0), w.dim(0)}, x.dtype, "linear_forward: y");
  DELTAPIPE_DISPATCH(stream, linear_forward, stream, x, w, bias, y);
}

void linear_backward_input(const Stream& stream, const Tensor& dy, const Tensor& w, const Tensor& dx, bool accumulate) {
  require(dy.shape.rank() == 2, "linear_backward_input: dy is not [M, O]");
  require(w.shape.rank() == 2, "linear_backward_input: w is not [O, I]");
  check_tensor(w, {dy.dim(1), w.dim(1)}, dy.dtype, "linear_backward_input: w");
  check_tensor(dx, {dy.dim(0), w.dim(1)}, dy.dtype, "linear_backward_input: dx");
  DELTAPIPE_DISPATCH(stream, linear_backward_input, stream, dy, w, dx, accumulate);
}

void linear_backward_weight(const Stream& stream, const Tensor& dy, const Tensor& x, const Tensor& dw,
                            const Tensor& dbias) {
  require(dy.shape.rank() == 2, "linear_backward_weight: dy is not [M, O]");
  require(x.shape.rank() == 2, "linear_backward_weight: x is not [M, I]");
  check_tensor(x, {dy.dim(0), x.dim(1)}, dy.dtype, "linear_backward_weight: x");
  const DType sums = accumulation_dtype(dy.dtype);
  if (dw) check_tensor(dw, {dy.dim(1), x.dim(1)}, sums, "linear_backward_weight: dw");
  if (dbias) check_tensor(dbias, {dy.dim(1)}, sums, "linear_backward_weight: dbias");
  DELTAPIPE_DISPATCH(stream, linear_backward_weight, stream, dy, x, dw, dbias);
}

}  // namespace deltapipe::kernels
