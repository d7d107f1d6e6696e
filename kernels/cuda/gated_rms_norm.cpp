// The contract of kernels/gated_rms_norm.h on CUDA.
#include "kernels/gated_rms_norm.h"

#include "kernels/cuda/launches.h"
#include "kernels/cuda/typed.h"

namespace deltapipe::kernels::cuda {

decltype(kernels::gated_rms_norm_forward) gated_rms_norm_forward;
decltype(kernels::gated_rms_norm_backward) gated_rms_norm_backward;

void gated_rms_norm_forward(const Stream& stream, const Tensor& x, const Tensor& gate, const Tensor& w, float eps,
                            const Tensor& y, const Tensor& rstd) {
  const char* call = "gated_rms_norm_forward";
  for_type(x.dtype, call, [&]<class T>() {
    check(gated_rms_norm_forward<T>(pointer<T>(x, call), pointer<T>(gate, call), pointer<T>(w, call), eps,
                                    pointer<T>(y, call), floats(rstd), x.dim(0) * x.dim(1), to_int(x.dim(2), call),
                                    native(stream)),
          call);
  });
}

void gated_rms_norm_backward(const Stream& stream, const Tensor& dy, const Tensor& x, const Tensor& gate,
                             const Tensor& w, const Tensor& rstd, const Tensor& dx, const Tensor& dgate,
                             const Tensor& dw, Arena& workspace) {
  const char* call = "gated_rms_norm_backward";
  const std::int64_t rows = x.dim(0) * x.dim(1), channels = x.dim(2);
  const std::int64_t partial_rows = gated_rms_norm_partial_rows(rows);
  const auto scope = workspace.scope();
  const Tensor partials =
      dw ? workspace.allocate(DType::f32, {partial_rows, channels}, "gated norm weight gradient, partial") : Tensor();
  if (stream.is_dry()) return;
  for_type(x.dtype, call, [&]<class T>() {
    check(gated_rms_norm_backward<T>(pointer<T>(dy, call), pointer<T>(x, call), pointer<T>(gate, call),
                                     pointer<T>(w, call), floats(rstd), pointer<T>(dx, call), pointer<T>(dgate, call),
                                     floats(partials), rows, to_int(channels, call), native(stream)),
          call);
  });
  if (dw) check(add_column_sums(floats(partials), partial_rows, channels, floats(dw), native(stream)), call);
}

}  // namespace deltapipe::kernels::cuda
