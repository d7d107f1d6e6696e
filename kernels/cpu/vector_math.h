// exp and functions made of it, written so that the compiler vectorises loops over them: the C library's expf is a
// call per element. float only; double goes to the C library, since it serves tests alone.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace deltapipe::kernels::cpu {

/// e^x, within 2 ulp; 0 below -87.33 (instead of subnormals) and +inf above 88.72; NaN stays NaN.
/// Cody-Waite reduction by n ln 2, then the Taylor polynomial of degree 7 on |r| <= ln(2) / 2, whose remainder
/// r^8 / 8! is under 6e-9.
inline float vexp(float x) {
  constexpr float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  // At 89, n is 128 and p > 1: the product below overflows to +inf by itself. NaN passes both comparisons.
  const float clamped = x > 89.0f ? 89.0f : (x < -87.33f ? -87.33f : x);
  const float n = (clamped * 1.44269504f + shifter) - shifter;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 = 0.693359375 - 2.12194440e-4
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^n as a product of two halves: n = 128 and n = -127 have no normal float of their own.
  const auto e = static_cast<std::int32_t>(n);
  const std::int32_t half = e >> 1;
  const float y = p * std::bit_cast<float>((half + 127) << 23) * std::bit_cast<float>((e - half + 127) << 23);
  return x < -87.33f ? 0.0f : y;
}
inline double vexp(double x) { return std::exp(x); }

template <class T>
T vsigmoid(T x) {
  return T(1) / (T(1) + vexp(-x));
}

/// x * sigmoid(x)
template <class T>
T vsilu(T x) {
  return x * vsigmoid(x);
}
/// Derivative of x * sigmoid(x).
template <class T>
T vsilu_derivative(T x) {
  const T s = vsigmoid(x);
  return s * (T(1) + x * (T(1) - s));
}

}  // namespace deltapipe::kernels::cpu
