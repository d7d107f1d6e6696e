// The contract of kernels/short_conv.h on CUDA.
#include "kernels/short_conv.h"

#include "kernels/cuda/launches.h"
#include "kernels/cuda/typed.h"

namespace deltapipe::kernels::cuda {

decltype(kernels::short_conv_forward) short_conv_forward;
decltype(kernels::short_conv_backward) short_conv_backward;

namespace {

ConvolutionShape shape_of(const Tensor& x, const Tensor& w) {
  return {x.dim(0), x.dim(1), x.dim(2), static_cast<int>(w.dim(1))};
}

}  // namespace

void short_conv_forward(const Stream& stream, const Tensor& x, const Tensor& w, const Tensor& halo, const Tensor& start,
                        const Tensor& y) {
  const char* call = "short_conv_forward";
  for_type(x.dtype, call, [&]<class T>() {
    check(short_conv_forward<T>(shape_of(x, w), pointer<T>(x, call), pointer<T>(w, call), pointer<T>(halo, call),
                                start.as<std::int32_t>(), pointer<T>(y, call), native(stream)),
          call);
  });
}

void short_conv_backward(const Stream& stream, const Tensor& dy, const Tensor& x, const Tensor& w, const Tensor& halo,
                         const Tensor& start, const Tensor& dx, const Tensor& dw, const Tensor& dhalo,
                         Arena& workspace) {
  const char* call = "short_conv_backward";
  const ConvolutionShape shape = shape_of(x, w);
  const std::int64_t partial_rows = short_conv_partial_rows(shape);
  const auto scope = workspace.scope();
  const Tensor partials =
      dw ? workspace.allocate(DType::f32, {partial_rows, dw.numel()}, "convolution weight gradient, partial")
         : Tensor();
  if (stream.is_dry()) return;
  for_type(x.dtype, call, [&]<class T>() {
    check(short_conv_backward<T>(shape, pointer<T>(dy, call), pointer<T>(x, call), pointer<T>(w, call),
                                 pointer<T>(halo, call), start.as<std::int32_t>(), pointer<T>(dx, call),
                                 pointer<T>(dhalo, call), floats(partials), native(stream)),
          call);
  });
  if (dw) check(add_column_sums(floats(partials), partial_rows, dw.numel(), floats(dw), native(stream)), call);
}

}  // namespace deltapipe::kernels::cuda
