// One cluster of eight blocks a row of logits. Each block keeps its part of both models' logits in shared memory from
// the first read to the last use, so device memory is read once and written once:
//   1. largest logit, its place and sums of exponentials, running, of every thread; combined over threads, blocks, and
//      through distributed shared memory the cluster;
//   2. probabilities from the normalisers: divergences, and the gradient where it needs no sum over the row;
//   3. with reverse_kl, jsd or tvd: their sums combined over the cluster, then the gradient.
// A thread's own terms are added in float (N / 4096 of them), everything else in double.
//
// Exponentials are powers of two of fma(z, log2(e) / T, -normaliser). What the float normaliser loses of the double one
// is the same factor for the whole row and goes into the constants of the terms.
#include "kernels/cuda/launches.h"
#include "kernels/cuda/vector.cuh"

#include <cooperative_groups.h>

#include <cfloat>
#include <cmath>

namespace deltapipe::kernels::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr int cluster_blocks = 8;  // the most that every Hopper GPU runs
constexpr int threads = 512, warps = threads / 32;
constexpr int most_slots = 13;  // packs of a thread and model: 16 kB of shared memory for both models each
constexpr int in_flight = 4;    // slots

constexpr float log2_e = 1.4426950408889634f;

/// Places of a row's sums, as LossSum in kernels/distill_loss.h.
enum Sum : int { ce, kl, reverse_kl, jsd, tvd, top1_agree, student_correct, teacher_correct, teacher_ce, tokens, sums };

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

template <Temperature kind>
__device__ Normaliser normalise(const Exponents<kind>& e, const Running<double>& r) {
  Normaliser n;
  n.log2_t = static_cast<double>(e.reference(r.largest)) + log2(r.sum_t);
  n.log2_1 = static_cast<double>(e.reference_1(r.largest)) + log2(r.sum_1);
  n.offset = static_cast<float>(n.log2_t);
  n.factor = static_cast<float>(exp2(static_cast<double>(n.offset) - n.log2_t));
  n.offset_1 = static_cast<float>(n.log2_1);
  n.factor_1 = kind == Temperature::two ? static_cast<float>(exp2(2 * static_cast<double>(n.offset) - n.log2_1))
                                        : static_cast<float>(exp2(static_cast<double>(n.offset_1) - n.log2_1));
  n.argmax = r.place;
  return n;
}

/// The part of a row that a block holds. Packs are counted from the 16-byte boundary at or before the row's first
/// element, `lead` elements earlier, so that whole packs can be moved at once whatever the row's length.
template <class T>
struct Part {
  static constexpr int width = pack_width<T>;
  T* student;
  const T* teacher;
  int n, lead;
  bool vectors;  // both rows begin at the same distance from a boundary
  int first, last;

  __device__ Part(T* s, const T* t, int n_, int block) : student(s), teacher(t), n(n_) {
    lead = static_cast<int>(reinterpret_cast<std::uintptr_t>(s) % 16 / sizeof(T));
    vectors = t == nullptr || reinterpret_cast<std::uintptr_t>(t) % 16 == reinterpret_cast<std::uintptr_t>(s) % 16;
    const int packs = (n + lead + width - 1) / width, each = (packs + cluster_blocks - 1) / cluster_blocks;
    first = block * each + static_cast<int>(threadIdx.x);
    last = min((block + 1) * each, packs);
  }
  __device__ __forceinline__ bool has(int slot) const { return first + slot * threads < last; }
  __device__ __forceinline__ int element(int slot) const { return (first + slot * threads) * width - lead; }
  __device__ __forceinline__ bool whole(int slot) const {
    return vectors && element(slot) >= 0 && element(slot) + width <= n;
  }
};

/// Starts to copy a pack of `row` to shared memory. Elements outside the row become the lowest finite number: their
/// probability is 0 on both sides, and their difference too.
template <class T>
__device__ __forceinline__ void fetch(const Part<T>& part, const T* row, int slot, uint4* to) {
  const int at = part.element(slot);
  if (part.whole(slot)) {
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(to))),
        "l"(row + at)
        : "memory");
    return;
  }
  T v[Part<T>::width];
#pragma unroll
  for (int j = 0; j < Part<T>::width; ++j) {
    if (at + j >= 0 && at + j < part.n) {
      v[j] = row[at + j];
    } else if constexpr (std::is_same_v<T, Bits>) {
      v[j] = 0xff7f;
    } else {
      v[j] = -FLT_MAX;
    }
  }
  if constexpr (std::is_same_v<T, Bits>) {
    *to = make_uint4(v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16);
  } else {
    *to = make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
  }
}

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

