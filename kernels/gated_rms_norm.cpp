#include "kernels/gated_rms_norm.h"

#include "kernels/dispatch.h"

namespace deltapipe::kernels {

DELTAPIPE_KERNEL(gated_rms_norm_forward)
DELTAPIPE_KERNEL(gated_rms_norm_backward)

namespace {

void check_inputs(const Tensor& x, const Tensor& gate, const Tensor& w, const Tensor& rstd) {
  require(x.shape.rank() == 3, "gated_rms_norm: x is not [T, H, V]");
  require(x.dim(2) >= 1 && x.dim(2) <= 512, "gated_rms_norm: a head has 1 to 512 channels");
  check_shape(gate, x.shape, "gated_rms_norm: gate");
  check_dtype(gate, x.dtype, "gated_rms_norm: gate");
  check_shape(w, {x.dim(2)}, "gated_rms_norm: w");
  check_dtype(w, x.dtype, "gated_rms_norm: w");
  check_shape(rstd, {x.dim(0), x.dim(1)}, "gated_rms_norm: rstd");
  check_dtype(rstd, accumulation_dtype(x.dtype), "gated_rms_norm: rstd");
}

void check_like(const Tensor& t, const Tensor& x, const char* what) {
  check_shape(t, x.shape, what);
  check_dtype(t, x.dtype, what);
}

}  // namespace

void gated_rms_norm_forward(const Stream& stream, const Tensor& x, const Tensor& gate, const Tensor& w, float eps,
                            const Tensor& y, const Tensor& rstd) {
  check_inputs(x, gate, w, rstd);
  check_like(y, x, "gated_rms_norm_forward: y");
  DELTAPIPE_DISPATCH(stream, gated_rms_norm_forward, stream, x, gate, w, eps, y, rstd);
}

void gated_rms_norm_backward(const Stream& stream, const Tensor& dy, const Tensor& x, const Tensor& gate,
                             const Tensor& w, const Tensor& rstd, const Tensor& dx, const Tensor& dgate,
                             const Tensor& dw, Arena& workspace) {
  check_inputs(x, gate, w, rstd);
  check_like(dy, x, "gated_rms_norm_backward: dy");
  check_like(dx, x, "gated_rms_norm_backward: dx");
  check_like(dgate, x, "gated_rms_norm_backward: dgate");
  if (dw) {
    check_shape(dw, {x.dim(2)}, "gated_rms_norm_backward: dw");
    check_dtype(dw, accumulation_dtype(x.dtype), "gated_rms_norm_backward: dw");
  }
  DELTAPIPE_DISPATCH_WITH_WORKSPACE(stream, gated_rms_norm_backward, stream, dy, x, gate, w, rstd, dx, dgate, dw,
                                    workspace);
}

}  // namespace deltapipe::kernels
