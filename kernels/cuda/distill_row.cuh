// Arithmetic of distill_loss.cu on one row of logits: running sums of exponentials and how they join, normalisers, and
// the logarithm of a mixture.
#pragma once

#include "kernels/cuda/vector.cuh"

#include <climits>
#include <cmath>

namespace deltapipe::kernels::cuda {

inline constexpr float log2_e = 1.4426950408889634f;

/// Temperatures whose exponentials at 1 and T are powers of each other need one where others need two.
enum class Temperature { one, two, any };

__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Running sums over logits: 2^(z c - largest c) at temperature T, and at 1. For Temperature::one both are the same.
template <class A>
struct Running {
  float largest;
  A sum_t, sum_1;
  int place;  // of the largest logit
};
template <class A>
__device__ __forceinline__ Running<A> no_logits() {
  return {-INFINITY, 0, 0, INT_MAX};
}

/// Scale factors of exponents: c at temperature T, log2(e) at 1.
template <Temperature kind>
struct Exponents {
  float c;
  __device__ __forceinline__ float reference(float largest) const { return largest * c; }
  __device__ __forceinline__ float reference_1(float largest) const {
    return kind == Temperature::any ? largest * log2_e : kind == Temperature::two ? 2.0f * (largest * c) : largest * c;
  }
  /// What sums relative to `from` are multiplied by to be relative to `to` >= from.
  __device__ __forceinline__ float rescale(float from, float to) const {
    return from == to ? 1.0f : power_of_two(reference(from) - reference(to));
  }
  __device__ __forceinline__ float rescale_1(float from, float to) const {
    return from == to ? 1.0f : power_of_two(reference_1(from) - reference_1(to));
  }
};

template <Temperature kind>
__device__ Running<double> merge(const Exponents<kind>& e, const Running<double>& a, const Running<double>& b) {
  Running<double> out;
  out.largest = fmaxf(a.largest, b.largest);
  out.sum_t = a.sum_t * static_cast<double>(e.rescale(a.largest, out.largest)) +
              b.sum_t * static_cast<double>(e.rescale(b.largest, out.largest));
  out.sum_1 = a.sum_1 * static_cast<double>(e.rescale_1(a.largest, out.largest)) +
              b.sum_1 * static_cast<double>(e.rescale_1(b.largest, out.largest));
  out.place = a.largest > b.largest ? a.place : b.largest > a.largest ? b.place : min(a.place, b.place);
  return out;
}

/// Merges over `width` neighbouring lanes; every lane of a warp calls.
template <Temperature kind>
__device__ Running<double> merge_lanes(const Exponents<kind>& e, Running<double> r, int width) {
  for (int offset = 1; offset < width; offset *= 2) {
    Running<double> other;
    other.largest = __shfl_xor_sync(0xffffffffu, r.largest, offset);
    other.sum_t = __shfl_xor_sync(0xffffffffu, r.sum_t, offset);
    other.sum_1 = __shfl_xor_sync(0xffffffffu, r.sum_1, offset);
    other.place = __shfl_xor_sync(0xffffffffu, r.place, offset);
    r = merge(e, r, other);
  }
  return r;
}

__device__ __forceinline__ int ordered(float x) {
  const int i = __float_as_int(x);
  return i < 0 ? i ^ 0x7fffffff : i;
}

/// A thread's sums to its warp's.
template <Temperature kind>
__device__ __forceinline__ Running<double> merge_warp(const Exponents<kind>& e, const Running<float>& r) {
  Running<double> out;
  const int most = __reduce_max_sync(0xffffffffu, ordered(r.largest));
  out.largest = __int_as_float(most < 0 ? most ^ 0x7fffffff : most);
  out.place = __reduce_min_sync(0xffffffffu, r.largest == out.largest ? r.place : INT_MAX);
  out.sum_t = static_cast<double>(warp_sum(r.sum_t * e.rescale(r.largest, out.largest)));
  out.sum_1 = kind == Temperature::one ? out.sum_t
                                       : static_cast<double>(warp_sum(r.sum_1 * e.rescale_1(r.largest, out.largest)));
  return out;
}

/// What a row's logits of one model are turned into probabilities with.
struct Normaliser {
  double log2_t, log2_1;     // log2 of the sum of exponentials at temperatures T and 1
  float offset, factor;      // softmax(z / T) = factor 2^(z c - offset)
  float offset_1, factor_1;  // at 1: factor_1 2^(z log2(e) - offset_1), or factor_1 (2^(z c - offset))^2 at T = 2
  int argmax;
};

/// 2^x for the small x that a rounded exponent is off by: what is left out is x^2 / 4 < 2^-30.
__device__ __forceinline__ float power_near_one(double x) {
  return static_cast<float>(fma(x, 0.6931471805599453, 1.0));
}

/// The same in lanes 0 and 1 of a half warp, which take a logarithm each; all lanes hold r.
template <Temperature kind>
__device__ Normaliser normalise(const Exponents<kind>& e, const Running<double>& r) {
  const bool at_1 = threadIdx.x % 2 == 1;
  const double own =
      static_cast<double>(at_1 ? e.reference_1(r.largest) : e.reference(r.largest)) + log2(at_1 ? r.sum_1 : r.sum_t);
  const double other = __shfl_xor_sync(0xffffffffu, own, 1);
  Normaliser n;
  n.log2_t = at_1 ? other : own;
  n.log2_1 = at_1 ? own : other;
  n.offset = static_cast<float>(n.log2_t);
  n.factor = power_near_one(static_cast<double>(n.offset) - n.log2_t);
  n.offset_1 = static_cast<float>(n.log2_1);
  if constexpr (kind == Temperature::two) {
    const double x = 2 * static_cast<double>(n.offset) - n.log2_1, whole = rint(x);
    n.factor_1 = ldexpf(power_of_two(static_cast<float>(x - whole)), static_cast<int>(whole));
  } else {
    n.factor_1 = power_near_one(static_cast<double>(n.offset_1) - n.log2_1);
  }
  n.argmax = r.place;
  return n;
}

/// d = log(p / q) = (z_t - z_s) / T - shift; `lost` is what the float lacks.
struct Shift {
  float shift;
  double lost;
};

template <class T>
__device__ __forceinline__ Pack<T, pack_width<T>> stored(const uint4* from) {
  const uint4 v = *from;
  return {{v.x, v.y, v.z, v.w}};
}

template <class T>
__device__ __forceinline__ float largest_of(const Pack<T, pack_width<T>>& p) {
  if constexpr (std::is_same_v<T, Bits>) {
    const auto* h = reinterpret_cast<const __nv_bfloat162*>(p.words);
    const __nv_bfloat162 m = __hmax2(__hmax2(h[0], h[1]), __hmax2(h[2], h[3]));
    return fmaxf(__low2float(m), __high2float(m));
  } else {
    float v[pack_width<T>];
    p.get(v);
    return fmaxf(fmaxf(v[0], v[1]), fmaxf(v[2], v[3]));
  }
}

template <class T, Temperature kind>
__device__ __forceinline__ void accumulate(const Exponents<kind>& e, const Pack<T, pack_width<T>>& p, int slot,
                                           Running<float>& r) {
  const float most = largest_of<T>(p);
  if (most > r.largest) {
    r.sum_t *= e.rescale(r.largest, most);
    r.sum_1 *= e.rescale_1(r.largest, most);
    r.largest = most;
    r.place = slot;
  }
  const float reference = e.reference(r.largest), reference_1 = e.reference_1(r.largest);
  float z[pack_width<T>];
  p.get(z);
#pragma unroll
  for (int j = 0; j < pack_width<T>; ++j) {
    const float x = power_of_two(fmaf(z[j], e.c, -reference));
    r.sum_t += x;
    if constexpr (kind == Temperature::two) r.sum_1 = fmaf(x, x, r.sum_1);
    if constexpr (kind == Temperature::any) r.sum_1 += power_of_two(fmaf(z[j], log2_e, -reference_1));
  }
}

__device__ __forceinline__ float sign(float x) { return (x > 0.0f ? 1.0f : 0.0f) - (x < 0.0f ? 1.0f : 0.0f); }

/// log(q / m), m = beta p + (1 - beta) q, given d = log(p / q): -log(1 + beta (e^d - 1)).
struct Mixture {
  float beta;
  float k1, k2, k3, k4, k5;  // of the series in d: the cumulants of a toss with probability beta, over n!

  __device__ explicit Mixture(float b) : beta(b) {
    const float variance = b * (1.0f - b);
    k1 = b;
    k2 = variance / 2.0f;
    k3 = variance * (1.0f - 2.0f * b) / 6.0f;
    k4 = variance * (1.0f - 6.0f * variance) / 24.0f;
    k5 = variance * (1.0f - 2.0f * b) * (1.0f - 12.0f * variance) / 120.0f;
  }
  __device__ __forceinline__ float student_over(float d) const {
    // Near 0 relative to d: the first term left out is below 1.4e-6 of the result.
    const float near = -d * fmaf(fmaf(fmaf(fmaf(k5, d, k4), d, k3), d, k2), d, k1);
    // Else from the smaller of e^d and e^-d: the logarithm's argument lies between beta or 1 - beta and 1.
    const float power = power_of_two(fabsf(d) * -log2_e), larger = d >= 0.0f ? beta : 1.0f - beta;
    float log2_of;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log2_of) : "f"(fmaf(1.0f - larger, power, larger)));
    return fabsf(d) <= 0.25f ? near : -fmaf(log2_of, 1.0f / log2_e, fmaxf(d, 0.0f));
  }
};

}  // namespace deltapipe::kernels::cuda
