// Arithmetic of distill_loss.cu on one row of logits: sums of exponentials and how they join, what they make of a
// logit, and the logarithm of a mixture.
#pragma once

#include "kernels/cuda/vector.cuh"

#include <cfloat>
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

/// The same without the unit for special functions, whose rate two exponentials of every logit would exceed: 2^n 2^f, f
/// in [-1/2, 1/2], interpolated at Chebyshev's nodes with a relative error of 2e-7. 2^-126 for what is less.
__device__ __forceinline__ float power_of_two_by_products(float x) {
  float at_least;
  asm("max.NaN.f32 %0, %1, 0fC2FC0000;" : "=f"(at_least) : "f"(x));
  constexpr float shift = 12582912.0f + 127.0f;  // 1.5 2^23: the sum's last bits are n + 127, a float's exponent
  const float n = at_least + shift, f = at_least - (n - shift);
  float y = fmaf(1.33908633e-3f, f, 9.67603177e-3f);
  y = fmaf(y, f, 5.55035695e-2f);
  y = fmaf(y, f, 0.240221068f);
  y = fmaf(y, f, 0.693147182f);
  y = fmaf(y, f, 1.00000012f);
  return y * __uint_as_float(__float_as_uint(n) << 23);
}

/// Scale factors of exponents: c at temperature T, log2(e) at 1.
template <Temperature kind>
struct Exponents {
  float c;
  // Logits below -1e30, as of classes that are ruled out, have no powers worth a reference; so it stays finite.
  // What a thread subtracts from exponents, whatever the compiler would fuse: sums are rescaled by differences of
  // these.
  __device__ __forceinline__ float reference(float from) const { return __fmul_rn(fmaxf(from, -1e30f), c); }
  __device__ __forceinline__ float reference_1(float from) const {
    return kind == Temperature::any ? __fmul_rn(fmaxf(from, -1e30f), log2_e)
                                    : (kind == Temperature::two ? 2.0f : 1.0f) * reference(from);
  }
  /// What sums of differences of logits are relative to, in units of which there are units_a_logit() in a logit.
  __device__ __forceinline__ float pivot(float from) const { return kind == Temperature::two ? reference(from) : from; }
  __device__ __forceinline__ float units_a_logit() const { return kind == Temperature::two ? c : 1.0f; }
  /// What sums relative to `from` are multiplied by to be relative to `to`.
  __device__ __forceinline__ float rescale(float from, float to) const {
    return from == to ? 1.0f : power_of_two(reference(from) - reference(to));
  }
  __device__ __forceinline__ float rescale_1(float from, float to) const {
    return from == to ? 1.0f : power_of_two(reference_1(from) - reference_1(to));
  }
};

// The largest of logits, in bfloat16 of those in even and in odd places; what is not a number is passed over.
template <class T>
using Largest = std::conditional_t<std::is_same_v<T, Bits>, __nv_bfloat162, float>;
__device__ __forceinline__ __nv_bfloat162 bits_pair(std::uint32_t x) { return reinterpret_cast<__nv_bfloat162&>(x); }
__device__ __forceinline__ void raise(__nv_bfloat162& largest, const Pack<Bits, 8>& p) {
  largest = __hmax2(__hmax2(largest, bits_pair(p.words[0])), bits_pair(p.words[1]));
  largest = __hmax2(__hmax2(largest, bits_pair(p.words[2])), bits_pair(p.words[3]));
}
__device__ __forceinline__ void raise(float& largest, const Pack<float, 4>& p) {
  float v[4];
  p.get(v);
#pragma unroll
  for (const float x : v) largest = fmaxf(largest, x);
}
__device__ __forceinline__ bool exceeds(const __nv_bfloat162& largest, const __nv_bfloat162& limit) {
  const __nv_bfloat162 both = __hmax2(largest, limit);
  return reinterpret_cast<const std::uint32_t&>(both) != reinterpret_cast<const std::uint32_t&>(limit);
}
__device__ __forceinline__ bool exceeds(float largest, float limit) { return largest > limit; }
/// Whether a pack holds x, which both halves of `wanted` are.
__device__ __forceinline__ bool holds(const Pack<Bits, 8>& p, const __nv_bfloat162& wanted) {
  std::uint32_t found = 0;
#pragma unroll
  for (const std::uint32_t w : p.words) found |= __heq2_mask(bits_pair(w), wanted);
  return found != 0;
}
__device__ __forceinline__ bool holds(const Pack<float, 4>&, float) { return true; }
template <class T>
__device__ __forceinline__ float largest_of(const Largest<T>& largest) {
  if constexpr (std::is_same_v<T, Bits>) {
    return fmaxf(__low2float(largest), __high2float(largest));
  } else {
    return largest;
  }
}
template <class T>
__device__ __forceinline__ Largest<T> as_largest(float x) {
  if constexpr (std::is_same_v<T, Bits>) {
    return __float2bfloat162_rn(x);
  } else {
    return x;
  }
}

