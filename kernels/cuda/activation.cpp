// The contract of kernels/activation.h on CUDA.
#include "kernels/activation.h"

#include "kernels/cuda/launches.h"
#include "kernels/cuda/typed.h"

namespace deltapipe::kernels::cuda {

decltype(kernels::squared_relu_forward) squared_relu_forward;
decltype(kernels::squared_relu_backward) squared_relu_backward;
decltype(kernels::gated_silu_forward) gated_silu_forward;
decltype(kernels::gated_silu_backward) gated_silu_backward;

void squared_relu_forward(const Stream& stream, const Tensor& x, const Tensor& y) {
  const char* call = "squared_relu_forward";
  for_type(x.dtype, call, [&]<class T>() {
    check(squared_relu_forward<T>(pointer<T>(x, call), pointer<T>(y, call), x.numel(), native(stream)), call);
  });
}

void squared_relu_backward(const Stream& stream, const Tensor& dy, const Tensor& x, const Tensor& dx) {
  const char* call = "squared_relu_backward";
  for_type(x.dtype, call, [&]<class T>() {
    check(squared_relu_backward<T>(pointer<T>(dy, call), pointer<T>(x, call), pointer<T>(dx, call), x.numel(),
                                   native(stream)),
          call);
  });
}

void gated_silu_forward(const Stream& stream, const Tensor& gate, const Tensor& up, const Tensor& y) {
  const char* call = "gated_silu_forward";
  for_type(gate.dtype, call, [&]<class T>() {
    check(gated_silu_forward<T>(pointer<T>(gate, call), pointer<T>(up, call), pointer<T>(y, call), gate.numel(),
                                native(stream)),
          call);
  });
}

void gated_silu_backward(const Stream& stream, const Tensor& dy, const Tensor& gate, const Tensor& up,
                         const Tensor& dgate, const Tensor& dup) {
  const char* call = "gated_silu_backward";
  for_type(gate.dtype, call, [&]<class T>() {
    check(gated_silu_backward<T>(pointer<T>(dy, call), pointer<T>(gate, call), pointer<T>(up, call),
                                 pointer<T>(dgate, call), pointer<T>(dup, call), gate.numel(), native(stream)),
          call);
  });
}

}  // namespace deltapipe::kernels::cuda
