// The contract of kernels/short_conv.h on CUDA.
#include "kernels/short_conv.h"

#include "kernels/cuda/launches.h"
#include "kernels/cuda/typed.h"

#include <array>

namespace deltapipe::kernels::cuda {

decltype(kernels::short_conv_forward) short_conv_forward;
decltype(kernels::short_conv_backward) short_conv_backward;

static_assert(sizeof(Convolutions<Convolution<float>>) == most_convolutions * sizeof(Convolution<float>));

namespace {

ConvolutionShape shape_of(const Tensor& x, const Tensor& w, std::size_t count) {
  return {x.dim(0), x.dim(1), x.dim(2), static_cast<int>(w.dim(1)), static_cast<int>(count)};
}

}  // namespace

void short_conv_forward(const Stream& stream, std::span<const ShortConv> convolutions, const Tensor& start) {
  const char* call = "short_conv_forward";
  const ShortConv& first = convolutions[0];
  for_type(first.x.dtype, call, [&]<class T>() {
    Convolutions<Convolution<T>> all{};
    for (std::size_t i = 0; i < convolutions.size(); ++i) {
      const ShortConv& c = convolutions[i];
      all.each[i] = {pointer<T>(c.x, call), pointer<T>(c.w, call), pointer<T>(c.halo, call), pointer<T>(c.y, call)};
    }
    check(short_conv_forward<T>(shape_of(first.x, first.w, convolutions.size()), all, start.as<std::int32_t>(),
                                native(stream)),
          call);
  });
}

void short_conv_backward(const Stream& stream, std::span<const ShortConvGradient> convolutions, const Tensor& start,
                         Arena& workspace) {
  const char* call = "short_conv_backward";
  const ShortConvGradient& first = convolutions[0];
  const ConvolutionShape shape = shape_of(first.x, first.w, convolutions.size());
  const std::int64_t partial_rows = short_conv_partial_rows(shape);
  const auto scope = workspace.scope();
  std::array<Tensor, most_convolutions> partials;
  for (std::size_t i = 0; i < convolutions.size(); ++i) {
    const Tensor& dw = convolutions[i].dw;
    if (!dw) continue;
    partials[i] = workspace.allocate(DType::f32, {partial_rows, dw.numel()}, "convolution weight gradient, partial");
  }
  if (stream.is_dry()) return;
  for_type(first.x.dtype, call, [&]<class T>() {
    Convolutions<ConvolutionGradient<T>> all{};
    for (std::size_t i = 0; i < convolutions.size(); ++i) {
      const ShortConvGradient& c = convolutions[i];
      all.each[i] = {pointer<T>(c.dy, call), pointer<T>(c.x, call),     pointer<T>(c.w, call), pointer<T>(c.halo, call),
                     pointer<T>(c.dx, call), pointer<T>(c.dhalo, call), floats(partials[i])};
    }
    check(short_conv_backward<T>(shape, all, start.as<std::int32_t>(), native(stream)), call);
  });
  for (std::size_t i = 0; i < convolutions.size(); ++i) {
    const Tensor& dw = convolutions[i].dw;
    if (dw) check(add_column_sums(floats(partials[i]), partial_rows, dw.numel(), floats(dw), native(stream)), call);
  }
}

}  // namespace deltapipe::kernels::cuda
