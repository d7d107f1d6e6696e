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

void check_number(std::size_t convolutions) {
  if (convolutions < 1 || convolutions > most_convolutions) {
    fail<InternalError>("short_conv: {} convolutions, 1 to {} go together", convolutions, most_convolutions);
  }
}

/// Convolutions of one call have the same shapes.
void check_like(const Tensor& x, const Tensor& w, const Tensor& first_x, const Tensor& first_w) {
  check_tensor(x, first_x.shape, first_x.dtype, "short_conv: another x");
  check_shape(w, first_w.shape, "short_conv: another w");
}

}  // namespace

void short_conv_forward(const Stream& stream, std::span<const ShortConv> convolutions, const Tensor& start) {
  check_number(convolutions.size());
  for (const ShortConv& c : convolutions) {
    check_inputs(c.x, c.w, c.halo, start);
    check_like(c.x, c.w, convolutions[0].x, convolutions[0].w);
    check_tensor(c.y, c.x.shape, c.x.dtype, "short_conv_forward: y");
  }
  DELTAPIPE_DISPATCH(stream, short_conv_forward, stream, convolutions, start);
}

void short_conv_backward(const Stream& stream, std::span<const ShortConvGradient> convolutions, const Tensor& start,
                         Arena& workspace) {
  check_number(convolutions.size());
  for (const ShortConvGradient& c : convolutions) {
    check_inputs(c.x, c.w, c.halo, start);
    check_like(c.x, c.w, convolutions[0].x, convolutions[0].w);
    check_tensor(c.dy, c.x.shape, c.x.dtype, "short_conv_backward: dy");
    check_tensor(c.dx, c.x.shape, c.x.dtype, "short_conv_backward: dx");
    if (c.dw) check_tensor(c.dw, c.w.shape, accumulation_dtype(c.x.dtype), "short_conv_backward: dw");
    if (c.dhalo) {
      check_tensor(c.dhalo, {c.x.dim(0), c.w.dim(1) - 1, c.x.dim(2)}, c.x.dtype, "short_conv_backward: dhalo");
    }
  }
  DELTAPIPE_DISPATCH_WITH_WORKSPACE(stream, short_conv_backward, stream, convolutions, start, workspace);
}

}  // namespace deltapipe::kernels
