#include "kernels/rms_norm.h"

#include "kernels/dispatch.h"

namespace deltapipe::kernels {

DELTAPIPE_KERNEL(rms_norm_forward)
DELTAPIPE_KERNEL(rms_norm_backward)

void rms_norm_forward(const Stream& stream, const Tensor& x, const Tensor& w, float eps, const Tensor& y,
                      const Tensor& rstd) {
  require(x.shape.rank() == 2, "rms_norm_forward: x is not [T, D]");
  check_shape(w, {x.dim(1)}, "rms_norm_forward: w");
  check_shape(y, x.shape, "rms_norm_forward: y");
  check_shape(rstd, {x.dim(0)}, "rms_norm_forward: rstd");
  DELTAPIPE_DISPATCH(stream, rms_norm_forward, stream, x, w, eps, y, rstd);
}

void rms_norm_backward(const Stream& stream, const Tensor& dy, const Tensor& x, const Tensor& w, const Tensor& rstd,
                       const Tensor& dx, bool accumulate, const Tensor& dw, Arena& workspace) {
  require(x.shape.rank() == 2, "rms_norm_backward: x is not [T, D]");
  check_shape(dy, x.shape, "rms_norm_backward: dy");
  check_shape(w, {x.dim(1)}, "rms_norm_backward: w");
  check_shape(rstd, {x.dim(0)}, "rms_norm_backward: rstd");
  check_shape(dx, x.shape, "rms_norm_backward: dx");
  if (dw) check_shape(dw, {x.dim(1)}, "rms_norm_backward: dw");
  DELTAPIPE_DISPATCH_WITH_WORKSPACE(stream, rms_norm_backward, stream, dy, x, w, rstd, dx, accumulate, dw, workspace);
}

}  // namespace deltapipe::kernels
