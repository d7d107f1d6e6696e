#include "kernels/linear.h"

#include "kernels/cpu/common.h"
#include "kernels/cpu/gemm.h"

#include <algorithm>

namespace deltapipe::kernels::cpu {

void linear_forward(const Stream&, const Tensor& x, const Tensor& w, const Tensor& bias, const Tensor& y) {
  for_real(x.dtype, "linear_forward", [&]<class T>() {
    const std::int64_t m = x.dim(0), in = x.dim(1), out = w.dim(0), row = y.dim(1);
    T* py = y.as<T>();
    if (bias) {  // the product is added to rows that hold the bias
      const T* pb = bias.as<T>();
      parallel_blocks(m, rows_per_task(out), [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t t = begin; t < end; ++t) std::copy_n(pb, out, py + t * row);
      });
    }
    parallel_gemm<T>(Transpose::no, Transpose::yes, m, out, in, 1, x.as<T>(), in, w.as<T>(), in, bias ? 1 : 0, py, row);
  });
}

void linear_backward_input(const Stream& stream, const Tensor& dy, const Tensor& w, const Tensor& dx, bool accumulate,
                           Arena&) {
  if (stream.is_dry()) return;
  for_real(dy.dtype, "linear_backward_input", [&]<class T>() {
    const std::int64_t m = dy.dim(0), out = w.dim(0), row = dy.dim(1), in = w.dim(1);
    parallel_gemm<T>(Transpose::no, Transpose::no, m, in, out, 1, dy.as<T>(), row, w.as<T>(), in, accumulate ? 1 : 0,
                     dx.as<T>(), in);
  });
}

void linear_backward_weight(const Stream&, const Tensor& dy, const Tensor& x, const Tensor& dw, const Tensor& dbias) {
  for_real(dy.dtype, "linear_backward_weight", [&]<class T>() {
    const std::int64_t m = dy.dim(0), row = dy.dim(1), in = x.dim(1);
    const T* pdy = dy.as<T>();
    if (dw) {
      parallel_gemm<T>(Transpose::yes, Transpose::no, dw.dim(0), in, m, 1, pdy, row, x.as<T>(), in, 1, dw.as<T>(), in);
    }
    if (dbias) {
      // Columns are split over tasks, so that each sum has one owner and one order; in double, since m is large.
      T* pdb = dbias.as<T>();
      const std::int64_t out = dbias.dim(0);
      constexpr std::int64_t block = 64;
      parallel_blocks(out, block, [&](std::int64_t begin, std::int64_t end) {
        double sums[block] = {};
        const std::int64_t n = end - begin;
        for (std::int64_t t = 0; t < m; ++t) {
          const T* values = pdy + t * row + begin;
          for (std::int64_t i = 0; i < n; ++i) sums[i] += values[i];
        }
        for (std::int64_t i = 0; i < n; ++i) pdb[begin + i] = static_cast<T>(pdb[begin + i] + sums[i]);
      });
    }
  });
}

}  // namespace deltapipe::kernels::cpu
