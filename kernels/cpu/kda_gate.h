// KDA's gate on rows of channels, written so that the compiler vectorises it.
#pragma once

#include "kernels/cpu/vector_math.h"

#include <cmath>
#include <cstdint>

namespace deltapipe::kernels::cpu {

/// log(1 + y) for y in [0, 1], relative error below 2e-7 even for tiny y.
/// 2 atanh(s) with s = y / (2 + y) <= 1/3; the series' ninth term is under 2 (1/3)^18 / 19 = 3e-10 of the first.
inline float vlog1p_unit(float y) {
  const float s = y / (2.0f + y);
  const float z = s * s;
  float p = 1.0f / 17.0f;
  p = p * z + 1.0f / 15.0f;
  p = p * z + 1.0f / 13.0f;
  p = p * z + 1.0f / 11.0f;
  p = p * z + 1.0f / 9.0f;
  p = p * z + 1.0f / 7.0f;
  p = p * z + 1.0f / 5.0f;
  p = p * z + 1.0f / 3.0f;
  p = p * z + 1.0f;
  return 2.0f * s * p;
}
inline double vlog1p_unit(double y) { return std::log1p(y); }

/// A head's gate. Standard (bound == 0): g = -rate * softplus(x); bounded: g = bound * sigmoid(rate * x), with
/// x = f + dt_bias and rate = exp(a_log).
template <class T>
struct Gate {
  T rate;
  T bound;

  /// g [n] of one token.
  void forward(const T* f, const T* dt_bias, std::int64_t n, T* g) const {
    if (bound == T(0)) {
#pragma omp simd
      for (std::int64_t i = 0; i < n; ++i) {
        const T x = f[i] + dt_bias[i];
        g[i] = -rate * ((x > T(0) ? x : T(0)) + vlog1p_unit(vexp(-std::abs(x))));
      }
    } else {
#pragma omp simd
      for (std::int64_t i = 0; i < n; ++i) g[i] = rate * (f[i] + dt_bias[i]);
        // Only a loop of its own is vectorised.
#pragma omp simd
      for (std::int64_t i = 0; i < n; ++i) g[i] = bound * vsigmoid(g[i]);
    }
  }

  /// df [n] (overwritten) and ddt_bias [n] += df from dg [n]; returns this token's part of da_log.
  T backward(const T* dg, const T* f, const T* dt_bias, std::int64_t n, T* df, T* ddt_bias) const {
    T da = 0;
    if (bound == T(0)) {
#pragma omp simd reduction(+ : da)
      for (std::int64_t i = 0; i < n; ++i) {
        const T x = f[i] + dt_bias[i];
        const T y = vexp(-std::abs(x));
        const T sigmoid_x = (x >= T(0) ? T(1) : y) / (T(1) + y);
        const T d = -rate * sigmoid_x * dg[i];
        da += -rate * ((x > T(0) ? x : T(0)) + vlog1p_unit(y)) * dg[i];
        df[i] = d;
        ddt_bias[i] += d;
      }
    } else {
#pragma omp simd reduction(+ : da)
      for (std::int64_t i = 0; i < n; ++i) {
        const T x = f[i] + dt_bias[i];
        const T y = vexp(-std::abs(rate * x));
        const T d = bound * rate * (y / ((T(1) + y) * (T(1) + y))) * dg[i];
        da += d * x;
        df[i] = d;
        ddt_bias[i] += d;
      }
    }
    return da;
  }
};

}  // namespace deltapipe::kernels::cpu