/// A thread's sums over one model's logits z: 2^(z c - from c) at temperature T, and at 1. `from` is the largest logit
/// of the thread's first pack, or of a later one that would have made exponents grow above `most_exponent`.
template <class T>
struct Running {
  float from = -FLT_MAX;
  float at_t = 0, at_1 = 0;  // for Temperature::one at_1 is not used
  Largest<T> largest = as_largest<T>(-INFINITY), limit = as_largest<T>(-INFINITY);  // limit: from + most_exponent / c
};
/// An exponent's own rounding, 2^-25 of it, stays below the error of its power.
inline constexpr float most_exponent = 8;

template <class T, int models>
struct RunningRow {
  Running<T> of[models];  // student, teacher
  float difference = 0;   // the teacher's powers at T times (z_t - z_s), in units, less that of both `from`
};

/// One model's sums of several threads, relative to the largest logit. For Temperature::one both are the same.
template <class A>
struct Sums {
  A at_t, at_1;
  float largest;
  float label_logit;  // 0 where the label is another's
  int place;          // of the largest logit
};
template <class A, int models>
struct RowSums {
  Sums<A> of[models];
  A difference;  // as above, less that of both largest
};
template <int models>
__device__ __forceinline__ RowSums<double, models> no_sums() {
  RowSums<double, models> out;
#pragma unroll
  for (Sums<double>& s : out.of) s = {0, 0, -FLT_MAX, 0, INT_MAX};
  out.difference = 0;
  return out;
}

__device__ __forceinline__ int ordered(float x) {
  const int i = __float_as_int(x);
  return i < 0 ? i ^ 0x7fffffff : i;
}
/// Of a warp's numbers.
__device__ __forceinline__ float warp_largest(float x) {
  const int most = __reduce_max_sync(0xffffffffu, ordered(x));
  return __int_as_float(most < 0 ? most ^ 0x7fffffff : most);
}

/// A thread's sums to its warp's, but for places. `label_logits`: the thread's own, or 0.
template <class T, Temperature kind, int models>
__device__ __forceinline__ RowSums<float, models> merge_warp(const Exponents<kind>& e, const RunningRow<T, models>& r,
                                                             const float (&label_logits)[models]) {
  RowSums<float, models> out;
  float own[models];
#pragma unroll
  for (int m = 0; m < models; ++m) {
    out.of[m].largest = fmaxf(warp_largest(largest_of<T>(r.of[m].largest)), -FLT_MAX);
    own[m] = r.of[m].at_t * e.rescale(r.of[m].from, out.of[m].largest);
    out.of[m].at_t = warp_sum(own[m]);
    out.of[m].at_1 = kind == Temperature::one ? out.of[m].at_t
                                              : warp_sum(r.of[m].at_1 * e.rescale_1(r.of[m].from, out.of[m].largest));
    out.of[m].label_logit = warp_sum(label_logits[m]);
  }
  if constexpr (models == 2) {
    const float moved =
        (e.pivot(r.of[1].from) - e.pivot(r.of[0].from)) - (e.pivot(out.of[1].largest) - e.pivot(out.of[0].largest));
    out.difference = warp_sum(fmaf(r.difference, e.rescale(r.of[1].from, out.of[1].largest), own[1] * moved));
  }
  return out;
}

template <int models>
__device__ __forceinline__ RowSums<double, models> widened(const RowSums<float, models>& s) {
  RowSums<double, models> out;
#pragma unroll
  for (int m = 0; m < models; ++m) {
    out.of[m] = {static_cast<double>(s.of[m].at_t), static_cast<double>(s.of[m].at_1), s.of[m].largest,
                 s.of[m].label_logit, s.of[m].place};
  }
  out.difference = static_cast<double>(s.difference);
  return out;
}

