#include "kernels/rms_norm.h"

#include "kernels/cpu/common.h"

#include <vector>

namespace deltapipe::kernels::cpu {
namespace {

/// y = row / rms(row) * w; gives 1 / rms.
template <class T>
T normalise(const T* row, const T* w, float eps, std::int64_t d, T* y) {
  const T r = T(1) / std::sqrt(dot(row, row, d) / static_cast<T>(d) + static_cast<T>(eps));
  for (std::int64_t i = 0; i < d; ++i) y[i] = row[i] * r * w[i];
  return r;
}

}  // namespace

void rms_norm_forward(const Stream&, const Tensor& x, const Tensor& w, float eps, const Tensor& y, const Tensor& rstd) {
  for_real(x.dtype, "rms_norm_forward", [&]<class T>() {
    const std::int64_t rows = x.dim(0), d = x.dim(1);
    const T *px = x.as<T>(), *pw = w.as<T>();
    T *py = y.as<T>(), *pr = rstd.as<T>();
    parallel_blocks(rows, rows_per_task(4 * d), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t t = begin; t < end; ++t) pr[t] = normalise(px + t * d, pw, eps, d, py + t * d);
    });
  });
}

void add_rms_norm_forward(const Stream&, const Tensor& x, const Tensor& h, const Tensor& w, float eps,
                          const Tensor& sum, const Tensor& y, const Tensor& rstd) {
  for_real(x.dtype, "add_rms_norm_forward", [&]<class T>() {
    const std::int64_t rows = x.dim(0), d = x.dim(1);
    const T *px = x.as<T>(), *ph = h.as<T>(), *pw = w.as<T>();
    T *ps = sum.as<T>(), *py = y.as<T>(), *pr = rstd.as<T>();
    parallel_blocks(rows, rows_per_task(5 * d), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t t = begin; t < end; ++t) {
        const T *a = px + t * d, *b = ph + t * d;
        T* row = ps + t * d;
        for (std::int64_t i = 0; i < d; ++i) row[i] = a[i] + b[i];
        pr[t] = normalise(row, pw, eps, d, py + t * d);
      }
    });
  });
}

// With n = x * rstd: dx = rstd * (dy * w - n * mean(dy * w * n)); dw = sum over tokens of dy * n.
void rms_norm_backward(const Stream& stream, const Tensor& dy, const Tensor& x, const Tensor& w, const Tensor& rstd,
                       const Tensor& residual, const Tensor& dx, const Tensor& dw, Arena&) {
  if (stream.is_dry()) return;
  for_real(x.dtype, "rms_norm_backward", [&]<class T>() {
    const std::int64_t rows = x.dim(0), d = x.dim(1);
    const T *pdy = dy.as<T>(), *px = x.as<T>(), *pw = w.as<T>(), *pr = rstd.as<T>();
    const T* residuals = residual ? residual.as<T>() : nullptr;
    T* pdx = dx.as<T>();
    // dw first: dx may alias dy. Columns are split over tasks, so that each sum has one owner and one order.
    if (dw) {
      T* pdw = dw.as<T>();
      parallel_blocks(d, 64, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t t = 0; t < rows; ++t) {
          const T* g = pdy + t * d;
          const T* row = px + t * d;
          const T r = pr[t];
          for (std::int64_t i = begin; i < end; ++i) pdw[i] += g[i] * row[i] * r;
        }
      });
    }
    parallel_blocks(rows, rows_per_task(8 * d), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t t = begin; t < end; ++t) {
        const T* g = pdy + t * d;
        const T* row = px + t * d;
        T* out = pdx + t * d;
        const T r = pr[t];
        T mean = 0;
#pragma omp simd reduction(+ : mean)
        for (std::int64_t i = 0; i < d; ++i) mean += g[i] * pw[i] * row[i];
        const T c = mean * r * r / static_cast<T>(d);
        if (residuals == nullptr) {
          for (std::int64_t i = 0; i < d; ++i) out[i] = r * (g[i] * pw[i] - row[i] * c);
        } else {
          const T* rest = residuals + t * d;
          for (std::int64_t i = 0; i < d; ++i) out[i] = rest[i] + r * (g[i] * pw[i] - row[i] * c);
        }
      }
    });
  });
}

}  // namespace deltapipe::kernels::cpu
