#include "kernels/gated_rms_norm.h"

#include "kernels/cpu/common.h"
#include "kernels/cpu/vector_math.h"

#include <algorithm>

namespace deltapipe::kernels::cpu {
namespace {

constexpr std::int64_t most_channels = 512;  // as the contract says
constexpr std::int64_t most_tasks = 32;      // each has a row of partial dw on the caller's stack (128 KiB in double)

}  // namespace

void gated_rms_norm_forward(const Stream&, const Tensor& x, const Tensor& gate, const Tensor& w, float eps,
                            const Tensor& y, const Tensor& rstd) {
  for_real(x.dtype, "gated_rms_norm_forward", [&]<class T>() {
    const std::int64_t v = x.dim(2), rows = x.dim(0) * x.dim(1);
    const T *px = x.as<T>(), *pg = gate.as<T>(), *pw = w.as<T>();
    T *py = y.as<T>(), *pr = rstd.as<T>();
    parallel_blocks(rows, rows_per_task(16 * v), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t t = begin; t < end; ++t) {
        const T *row = px + t * v, *g = pg + t * v;
        T* out = py + t * v;
        const T r = T(1) / std::sqrt(dot(row, row, v) / static_cast<T>(v) + static_cast<T>(eps));
        pr[t] = r;
#pragma omp simd
        for (std::int64_t i = 0; i < v; ++i) out[i] = row[i] * r * pw[i] * vsigmoid(g[i]);
      }
    });
  });
}

// With n = x * rstd and s = sigmoid(gate): dn = dy * w * s, dx = rstd * (dn - n * mean(dn * n)),
// dgate = dy * w * n * s * (1 - s), dw = sum over rows of dy * n * s.
void gated_rms_norm_backward(const Stream& stream, const Tensor& dy, const Tensor& x, const Tensor& gate,
                             const Tensor& w, const Tensor& rstd, const Tensor& dx, const Tensor& dgate,
                             const Tensor& dw, Arena&) {
  if (stream.is_dry()) return;
  for_real(x.dtype, "gated_rms_norm_backward", [&]<class T>() {
    const std::int64_t v = x.dim(2), rows = x.dim(0) * x.dim(1);
    if (rows == 0) return;
    const T *pdy = dy.as<T>(), *px = x.as<T>(), *pg = gate.as<T>(), *pw = w.as<T>(), *pr = rstd.as<T>();
    T *pdx = dx.as<T>(), *pdg = dgate.as<T>();
    T partial[most_tasks * most_channels];
    const std::int64_t block = std::max(rows_per_task(32 * v), (rows + most_tasks - 1) / most_tasks);
    const std::int64_t tasks = (rows + block - 1) / block;
    parallel_for(tasks, [&](std::int64_t task) {
      T* sums = partial + task * v;
      std::fill(sums, sums + v, T(0));
      T sig[most_channels];
      const std::int64_t end = std::min((task + 1) * block, rows);
      for (std::int64_t t = task * block; t < end; ++t) {
        const T *g = pdy + t * v, *row = px + t * v, *z = pg + t * v;
        const T r = pr[t];
        // A loop of its own: with the sums in it the compiler does not vectorise exp.
#pragma omp simd
        for (std::int64_t i = 0; i < v; ++i) sig[i] = vsigmoid(z[i]);
        T mean = 0;
#pragma omp simd reduction(+ : mean)
        for (std::int64_t i = 0; i < v; ++i) {
          const T weighted = g[i] * row[i] * r * sig[i];
          sums[i] += weighted;
          mean += weighted * pw[i];
        }
        mean /= static_cast<T>(v);
        T *out = pdx + t * v, *out_gate = pdg + t * v;
#pragma omp simd
        for (std::int64_t i = 0; i < v; ++i) {
          const T n = row[i] * r;
          const T dn = g[i] * pw[i] * sig[i];
          out_gate[i] = dn * n * (T(1) - sig[i]);
          out[i] = r * (dn - n * mean);
        }
      }
    });
    if (!dw) return;
    T* pdw = dw.as<T>();
    for (std::int64_t task = 1; task < tasks; ++task) axpy(T(1), partial + task * v, partial, v);
    axpy(T(1), partial, pdw, v);
  });
}

}  // namespace deltapipe::kernels::cpu
