#include "kernels/short_conv.h"

#include "kernels/dispatch.h"

namespace deltapipe::kernels {

DELTAPIPE_KERNEL(short_conv_forward)
DELTAPIPE_KERNEL(short_conv_backward)

namespace {

void check_inputs(const Tensor& x, const Tensor& w, const Tensor& halo, const Tensor& start) {
  require(x.shape.rank() == 3, "short_conv: x is not [S, L, D]");
  require(w.shape.rank() == 2, "short_conv: w is not [D, W]");
  const std::int64_t width = w.dim(1);
  if (width < 1 || width > 8) fail<InternalError>("short_conv: {} taps, 1 to 8 are supported", width);
  check_shape(w, {x.dim(2), width}, "short_conv: w");
  check_dtype(w, x.dtype, "short_conv: w");
  if (halo) {
    check_shape(halo, {x.dim(0), width - 1, x.dim(2)}, "short_conv: halo");
    check_dtype(halo, x.dtype, "short_conv: halo");
  }
  check_shape(start, {x.dim(0), x.dim(1)}, "short_conv: start");
  check_dtype(start, DType::i32, "short_conv: start");
}

}  // namespace

void short_conv_forward(const Stream& stream, const Tensor& x, const Tensor& w, const Tensor& halo, const Tensor& start,
                        const Tensor& y) {
  check_inputs(x, w, halo, start);
  check_shape(y, x.shape, "short_conv_forward: y");
  check_dtype(y, x.dtype, "short_conv_forward: y");
  DELTAPIPE_DISPATCH(stream, short_conv_forward, stream, x, w, halo, start, y);
}

void short_conv_backward(const Stream& stream, const Tensor& dy, const Tensor& x, const Tensor& w, const Tensor& halo,
                         const Tensor& start, const Tensor& dx, const Tensor& dw, const Tensor& dhalo,
                         Arena& workspace) {
  check_inputs(x, w, halo, start);
  check_shape(dy, x.shape, "short_conv_backward: dy");
  check_dtype(dy, x.dtype, "short_conv_backward: dy");
  check_shape(dx, x.shape, "short_conv_backward: dx");
  check_dtype(dx, x.dtype, "short_conv_backward: dx");
  if (dw) {
    check_shape(dw, w.shape, "short_conv_backward: dw");
    check_dtype(dw, accumulation_dtype(x.dtype), "short_conv_backward: dw");
  }
  if (dhalo) {
    check_shape(dhalo, {x.dim(0), w.dim(1) - 1, x.dim(2)}, "short_conv_backward: dhalo");
    check_dtype(dhalo, x.dtype, "short_conv_backward: dhalo");
  }
  DELTAPIPE_DISPATCH_WITH_WORKSPACE(stream, short_conv_backward, stream, dy, x, w, halo, start, dx, dw, dhalo,
                                    workspace);
}

}  // namespace deltapipe::kernels