/// (e^-d - 1 + d) / d^2 for |d| <= 1/2; the first term left out is below 8e-7 of the result.
__device__ __forceinline__ float second_order(float d) {
  float s = -1.0f / 5040.0f;
  s = fmaf(s, d, 1.0f / 720.0f);
  s = fmaf(s, d, -1.0f / 120.0f);
  s = fmaf(s, d, 1.0f / 24.0f);
  s = fmaf(s, d, -1.0f / 6.0f);
  return fmaf(s, d, 0.5f);
}

/// p log(p / q) - p + q >= 0, given d = log(p / q).
__device__ __forceinline__ float kl_term(float p, float q, float d) {
  return fabsf(d) <= 0.5f ? p * (d * d * second_order(d)) : fmaf(p, d - 1.0f, q);
}

__device__ __forceinline__ float sign(float x) { return (x > 0.0f ? 1.0f : 0.0f) - (x < 0.0f ? 1.0f : 0.0f); }

/// log(p / m) and log(q / m), m = beta p + (1 - beta) q, given d = log(p / q).
__device__ __forceinline__ void log_over_mixture(float d, float beta, float& p_over_m, float& q_over_m) {
  // m over the larger of p and q is 1 + weight (e^-|d| - 1), never near 0.
  const float larger = -log1pf((d >= 0.0f ? 1.0f - beta : beta) * expm1f(-fabsf(d)));
  p_over_m = d >= 0.0f ? larger : larger + d;
  q_over_m = d >= 0.0f ? larger - d : larger;
}

/// A block's sums over its part, without the factor T^2.
enum Measure : int { m_kl, m_reverse_kl, m_jsd, m_student_to_mixture, m_tvd, m_mean_sign, measures };

struct Shared {
  Running<double> warp[2][warps];
  Running<double> block[2];  // read by the whole cluster
  Normaliser normaliser[2];
  float warp_measures[warps][measures];
  double block_measures[measures];  // read by the whole cluster
  double row_measures[measures];
};

/// Sum of every thread's `v` over the cluster, into shared.row_measures of every block.
template <int n>
__device__ void cluster_sum(cg::cluster_group& cluster, Shared& shared, float (&v)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    v[i] = warp_sum(v[i]);
    if (threadIdx.x % 32 == 0) shared.warp_measures[threadIdx.x / 32][i] = v[i];
  }
  __syncthreads();
  if (threadIdx.x < n) {
    double sum = 0;
    for (int w = 0; w < warps; ++w) sum += static_cast<double>(shared.warp_measures[w][threadIdx.x]);
    shared.block_measures[threadIdx.x] = sum;
  }
  cluster.sync();
  if (threadIdx.x < n) {
    double sum = 0;
    for (int b = 0; b < cluster_blocks; ++b) sum += cluster.map_shared_rank(&shared, b)->block_measures[threadIdx.x];
    shared.row_measures[threadIdx.x] = sum;
  }
  __syncthreads();
}

