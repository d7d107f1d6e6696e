#include "kernels/adamw.h"

#include "kernels/cpu/common.h"

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

template <class T, class P>
void update(const AdamWStep& step, const Tensor& master, const Tensor& gradient, const Tensor& exp_avg,
            const Tensor& exp_avg_sq, const Tensor& param) {
  T *w = master.as<T>(), *m = exp_avg.as<T>(), *v = exp_avg_sq.as<T>();
  const T* g = gradient.as<T>();
  P* out = param.as<P>();
  const auto n = static_cast<double>(step.step);
  const auto scale = static_cast<T>(step.gradient_scale);
  const auto beta1 = static_cast<T>(step.beta1), rest1 = static_cast<T>(1 - step.beta1);
  const auto beta2 = static_cast<T>(step.beta2), rest2 = static_cast<T>(1 - step.beta2);
  const auto keep = static_cast<T>(1 - step.learning_rate * step.weight_decay);
  const auto rate = static_cast<T>(step.learning_rate / (1 - std::pow(step.beta1, n)));
  const auto correction = static_cast<T>(1 / std::sqrt(1 - std::pow(step.beta2, n)));
  const auto epsilon = static_cast<T>(step.epsilon);
  constexpr std::int64_t block = 1 << 14;  // elements a task: a few hundred kB of traffic hides its start
  parallel_blocks(master.dim(0), block, [&](std::int64_t begin, std::int64_t end) {
#pragma omp simd
    for (std::int64_t i = begin; i < end; ++i) {
      const T x = scale * g[i];
      const T first = beta1 * m[i] + rest1 * x;
      const T second = beta2 * v[i] + rest2 * x * x;
      m[i] = first;
      v[i] = second;
      const T next = keep * w[i] - rate * first / (std::sqrt(second) * correction + epsilon);
      w[i] = next;
      out[i] = rounded<P>(next);
    }
  });
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

}  // namespace deltapipe::kernels::cpu
