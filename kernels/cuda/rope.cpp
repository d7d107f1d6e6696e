// The contract of kernels/rope.h on CUDA.
#include "kernels/rope.h"

#include "kernels/cuda/launches.h"
#include "kernels/cuda/typed.h"

namespace deltapipe::kernels::cuda {

decltype(kernels::rope_forward) rope_forward;
decltype(kernels::rope_backward) rope_backward;

namespace {

void rotate(const Stream& stream, const Tensor& x, const Tensor& positions, const Tensor& inverse_frequencies,
            float attention_factor, float direction, const Tensor& out, const char* call) {
  for_type(x.dtype, call, [&]<class T>() {
    check(rope<T>(pointer<T>(x, call), positions.as<std::int32_t>(), floats(inverse_frequencies), attention_factor,
                  direction, pointer<T>(out, call), x.dim(0), to_int(x.dim(1), call), to_int(x.dim(2), call),
                  native(stream)),
          call);
  });
}

}  // namespace

void rope_forward(const Stream& stream, const Tensor& x, const Tensor& positions, const Tensor& inverse_frequencies,
                  float attention_factor, const Tensor& out) {
  rotate(stream, x, positions, inverse_frequencies, attention_factor, 1.0f, out, "rope_forward");
}

void rope_backward(const Stream& stream, const Tensor& dout, const Tensor& positions, const Tensor& inverse_frequencies,
                   float attention_factor, const Tensor& dx) {
  rotate(stream, dout, positions, inverse_frequencies, attention_factor, -1.0f, dx, "rope_backward");
}

}  // namespace deltapipe::kernels::cuda
