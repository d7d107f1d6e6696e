#include "kernels/activation.h"

#include "kernels/dispatch.h"

namespace deltapipe::kernels {

DELTAPIPE_KERNEL(squared_relu_forward)
DELTAPIPE_KERNEL(squared_relu_backward)
DELTAPIPE_KERNEL(gated_silu_forward)
DELTAPIPE_KERNEL(gated_silu_backward)

void squared_relu_forward(const Stream& stream, const Tensor& x, const Tensor& y) {
  check_tensor(y, x.shape, x.dtype, "squared_relu_forward: y");
  DELTAPIPE_DISPATCH(stream, squared_relu_forward, stream, x, y);
}

void squared_relu_backward(const Stream& stream, const Tensor& dy, const Tensor& x, const Tensor& dx) {
  check_tensor(dy, x.shape, x.dtype, "squared_relu_backward: dy");
  check_tensor(dx, x.shape, x.dtype, "squared_relu_backward: dx");
  DELTAPIPE_DISPATCH(stream, squared_relu_backward, stream, dy, x, dx);
}

void gated_silu_forward(const Stream& stream, const Tensor& gate, const Tensor& up, const Tensor& y) {
  check_tensor(up, gate.shape, gate.dtype, "gated_silu_forward: up");
  check_tensor(y, gate.shape, gate.dtype, "gated_silu_forward: y");
  DELTAPIPE_DISPATCH(stream, gated_silu_forward, stream, gate, up, y);
}

void gated_silu_backward(const Stream& stream, const Tensor& dy, const Tensor& gate, const Tensor& up,
                         const Tensor& dgate, const Tensor& dup) {
  check_tensor(dy, gate.shape, gate.dtype, "gated_silu_backward: dy");
  check_tensor(up, gate.shape, gate.dtype, "gated_silu_backward: up");
  check_tensor(dgate, gate.shape, gate.dtype, "gated_silu_backward: dgate");
  check_tensor(dup, gate.shape, gate.dtype, "gated_silu_backward: dup");
  DELTAPIPE_DISPATCH(stream, gated_silu_backward, stream, dy, gate, up, dgate, dup);
}

}  // namespace deltapipe::kernels
