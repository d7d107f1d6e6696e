#include "kernels/rms_norm.h"

#include "kernels/dispatch.h"

namespace deltapipe::kernels {

DELTAPIPE_KERNEL(rms_norm_forward)
DELTAPIPE_KERNEL(add_rms_norm_forward)
DELTAPIPE_KERNEL(rms_norm_backward)

void rms_norm_forward(const Stream& stream, const Tensor& x, const Tensor& w, float eps, const Tensor& y,
                      const Tensor& rstd) {
  require(x.shape.rank() == 2, "rms_norm_forward: x is not [T, D]");
  check_shape(w, {x.dim(1)}, "rms_norm_forward: w");
  check_shape(y, x.shape, "rms_norm_forward: y");
  check_shape(rstd, {x.dim(0)}, "rms_norm_forward: rstd");
  DELTAPIPE_DISPATCH(stream, rms_norm_forward, stream, x, w, eps, y, rstd);
}

void add_rms_norm_forward(const Stream& stream, const Tensor& x, const Tensor& h, const Tensor& w, float eps,
                          const Tensor& sum, const Tensor& y, const Tensor& rstd) {
  require(x.shape.rank() == 2, "add_rms_norm_forward: x is not [T, D]");
  check_tensor(h, x.shape, x.dtype, "add_rms_norm_forward: h");
  check_shape(w, {x.dim(1)}, "add_rms_norm_forward: w");
  check_tensor(sum, x.shape, x.dtype, "add_rms_norm_forward: sum");
  check_tensor(y, x.shape, x.dtype, "add_rms_norm_forward: y");
  check_shape(rstd, {x.dim(0)}, "add_rms_norm_forward: rstd");
  DELTAPIPE_DISPATCH(stream, add_rms_norm_forward, stream, x, h, w, eps, sum, y, rstd);
}

void rms_norm_backward(const Stream& stream, const Tensor& dy, const Tensor& x, const Tensor& w, const Tensor& rstd,
                       const Tensor& residual, const Tensor& dx, const Tensor& dw, Arena& workspace) {
  require(x.shape.rank() == 2, "rms_norm_backward: x is not [T, D]");
  check_shape(dy, x.shape, "rms_norm_backward: dy");
  check_shape(w, {x.dim(1)}, "rms_norm_backward: w");
  check_shape(rstd, {x.dim(0)}, "rms_norm_backward: rstd");
  if (residual) check_tensor(residual, x.shape, x.dtype, "rms_norm_backward: residual");
  check_shape(dx, x.shape, "rms_norm_backward: dx");
  if (dw) check_shape(dw, {x.dim(1)}, "rms_norm_backward: dw");
  DELTAPIPE_DISPATCH_WITH_WORKSPACE(stream, rms_norm_backward, stream, dy, x, w, rstd, residual, dx, dw, workspace);
}

}  // namespace deltapipe::kernels
