#include "kernels/hidden_loss.h"

#include "kernels/cpu/common.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace deltapipe::kernels::cpu {
namespace {

constexpr double smallest_norm = 1e-8;  // as in torch
// Rows are cut into at most this many tasks, whose sums lie on the stack until they are added in order.
constexpr std::int64_t most_tasks = 256;

struct RowSums {
  double st = 0, ss = 0, tt = 0, difference = 0;  // s . t, s . s, t . t, |s - t|^2
};

// In double: 1 - cos of close vectors is a difference of nearly equal numbers.
template <class T>
RowSums measure(const T* s, const T* t, std::int64_t d) {
  double st = 0, ss = 0, tt = 0, difference = 0;
#pragma omp simd reduction(+ : st, ss, tt, difference)
  for (std::int64_t i = 0; i < d; ++i) {
    const auto x = static_cast<double>(s[i]), y = static_cast<double>(t[i]);
    st += x * y;
    ss += x * x;
    tt += y * y;
    difference += (x - y) * (x - y);
  }
  return {st, ss, tt, difference};
}

}  // namespace

void hidden_loss(const Stream& stream, const Tensor& student, const Tensor& teacher, const Tensor& labels,
                 double cosine_scale, double mse_scale, const Tensor& d_student, const Tensor& sums, Arena&) {
  if (stream.is_dry()) return;
  for_real(student.dtype, "hidden_loss", [&]<class T>() {
    const std::int64_t rows = student.dim(0), d = student.dim(1);
    const T *ps = student.as<T>(), *pt = teacher.as<T>();
    T* pds = d_student ? d_student.as<T>() : nullptr;
    const auto* label = labels.as<std::int32_t>();
    const std::int64_t block = std::max(rows_per_task(8 * d), (rows + most_tasks - 1) / most_tasks);
    std::array<std::array<double, 2>, most_tasks> partial;
    parallel_blocks(rows, block, [&](std::int64_t begin, std::int64_t end) {
      double cosine_sum = 0, mse_sum = 0;
      for (std::int64_t r = begin; r < end; ++r) {
        if (label[r] < 0) continue;
        const T *s = ps + r * d, *t = pt + r * d;
        const RowSums row = measure(s, t, d);
        const double norm_s = std::sqrt(row.ss);
        const double n_s = std::max(norm_s, smallest_norm), n_t = std::max(std::sqrt(row.tt), smallest_norm);
        const double across = 1 / (n_s * n_t);
        const double cosine = row.st * across;
        cosine_sum += 1 - cosine;
        mse_sum += row.difference / static_cast<double>(d);
        if (!pds) continue;
        // With a = 1 / (|s| |t|) and b = cos / |s|^2 (0 where |s| is clamped), d(1 - cos)/ds = b s - a t
        // = a (s - t) + (b - a) s: no cancellation where s is close to t.
        const double along = norm_s > smallest_norm ? cosine / row.ss : 0.0;
        const auto c = static_cast<T>(cosine_scale * across + 2 * mse_scale / static_cast<double>(d));
        const auto e = static_cast<T>(cosine_scale * (along - across));
        T* ds = pds + r * d;
#pragma omp simd
        for (std::int64_t i = 0; i < d; ++i) ds[i] += c * (s[i] - t[i]) + e * s[i];
      }
      partial[static_cast<std::size_t>(begin / block)] = {cosine_sum, mse_sum};
    });
    auto* total = sums.as<double>();
    for (std::int64_t i = 0; i * block < rows; ++i) {
      total[0] += partial[static_cast<std::size_t>(i)][0];
      total[1] += partial[static_cast<std::size_t>(i)][1];
    }
  });
}

}  // namespace deltapipe::kernels::cpu
