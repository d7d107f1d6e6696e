// The contract of kernels/rms_norm.h on CUDA: rows of at most 16,384 bfloat16 or 8,192 float32.
#include "kernels/rms_norm.h"

#include "kernels/cuda/launches.h"
#include "kernels/cuda/typed.h"

namespace deltapipe::kernels::cuda {

decltype(kernels::rms_norm_forward) rms_norm_forward;
decltype(kernels::add_rms_norm_forward) add_rms_norm_forward;
decltype(kernels::rms_norm_backward) rms_norm_backward;

void rms_norm_forward(const Stream& stream, const Tensor& x, const Tensor& w, float eps, const Tensor& y,
                      const Tensor& rstd) {
  const char* call = "rms_norm_forward";
  for_type(x.dtype, call, [&]<class T>() {
    check_row<T>(x.dim(1), call);
    check(rms_norm_forward<T>(pointer<T>(x, call), nullptr, pointer<T>(w, call), eps, nullptr, pointer<T>(y, call),
                              floats(rstd), x.dim(0), x.dim(1), native(stream)),
          call);
  });
}

void add_rms_norm_forward(const Stream& stream, const Tensor& x, const Tensor& h, const Tensor& w, float eps,
                          const Tensor& sum, const Tensor& y, const Tensor& rstd) {
  const char* call = "add_rms_norm_forward";
  for_type(x.dtype, call, [&]<class T>() {
    check_row<T>(x.dim(1), call);
    check(rms_norm_forward<T>(pointer<T>(x, call), pointer<T>(h, call), pointer<T>(w, call), eps, pointer<T>(sum, call),
                              pointer<T>(y, call), floats(rstd), x.dim(0), x.dim(1), native(stream)),
          call);
  });
}

void rms_norm_backward(const Stream& stream, const Tensor& dy, const Tensor& x, const Tensor& w, const Tensor& rstd,
                       const Tensor& residual, const Tensor& dx, const Tensor& dw, Arena& workspace) {
  const char* call = "rms_norm_backward";
  const std::int64_t rows = x.dim(0), d = x.dim(1), partial_rows = rms_norm_partial_rows(rows);
  const auto scope = workspace.scope();
  const Tensor partials =
      dw ? workspace.allocate(DType::f32, {partial_rows, d}, "RMSNorm weight gradient, partial") : Tensor();
  if (stream.is_dry()) return;
  for_type(x.dtype, call, [&]<class T>() {
    check_row<T>(d, call);
    check(rms_norm_backward<T>(pointer<T>(dy, call), pointer<T>(x, call), pointer<T>(w, call), floats(rstd),
                               pointer<T>(residual, call), pointer<T>(dx, call), floats(partials), rows, d,
                               native(stream)),
          call);
  });
  if (dw) check(add_column_sums(floats(partials), partial_rows, d, floats(dw), native(stream)), call);
}

}  // namespace deltapipe::kernels::cuda
