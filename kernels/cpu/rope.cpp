#include "kernels/rope.h"

#include "kernels/cpu/common.h"

#include <algorithm>
#include <numbers>

namespace deltapipe::kernels::cpu {
namespace {

/// Sine and cosine within 2 ulp of 1, for |x| < 2^30; written so that loops over it vectorise. The quarter turns are
/// taken off in double, so that positions of millions keep full float accuracy; then the Taylor series on |r| <= pi/4,
/// whose remainders r^11 / 11! and r^10 / 10! are under 3e-8.
void sincos(float x, float& sine, float& cosine) {
  constexpr double shifter = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to the nearest integer
  const double turns = (static_cast<double>(x) * (2 / std::numbers::pi) + shifter) - shifter;
  const auto r = static_cast<float>(static_cast<double>(x) - turns * (std::numbers::pi / 2));
  const auto quarter = static_cast<std::int32_t>(turns);
  const float r2 = r * r;
  float s = 1.0f / 362880.0f;
  s = s * r2 - 1.0f / 5040.0f;
  s = s * r2 + 1.0f / 120.0f;
  s = s * r2 - 1.0f / 6.0f;
  s = s * r2 * r + r;
  float c = 1.0f / 40320.0f;
  c = c * r2 - 1.0f / 720.0f;
  c = c * r2 + 1.0f / 24.0f;
  c = c * r2 - 0.5f;
  c = c * r2 + 1.0f;
  const bool swap = (quarter & 1) != 0;
  const float a = swap ? c : s;
  const float b = swap ? s : c;
  sine = (quarter & 2) != 0 ? -a : a;
  cosine = ((quarter + 1) & 2) != 0 ? -b : b;
}
void sincos(double x, double& sine, double& cosine) {
  sine = std::sin(x);
  cosine = std::cos(x);
}

/// direction is 1 for the rotation, -1 for its transpose.
template <class T>
void rotate(const Tensor& x, const Tensor& positions, const Tensor& inverse_frequencies, float attention_factor,
            T direction, const Tensor& out) {
  const std::int64_t heads = x.dim(1), d = x.dim(2), half = d / 2;
  const T *px = x.as<T>(), *frequency = inverse_frequencies.as<T>();
  const auto* position = positions.as<std::int32_t>();
  T* po = out.as<T>();
  const T factor = static_cast<T>(attention_factor);
  parallel_blocks(x.dim(0), rows_per_task(4 * heads * d), [=](std::int64_t begin, std::int64_t end) {
    constexpr std::int64_t chunk = 64;  // frequencies whose sines and cosines serve all heads of a token
    T c[chunk], s[chunk];
    for (std::int64_t t = begin; t < end; ++t) {
      const T p = static_cast<T>(position[t]);
      for (std::int64_t first = 0; first < half; first += chunk) {
        const std::int64_t n = std::min(chunk, half - first);
        for (std::int64_t i = 0; i < n; ++i) {
          sincos(p * frequency[first + i], s[i], c[i]);
          s[i] *= factor * direction;
          c[i] *= factor;
        }
        for (std::int64_t h = 0; h < heads; ++h) {
          const std::int64_t offset = (t * heads + h) * d + first;
          const T *x1 = px + offset, *x2 = x1 + half;
          T *o1 = po + offset, *o2 = o1 + half;
          // simd although out may be x: both halves are read before either is written, and no other i is touched.
#pragma omp simd
          for (std::int64_t i = 0; i < n; ++i) {
            const T a = x1[i], b = x2[i];
            o1[i] = a * c[i] - b * s[i];
            o2[i] = b * c[i] + a * s[i];
          }
        }
      }
    }
  });
}

}  // namespace

void rope_forward(const Stream&, const Tensor& x, const Tensor& positions, const Tensor& inverse_frequencies,
                  float attention_factor, const Tensor& out) {
  for_real(x.dtype, "rope_forward",
           [&]<class T>() { rotate<T>(x, positions, inverse_frequencies, attention_factor, T(1), out); });
}

void rope_backward(const Stream&, const Tensor& dout, const Tensor& positions, const Tensor& inverse_frequencies,
                   float attention_factor, const Tensor& dx) {
  for_real(dout.dtype, "rope_backward",
           [&]<class T>() { rotate<T>(dout, positions, inverse_frequencies, attention_factor, T(-1), dx); });
}

}  // namespace deltapipe::kernels::cpu
