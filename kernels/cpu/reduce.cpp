#include "kernels/reduce.h"

#include "kernels/cpu/common.h"

#include <algorithm>

namespace deltapipe::kernels::cpu {
namespace {

/// Sixteen running sums, spelled out, so that the order of additions is the same wherever x lies in memory.
template <class T>
double squares(const T* x, std::int64_t n) {
  constexpr std::int64_t lanes = 16;
  double sums[lanes] = {};
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    for (std::int64_t j = 0; j < lanes; ++j) {
      const double v = x[i + j];
      sums[j] += v * v;
    }
  }
  for (std::int64_t j = 0; i < n; ++i, ++j) {
    const double v = x[i];
    sums[j] += v * v;
  }
  double total = 0;
  for (const double s : sums) total += s;
  return total;
}

}  // namespace

void sum_of_squares(const Stream& stream, const Tensor& x, const Tensor& out, Arena&) {
  if (stream.is_dry()) return;
  for_real(x.dtype, "sum_of_squares", [&]<class T>() {
    constexpr std::int64_t most_blocks = 256;
    constexpr std::int64_t smallest_block = 1 << 14;  // elements: enough work to hide the start of a task
    const std::int64_t n = x.numel();
    const std::int64_t block = std::max(smallest_block, (n + most_blocks - 1) / most_blocks);
    double partial[most_blocks] = {};
    const T* px = x.as<T>();
    parallel_blocks(n, block, [&](std::int64_t begin, std::int64_t end) {
      partial[begin / block] = squares(px + begin, end - begin);
    });
    double total = 0;
    for (const double p : partial) total += p;
    *out.as<double>() += total;
  });
}

}  // namespace deltapipe::kernels::cpu