/// Joins the entries of the first `width` lanes, in all of those; the other lanes' are empty.
template <Temperature kind, int models>
__device__ RowSums<double, models> merge_lanes(const Exponents<kind>& e, const RowSums<double, models>& r, int width) {
  RowSums<double, models> out = no_sums<models>();
  const auto sum = [width](auto x) {
    for (int offset = 1; offset < width; offset *= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
  };
  double own = 0, factor = 0;
#pragma unroll
  for (int m = 0; m < models; ++m) {
    out.of[m].largest = warp_largest(r.of[m].largest);
    out.of[m].place = __reduce_min_sync(0xffffffffu, r.of[m].largest == out.of[m].largest ? r.of[m].place : INT_MAX);
    factor = static_cast<double>(e.rescale(r.of[m].largest, out.of[m].largest));
    own = r.of[m].at_t * factor;
    out.of[m].at_t = sum(own);
    out.of[m].at_1 = kind == Temperature::one
                         ? out.of[m].at_t
                         : sum(r.of[m].at_1 * static_cast<double>(e.rescale_1(r.of[m].largest, out.of[m].largest)));
    out.of[m].label_logit = sum(r.of[m].label_logit);
  }
  if constexpr (models == 2) {  // own and factor are the teacher's
    const float moved = (e.pivot(r.of[1].largest) - e.pivot(r.of[0].largest)) -
                        (e.pivot(out.of[1].largest) - e.pivot(out.of[0].largest));
    out.difference = sum(fma(r.difference, factor, own * static_cast<double>(moved)));
  }
  return out;
}

/// What a row's logits of one model are turned into probabilities with: softmax(z / T) = factor 2^(z c - offset); at 1:
/// factor_1 2^(z log2(e) - offset_1), or factor_1 (2^(z c - offset))^2 at T = 2.
struct Normaliser {
  double log2_t, log2_1;  // log2 of the sum of exponentials at temperatures T and 1
  float offset, factor, offset_1, factor_1;
};

/// 2^x for the small x that a rounded exponent is off by: what is left out is x^2 / 4 < 2^-30.
__device__ __forceinline__ float power_near_one(double x) {
  return static_cast<float>(fma(x, 0.6931471805599453, 1.0));
}

/// In lanes 2 m and 2 m + 1 of a warp, which take a logarithm each; all its lanes call.
template <Temperature kind, int models>
__device__ Normaliser normalise(const Exponents<kind>& e, const RowSums<double, models>& r) {
  const bool at_1 = threadIdx.x % 2 == 1;
  const bool of_student = threadIdx.x % 32 < 2;
  const float largest = of_student ? r.of[0].largest : r.of[models - 1].largest;
  const double sum_t = of_student ? r.of[0].at_t : r.of[models - 1].at_t;
  const double sum_1 = of_student ? r.of[0].at_1 : r.of[models - 1].at_1;
  const double own =
      static_cast<double>(at_1 ? e.reference_1(largest) : e.reference(largest)) + log2(at_1 ? sum_1 : sum_t);
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
  return n;
}

template <class T>
__device__ __forceinline__ Pack<T, pack_width<T>> stored(const uint4* from) {
  const uint4 v = *from;
  return {{v.x, v.y, v.z, v.w}};
}

/// Adds a pack of each model. `margin`: `most_exponent` in units of logits.
template <class T, Temperature kind, int models>
__device__ __forceinline__ void accumulate(const Exponents<kind>& e, float margin,
                                           const Pack<T, pack_width<T>> (&packs)[models], RunningRow<T, models>& r) {
  constexpr int width = pack_width<T>;
  bool above = false;
#pragma unroll
  for (int m = 0; m < models; ++m) {
    raise(r.of[m].largest, packs[m]);
    above |= exceeds(r.of[m].largest, r.of[m].limit);
  }
  if (above) {
    float before = 0;
    if constexpr (models == 2) before = e.pivot(r.of[1].from) - e.pivot(r.of[0].from);
#pragma unroll
    for (int m = 0; m < models; ++m) {
      Running<T>& own = r.of[m];
      const float largest = largest_of<T>(own.largest), factor = e.rescale(own.from, largest);
      if (m == 1) r.difference *= factor;
      own.at_t *= factor;
      if (kind != Temperature::one) own.at_1 *= e.rescale_1(own.from, largest);
      own.from = largest;
      own.limit = as_largest<T>(largest + margin);
    }
    if constexpr (models == 2) {
      r.difference = fmaf(before - (e.pivot(r.of[1].from) - e.pivot(r.of[0].from)), r.of[1].at_t, r.difference);
    }
  }
  float z[models][width], reference[models], reference_1[models];
#pragma unroll
  for (int m = 0; m < models; ++m) {
    packs[m].get(z[m]);
    reference[m] = e.reference(r.of[m].from);
    reference_1[m] = e.reference_1(r.of[m].from);
  }
#pragma unroll
  for (int j = 0; j < width; ++j) {
    float exponent[models], x[models];
#pragma unroll
    for (int m = 0; m < models; ++m) {
      exponent[m] = fmaf(z[m][j], e.c, -reference[m]);
      x[m] = power_of_two(exponent[m]);
      r.of[m].at_t += x[m];
      if constexpr (kind == Temperature::two) r.of[m].at_1 = fmaf(x[m], x[m], r.of[m].at_1);
      if constexpr (kind == Temperature::any) {
        const float at_1 = fmaf(z[m][j], log2_e, -reference_1[m]);
        r.of[m].at_1 += j % 2 == 0 ? power_of_two(at_1) : power_of_two_by_products(at_1);
      }
    }
    if constexpr (models == 2) {
      // At T = 2 exponents stay finite whatever the logits, log2(e) / 2 being below 1; elsewhere they may overflow.
      const float difference =
          kind == Temperature::two ? exponent[1] - exponent[0] : (z[1][j] - z[0][j]) - (r.of[1].from - r.of[0].from);
      r.difference = fmaf(x[1], difference, r.difference);
    }
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