/// `more`: reverse_kl, jsd or tvd have a weight.
template <class T, Temperature kind, bool with_teacher, bool more>
__global__ void __cluster_dims__(cluster_blocks, 1, 1) __launch_bounds__(threads, more ? 1 : 2)
    row_loss(DistillConstants c, T* student_logits, const T* teacher_logits, const std::int32_t* labels,
             double* row_sums, int n, int slots) {
  constexpr int width = pack_width<T>, models = with_teacher ? 2 : 1;
  extern __shared__ uint4 stash[];  // [slots, models, threads]
  __shared__ Shared shared;
  cg::cluster_group cluster = cg::this_cluster();
  const int block = static_cast<int>(cluster.block_rank()), thread = static_cast<int>(threadIdx.x);
  const std::int64_t row = blockIdx.x / cluster_blocks;
  const int label = labels[row];
  const Part<T> part(student_logits + row * n, with_teacher ? teacher_logits + row * n : nullptr, n, block);
  double* out = row_sums + row * sums;

  if (label < 0) {  // masked: the same in every block of the cluster
    if (block == 0 && thread < sums) out[thread] = 0;
    if (!c.write_gradient) return;
    for (int slot = 0; part.has(slot); ++slot) {
      const int at = part.element(slot);
      if (part.whole(slot)) {
        *reinterpret_cast<uint4*>(part.student + at) = make_uint4(0, 0, 0, 0);
      } else {
        for (int j = max(at, 0); j < min(at + width, n); ++j) part.student[j] = T(0);
      }
    }
    return;
  }

  const auto place = [&](int slot, int model) { return stash + (slot * models + model) * threads + thread; };
  const auto fetch_slot = [&](int slot) {
    if (part.has(slot)) {
      fetch(part, part.student, slot, place(slot, 0));
      if constexpr (with_teacher) fetch(part, part.teacher, slot, place(slot, 1));
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
#pragma unroll
  for (int slot = 0; slot < in_flight; ++slot) fetch_slot(slot);
  // Read before any block may overwrite it.
  double label_logit[2] = {0, 0};
  if (block == 0 && thread == 0 && label < n) {
    label_logit[0] = static_cast<double>(to_compute(part.student[label]));
    if constexpr (with_teacher) label_logit[1] = static_cast<double>(to_compute(part.teacher[label]));
  }

  const Exponents<kind> e{c.inverse_temperature * log2_e};
  Running<float> running[models];
#pragma unroll
  for (auto& r : running) r = no_logits<float>();
  for (int slot = 0; slot < slots; ++slot) {
    asm volatile("cp.async.wait_group %0;" ::"n"(in_flight - 1) : "memory");
    if (part.has(slot)) {
#pragma unroll
      for (int m = 0; m < models; ++m) accumulate<T, kind>(e, stored<T>(place(slot, m)), slot, running[m]);
    }
    fetch_slot(slot + in_flight);
  }
#pragma unroll
  for (int m = 0; m < models; ++m) {
    // From the slot of a thread's largest logit to its place in the row.
    if (running[m].place != INT_MAX) {
      float z[width];
      const int slot = running[m].place;
      stored<T>(place(slot, m)).get(z);
      int lane = 0;
#pragma unroll
      for (int j = width - 1; j >= 0; --j) {
        if (z[j] == running[m].largest) lane = j;
      }
      running[m].place = part.element(slot) + lane;
    }
    const Running<double> merged = merge_warp(e, running[m]);
    if (thread % 32 == 0) shared.warp[m][thread / 32] = merged;
  }
  __syncthreads();
  const int lane_model = thread / 16;  // of the first warp: half a warp a model
  if (thread < 32) {
    Running<double> r = no_logits<double>();
    if (lane_model < models) r = shared.warp[lane_model][thread % 16];
    r = merge_lanes(e, r, 16);
    if (thread % 16 == 0 && lane_model < models) shared.block[lane_model] = r;
  }
  cluster.sync();
  if (thread < 32) {
    Running<double> r = no_logits<double>();
    if (lane_model < models && thread % 16 < cluster_blocks) {
      r = cluster.map_shared_rank(&shared, thread % 16)->block[lane_model];
    }
    r = merge_lanes(e, r, 16);
    if (thread % 16 == 0 && lane_model < models) shared.normaliser[lane_model] = normalise(e, r);
  }
  __syncthreads();

  const Normaliser& student = shared.normaliser[0];
  const float offset_s = student.offset, offset_1 = student.offset_1;
  // Temperature::one and ::two take the softmax at 1 from the one at T.
  const auto softmax_1 = [&](float z, float power) {
    if constexpr (kind == Temperature::one) return power;
    if constexpr (kind == Temperature::two) return power * power;
    return power_of_two(fmaf(z, log2_e, -offset_1));
  };
  const float ce_factor = c.ce * (kind == Temperature::one ? student.factor : student.factor_1);
  const auto write = [&](int slot, float(&g)[width]) {
    const int at = part.element(slot);
    if (label >= at && label < at + width) {
#pragma unroll
      for (int j = 0; j < width; ++j) g[j] -= at + j == label ? c.ce : 0.0f;
    }
    Pack<T, width> p;
    p.set(g);
    if (part.whole(slot)) {
      p.template store<true>(part.student + at);
      return;
    }
#pragma unroll
    for (int j = 0; j < width; ++j) {
      if (at + j >= 0 && at + j < n) part.student[at + j] = round_to<T>(g[j]);
    }
  };

  if constexpr (!with_teacher) {
    if (c.write_gradient) {
      for (int slot = 0; part.has(slot); ++slot) {
        float z[width];
        stored<T>(place(slot, 0)).get(z);
#pragma unroll
        for (int j = 0; j < width; ++j) z[j] = ce_factor * power_of_two(fmaf(z[j], e.c, -offset_s));
        write(slot, z);
      }
    }
  } else {
    const Normaliser& teacher = shared.normaliser[1];
    const float offset_t = teacher.offset, factor_s = student.factor, factor_t = teacher.factor;
    const float inverse_t = c.inverse_temperature;
    const auto shift = static_cast<float>((teacher.log2_t - student.log2_t) / static_cast<double>(e.c) *
                                          static_cast<double>(inverse_t));
    if constexpr (!more) {
      // Sums of kl / factor_t, so that the factors are outside the loop.
      const float ratio = factor_s / factor_t, kl_s = c.kl * factor_s, kl_t = c.kl * factor_t;
      float v[1] = {0};
      for (int slot = 0; part.has(slot); ++slot) {
        float zs[width], zt[width];
        stored<T>(place(slot, 0)).get(zs);
        stored<T>(place(slot, 1)).get(zt);
#pragma unroll
        for (int j = 0; j < width; ++j) {
          const float d = fmaf(zt[j] - zs[j], inverse_t, -shift);
          const float p = power_of_two(fmaf(zt[j], e.c, -offset_t)), q = power_of_two(fmaf(zs[j], e.c, -offset_s));
          const bool close = fabsf(d) <= 0.5f;
          v[0] = fmaf(close ? 0.0f : q, ratio, v[0]);
          v[0] = fmaf(p, close ? d * d * second_order(d) : d - 1.0f, v[0]);
          zs[j] = fmaf(ce_factor, softmax_1(zs[j], q), fmaf(kl_s, q, -kl_t * p));
        }
        if (c.write_gradient) write(slot, zs);
      }
      cluster_sum(cluster, shared, v);
      if (thread == 0) shared.row_measures[m_kl] *= static_cast<double>(factor_t);
    } else {
      const auto probabilities = [&](float zs, float zt, float& p, float& q, float& d) {
        p = factor_t * power_of_two(fmaf(zt, e.c, -offset_t));
        q = factor_s * power_of_two(fmaf(zs, e.c, -offset_s));
        d = fmaf(zt - zs, inverse_t, -shift);
      };
      float v[measures] = {};
      for (int slot = 0; part.has(slot); ++slot) {
        float zs[width], zt[width];
        stored<T>(place(slot, 0)).get(zs);
        stored<T>(place(slot, 1)).get(zt);
#pragma unroll
        for (int j = 0; j < width; ++j) {
          float p, q, d;
          probabilities(zs[j], zt[j], p, q, d);
          v[m_kl] += kl_term(p, q, d);
          if (c.with_reverse_kl) v[m_reverse_kl] += kl_term(q, p, -d);
          if (c.with_jsd) {
            float a, b;
            log_over_mixture(d, c.beta, a, b);
            v[m_jsd] += c.beta * p * a + (1.0f - c.beta) * q * b;
            v[m_student_to_mixture] += q * b;
          }
          if (c.with_tvd) {
            v[m_tvd] += fabsf(p - q);
            v[m_mean_sign] += q * sign(q - p);
          }
        }
      }
      cluster_sum(cluster, shared, v);
      if (c.write_gradient) {
        const auto mean_reverse = static_cast<float>(shared.row_measures[m_reverse_kl]);
        const auto mean_mixture = static_cast<float>(shared.row_measures[m_student_to_mixture]);
        const auto mean_sign = static_cast<float>(shared.row_measures[m_mean_sign]);
        for (int slot = 0; part.has(slot); ++slot) {
          float zs[width], zt[width];
          stored<T>(place(slot, 0)).get(zs);
          stored<T>(place(slot, 1)).get(zt);
#pragma unroll
          for (int j = 0; j < width; ++j) {
            float p, q, d;
            probabilities(zs[j], zt[j], p, q, d);
            float g = c.kl * (q - p);
            if (c.with_reverse_kl) g += c.reverse_kl * q * (-d - mean_reverse);
            if (c.with_jsd) {
              float a, b;
              log_over_mixture(d, c.beta, a, b);
              g += c.jsd * q * (b - mean_mixture);
            }
            if (c.with_tvd) g += c.tvd * q * (sign(q - p) - mean_sign);
            const float power = power_of_two(fmaf(zs[j], e.c, -offset_s));
            zs[j] = fmaf(ce_factor, softmax_1(zs[j], power), g);
          }
          write(slot, zs);
        }
      }
    }
  }

  if (block == 0 && thread == 0) {
    // From powers of two back with the very constant that led there, so that its rounding cancels.
    const double ln_2 = 1 / static_cast<double>(log2_e);
    const double t2 = static_cast<double>(c.temperature) * static_cast<double>(c.temperature);
    const double bad_label = label < n ? 0 : nan("");
    out[ce] = student.log2_1 * ln_2 - label_logit[0] + bad_label;
    out[student_correct] = student.argmax == label;
    out[tokens] = 1;
#pragma unroll
    for (const int i : {kl, reverse_kl, jsd, tvd, top1_agree, teacher_correct, teacher_ce}) out[i] = 0;
    if constexpr (with_teacher) {
      const Normaliser& teacher = shared.normaliser[1];
      out[teacher_ce] = teacher.log2_1 * ln_2 - label_logit[1] + bad_label;
      out[teacher_correct] = teacher.argmax == label;
      out[top1_agree] = student.argmax == teacher.argmax;
      out[kl] = t2 * shared.row_measures[m_kl];
      if constexpr (more) {
        if (c.with_reverse_kl) out[reverse_kl] = t2 * shared.row_measures[m_reverse_kl];
        if (c.with_jsd) out[jsd] = t2 * shared.row_measures[m_jsd];
        if (c.with_tvd) out[tvd] = 0.5 * shared.row_measures[m_tvd];
      }
    }
  }
  cluster.sync();  // no block ends while another may read its shared memory
}

template <class T, Temperature kind, bool with_teacher, bool more>
cudaError_t launch(const DistillConstants& c, T* student, const T* teacher, const std::int32_t* labels,
                   double* row_sums, std::int64_t rows, std::int64_t n, cudaStream_t stream) {
  const std::int64_t packs = (n + 2 * pack_width<T> - 2) / pack_width<T>;  // with the longest lead
  const std::int64_t each = (packs + cluster_blocks - 1) / cluster_blocks;
  const int slots = static_cast<int>((each + threads - 1) / threads);
  const std::size_t bytes = static_cast<std::size_t>(slots) * (with_teacher ? 2 : 1) * threads * sizeof(uint4);
  const auto kernel = row_loss<T, kind, with_teacher, more>;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (status != cudaSuccess) return status;
  kernel<<<static_cast<unsigned>(rows * cluster_blocks), threads, bytes, stream>>>(
      c, student, teacher, labels, row_sums, static_cast<int>(n), slots);
  return cudaGetLastError();
}

}  // namespace

template <class T>
std::int64_t most_classes() {
  return static_cast<std::int64_t>(most_slots) * threads * cluster_blocks * pack_width<T> - pack_width<T>;
}
template std::int64_t most_classes<Bits>();
template std::int64_t most_classes<float>();

template <class T>
cudaError_t distill_loss(const DistillConstants& c, T* student, const T* teacher, const std::int32_t* labels,
                         double* row_sums, std::int64_t rows, std::int64_t n, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  const auto with = [&]<Temperature kind, bool with_teacher, bool more>() {
    return launch<T, kind, with_teacher, more>(c, student, teacher, labels, row_sums, rows, n, stream);
  };
  const bool more = c.with_reverse_kl || c.with_jsd || c.with_tvd;
  const auto of_kind = [&]<Temperature kind>() {
    return more ? with.template operator()<kind, true, true>() : with.template operator()<kind, true, false>();
  };
  if (teacher == nullptr) return with.template operator()<Temperature::one, false, false>();
  if (c.temperature == 1.0f) return of_kind.template operator()<Temperature::one>();
  if (c.temperature == 2.0f) return of_kind.template operator()<Temperature::two>();
  return of_kind.template operator()<Temperature::any>();
}
template cudaError_t distill_loss(const DistillConstants&, Bits*, const Bits*, const std::int32_t*, double*,
                                  std::int64_t, std::int64_t, cudaStream_t);
template cudaError_t distill_loss(const DistillConstants&, float*, const float*, const std::int32_t*, double*,
                                  std::int64_t, std::int64_t, cudaStream_t);

}  // namespace deltapipe::kernels::cuda
