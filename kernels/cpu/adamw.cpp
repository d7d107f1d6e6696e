#include "kernels/adamw.h"

#include "core/random.h"
#include "kernels/cpu/common.h"

#include <array>
#include <bit>
#include <cmath>
#include <type_traits>

namespace deltapipe::kernels::cpu {
namespace {

template <class P, class T>
P rounded(T x) {
  if constexpr (std::is_same_v<P, BFloat16>) {
    return to_bfloat16(static_cast<float>(x));
  } else {
    return static_cast<P>(x);
  }
}

/// What an update multiplies with, prepared in double.
template <class T>
struct Constants {
  explicit Constants(const AdamWStep& s)
      : scale(static_cast<T>(s.gradient_scale)),
        beta1(static_cast<T>(s.beta1)),
        rest1(static_cast<T>(1 - s.beta1)),
        beta2(static_cast<T>(s.beta2)),
        rest2(static_cast<T>(1 - s.beta2)),
        keep(static_cast<T>(1 - s.learning_rate * s.weight_decay)),
        rate(static_cast<T>(s.learning_rate / (1 - std::pow(s.beta1, static_cast<double>(s.step))))),
        correction(static_cast<T>(1 / std::sqrt(1 - std::pow(s.beta2, static_cast<double>(s.step))))),
        epsilon(static_cast<T>(s.epsilon)) {}
  T scale, beta1, rest1, beta2, rest2, keep, rate, correction, epsilon;
};

constexpr std::int64_t block = 1 << 14;  // elements a task: a few hundred kB of traffic hides its start

template <class T, class P>
void update(const AdamWStep& step, const Tensor& master, const Tensor& gradient, const Tensor& exp_avg,
            const Tensor& exp_avg_sq, const Tensor& param) {
  T *w = master.as<T>(), *m = exp_avg.as<T>(), *v = exp_avg_sq.as<T>();
  const T* g = gradient.as<T>();
  P* out = param.as<P>();
  const Constants<T> c(step);
  parallel_blocks(master.dim(0), block, [&](std::int64_t begin, std::int64_t end) {
#pragma omp simd
    for (std::int64_t i = begin; i < end; ++i) {
      const T x = c.scale * g[i];
      const T first = c.beta1 * m[i] + c.rest1 * x;
      const T second = c.beta2 * v[i] + c.rest2 * x * x;
      m[i] = first;
      v[i] = second;
      const T next = c.keep * w[i] - c.rate * first / (std::sqrt(second) * c.correction + c.epsilon);
      w[i] = next;
      out[i] = rounded<P>(next);
    }
  });
}

/// `random` in [0, 2^16) is added below the bits that stay.
BFloat16 round_stochastically(float x, std::uint32_t random) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return to_bfloat16(x);  // NaN
  return {static_cast<std::uint16_t>((bits + random) >> 16)};
}

}  // namespace

void adamw(const Stream&, const AdamWStep& step, const Tensor& master, const Tensor& gradient, const Tensor& exp_avg,
           const Tensor& exp_avg_sq, const Tensor& param) {
  for_real(master.dtype, "adamw", [&]<class T>() {
    switch (param.dtype) {
      case DType::f32: return update<T, float>(step, master, gradient, exp_avg, exp_avg_sq, param);
      case DType::f64: return update<T, double>(step, master, gradient, exp_avg, exp_avg_sq, param);
      default: return update<T, BFloat16>(step, master, gradient, exp_avg, exp_avg_sq, param);
    }
  });
}

void adamw_bfloat16(const Stream&, const AdamWStep& step, const StochasticRounding& rounding, const Tensor& weights,
                    const Tensor& gradient, const Tensor& exp_avg, const Tensor& exp_avg_sq) {
  auto *w = weights.as<BFloat16>(), *m = exp_avg.as<BFloat16>(), *v = exp_avg_sq.as<BFloat16>();
  const float* g = gradient.as<float>();
  const Constants<float> c(step);
  const std::uint64_t random_stream = rounding.stream + 0x9E3779B97F4A7C15u * static_cast<std::uint64_t>(step.step);
  const auto offset = static_cast<std::uint64_t>(rounding.offset);
  parallel_blocks(weights.dim(0), block, [&](std::int64_t begin, std::int64_t end) {
    std::array<std::uint32_t, 4> random{};
    for (std::int64_t i = begin; i < end; ++i) {
      const std::uint64_t element = offset + static_cast<std::uint64_t>(i);
      const std::size_t half = 2 * (element % 2);
      if (half == 0 || i == begin) random = philox(rounding.seed, random_stream, element / 2);
      const float x = c.scale * g[i];
      const float first = std::fma(c.beta1, to_float(m[i]), c.rest1 * x);
      const float second = std::fma(c.beta2, to_float(v[i]), c.rest2 * x * x);
      const float step_size = c.rate * first / std::fma(std::sqrt(second), c.correction, c.epsilon);
      const float next = std::fma(c.keep, to_float(w[i]), -step_size);
      w[i] = round_stochastically(next, random[half] & 0xffffu);
      m[i] = round_stochastically(first, random[half] >> 16);
      v[i] = round_stochastically(second, random[half + 1] & 0xffffu);
    }
  });
}

}  // namespace deltapipe::kernels::cpu
