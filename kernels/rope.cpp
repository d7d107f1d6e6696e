#include "kernels/rope.h"

#include "kernels/dispatch.h"

namespace deltapipe::kernels {

DELTAPIPE_KERNEL(rope_forward)
DELTAPIPE_KERNEL(rope_backward)

namespace {

void check_rope(const Tensor& x, const Tensor& positions, const Tensor& inverse_frequencies, const Tensor& out) {
  require(x.shape.rank() == 3 && x.dim(2) % 2 == 0, "rope: the input is not [T, H, d] with an even d");
  check_tensor(positions, {x.dim(0)}, DType::i32, "rope: positions");
  check_tensor(inverse_frequencies, {x.dim(2) / 2}, accumulation_dtype(x.dtype), "rope: inverse_frequencies");
  check_tensor(out, x.shape, x.dtype, "rope: the output");
}

}  // namespace

void rope_forward(const Stream& stream, const Tensor& x, const Tensor& positions, const Tensor& inverse_frequencies,
                  float attention_factor, const Tensor& out) {
  check_rope(x, positions, inverse_frequencies, out);
  DELTAPIPE_DISPATCH(stream, rope_forward, stream, x, positions, inverse_frequencies, attention_factor, out);
}

void rope_backward(const Stream& stream, const Tensor& dout, const Tensor& positions, const Tensor& inverse_frequencies,
                   float attention_factor, const Tensor& dx) {
  check_rope(dout, positions, inverse_frequencies, dx);
  DELTAPIPE_DISPATCH(stream, rope_backward, stream, dout, positions, inverse_frequencies, attention_factor, dx);
}

}  // namespace deltapipe::kernels
