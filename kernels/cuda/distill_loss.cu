// Clusters of eight blocks, as many as the device holds at once, walk through the rows. Each block keeps its part of
// both models' logits of a row in shared memory from the first read to the last use, so device memory is read once and
// written once, and what a thread no longer needs makes room for the next row:
//   1. largest logit, its place and sums of exponentials, running, of every thread; combined over threads, blocks, and
//      through distributed shared memory the cluster;
//   2. probabilities from the normalisers: divergences, and the gradient where it needs no sum over the row;
//   3. with reverse_kl, jsd or tvd: their sums combined over the cluster, then the gradient.
// A thread's own terms are added in float (N / 4096 of them), everything else in double.
//
// Exponentials are powers of two of fma(z, log2(e) / T, -normaliser). What the float normaliser loses of the double one
// is the same factor for the whole row and goes into the constants of the terms. d = log(p / q) is one fused operation,
// rounded relative to itself, but for what the difference of the normalisers loses as a float, the same for all
// classes: sum p d is corrected for it once. What is left is the normalisers' own error, which goes into sum p d as it
// is: they are logarithms of sums of terms that are each right to 2^-22.
#include "kernels/cuda/distill_row.cuh"
#include "kernels/cuda/launches.h"

#include <cooperative_groups.h>

#include <algorithm>
#include <cfloat>

namespace deltapipe::kernels::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr int cluster_blocks = 8;  // the most that every Hopper GPU runs
constexpr int threads = 512, warps = threads / 32;
constexpr int most_slots = 13;  // packs of a thread and model: 16 kB of shared memory for both models each

/// Places of a row's sums, as LossSum in kernels/distill_loss.h.
enum Sum : int { ce, kl, reverse_kl, jsd, tvd, top1_agree, student_correct, teacher_correct, teacher_ce, tokens, sums };

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

/// A block's sums over its part: p d, -q d, m log(q / m), q log(q / m), |p - q|, q sign(q - p).
enum Measure : int { m_kl, m_reverse_kl, m_mixture, m_student_to_mixture, m_tvd, m_mean_sign, measures };

struct Shared {
  Running<double> warp[2][warps];
  // By turns of two rows, since a block may be a row ahead of one that still reads.
  Running<double> block[2][2];  // [turn][model], read by the whole cluster
  Normaliser normaliser[2][2];  // [turn][model]
  Shift shift[2];
  float label_logit[2][2];             // in block 0
  double kl_parts[2][cluster_blocks];  // in block 0: every block's sum of p d of the row before
  float warp_measures[warps][measures];
  double block_measures[measures];  // read by the whole cluster
  double row_measures[measures];
};

/// Sum of the warps' entry `i`, by lanes 0 .. 15 of a warp whose lanes all call.
__device__ __forceinline__ double sum_of_warps(const Shared& shared, int i) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return warp_sum(lane < warps ? static_cast<double>(shared.warp_measures[lane][i]) : 0.0);
}

/// A warp's sums of its threads' `v`.
template <int n>
__device__ __forceinline__ void keep_warp_sums(Shared& shared, float (&v)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    v[i] = warp_sum(v[i]);
    if (threadIdx.x % 32 == 0) shared.warp_measures[threadIdx.x / 32][i] = v[i];
  }
}

/// Sum of every thread's `v` over the cluster, into shared.row_measures of every block.
__device__ void cluster_sum(cg::cluster_group& cluster, Shared& shared, float (&v)[measures]) {
  keep_warp_sums(shared, v);
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  if (warp < measures) {
    const double sum = sum_of_warps(shared, warp);
    if (lane == 0) shared.block_measures[warp] = sum;
  }
  cluster.sync();
  if (warp < measures) {
    const double sum =
        warp_sum(lane < cluster_blocks ? cluster.map_shared_rank(&shared, lane)->block_measures[warp] : 0.0);
    if (lane == 0) shared.row_measures[warp] = sum;
  }
  __syncthreads();
}

/// `more`: reverse_kl, jsd or tvd have a weight.
template <class T, Temperature kind, bool with_teacher, bool more>
__global__ void __launch_bounds__(threads, sizeof(T) == 2 ? 2 : 1)
    rows_loss(DistillConstants c, T* student_logits, const T* teacher_logits, const std::int32_t* labels,
              double* row_sums, std::int64_t rows, int n, std::int64_t pitch, int slots) {
  constexpr int width = pack_width<T>, models = with_teacher ? 2 : 1;
  extern __shared__ uint4 stash[];  // [slots, models, threads], an entry its thread's own
  __shared__ Shared shared;
  cg::cluster_group cluster = cg::this_cluster();
  const int block = static_cast<int>(cluster.block_rank()), thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32, lane = thread % 32;
  const std::int64_t clusters = gridDim.x / cluster_blocks;
  const Exponents<kind> e{c.inverse_temperature * log2_e};

  const auto part_of = [&](std::int64_t row) {
    return Part<T>(student_logits + row * pitch, with_teacher ? teacher_logits + row * pitch : nullptr, n, block);
  };
  const auto place = [&](int slot, int model) { return stash + (slot * models + model) * threads + thread; };
  // Slots come in two groups of copies, so that the first half is worked on while the second arrives.
  const int first_half = (slots + 1) / 2;
  const auto fetch_slot = [&](const Part<T>& part, bool there, int slot) {
    if (there && part.has(slot) && part.whole(slot)) {
      fetch(part, part.student, slot, place(slot, 0));
      if constexpr (with_teacher) fetch(part, part.teacher, slot, place(slot, 1));
    }
    if (slot == first_half - 1) asm volatile("cp.async.commit_group;" ::: "memory");
    if (slot == slots - 1) asm volatile("cp.async.commit_group;" ::: "memory");
  };
  /// The next row of this cluster from `row` on that is not masked; those that are get zeros.
  const auto unmasked = [&](std::int64_t row) {
    for (; row < rows && labels[row] < 0; row += clusters) {
      if (block == 0 && thread < sums) row_sums[row * sums + thread] = 0;
      if (!c.write_gradient) continue;
      const Part<T> part = part_of(row);
      for (int slot = 0; part.has(slot); ++slot) {
        const int at = part.element(slot);
        if (part.whole(slot)) {
          *reinterpret_cast<uint4*>(part.student + at) = make_uint4(0, 0, 0, 0);
        } else {
          for (int j = max(at, 0); j < min(at + width, n); ++j) part.student[j] = T(0);
        }
      }
    }
    return row;
  };
  /// Row sums of `row`, whose values are those of `turn`; one thread of block 0.
  const auto finish = [&](std::int64_t row, int turn, const double* measure) {
    // From powers of two back with the very constant that led there, so that its rounding cancels.
    const double ln_2 = 1 / static_cast<double>(log2_e);
    const double t2 = static_cast<double>(c.temperature) * static_cast<double>(c.temperature);
    const int label = labels[row];
    const double bad_label = label < n ? 0 : nan("");
    const Normaliser& student = shared.normaliser[turn][0];
    double* out = row_sums + row * sums;
    out[ce] = student.log2_1 * ln_2 - static_cast<double>(shared.label_logit[turn][0]) + bad_label;
    out[student_correct] = student.argmax == label;
    out[tokens] = 1;
#pragma unroll
    for (const int i : {kl, reverse_kl, jsd, tvd, top1_agree, teacher_correct, teacher_ce}) out[i] = 0;
    if constexpr (with_teacher) {
      const Normaliser& teacher = shared.normaliser[turn][1];
      out[teacher_ce] = teacher.log2_1 * ln_2 - static_cast<double>(shared.label_logit[turn][1]) + bad_label;
      out[teacher_correct] = teacher.argmax == label;
      out[top1_agree] = student.argmax == teacher.argmax;
      const double lost = shared.shift[turn].lost;
      out[kl] = t2 * (measure[m_kl] - lost);
      if constexpr (more) {
        if (c.with_reverse_kl) out[reverse_kl] = t2 * (measure[m_reverse_kl] + lost);
        // beta p log(p / m) + (1 - beta) q log(q / m) = m log(q / m) + beta p d; what d lacks cancels.
        if (c.with_jsd) out[jsd] = t2 * (measure[m_mixture] + static_cast<double>(c.beta) * measure[m_kl]);
        if (c.with_tvd) out[tvd] = 0.5 * measure[m_tvd];
      }
    }
  };
  /// Sums p d of the row before, once all blocks brought theirs.
  const auto finish_before = [&](std::int64_t row, int turn) {
    double sum = 0;
    for (int b = 0; b < cluster_blocks; ++b) sum += shared.kl_parts[turn][b];
    sum *= static_cast<double>(shared.normaliser[turn][1].factor);
    finish(row, turn, &sum);
  };
  const auto bring_kl = [&](int turn) {  // a whole warp
    const double sum = sum_of_warps(shared, m_kl);
    if (lane == 0) cluster.map_shared_rank(&shared, 0)->kl_parts[turn][block] = sum;
  };
  constexpr bool finishes_later = with_teacher && !more;

  std::int64_t row = unmasked(blockIdx.x / cluster_blocks), before = -1;
  if (row < rows) {
    const Part<T> part = part_of(row);
    for (int slot = 0; slot < slots; ++slot) fetch_slot(part, true, slot);
  }
  int turn = 0;
  for (std::int64_t next = 0; row < rows; before = row, row = next, turn ^= 1) {
    const Part<T> part = part_of(row);
    const int label = labels[row];
    // Read before any block may overwrite it.
    if (block == 0 && thread == 32 && label < n) {
      shared.label_logit[turn][0] = to_compute(part.student[label]);
      if constexpr (with_teacher) shared.label_logit[turn][1] = to_compute(part.teacher[label]);
    }
    for (int slot = 0; slot < slots; ++slot) {  // those at the row's ends that no copy of 16 bytes brought
      if (!part.has(slot) || part.whole(slot)) continue;
      fetch(part, part.student, slot, place(slot, 0));
      if constexpr (with_teacher) fetch(part, part.teacher, slot, place(slot, 1));
    }
    Running<float> running[models];
#pragma unroll
    for (auto& r : running) r = no_logits<float>();
    const auto run_through = [&](int begin, int end) {
      for (int slot = begin; slot < end; ++slot) {
        if (!part.has(slot)) return;
#pragma unroll
        for (int m = 0; m < models; ++m) accumulate<T, kind>(e, stored<T>(place(slot, m)), slot, running[m]);
      }
    };
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    run_through(0, first_half);
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    run_through(first_half, slots);
#pragma unroll
    for (int m = 0; m < models; ++m) {
      // From the slot of a thread's largest logit to its place in the row.
      if (running[m].place != INT_MAX) {
        float z[width];
        const int slot = running[m].place;
        stored<T>(place(slot, m)).get(z);
        int at = 0;
#pragma unroll
        for (int j = width - 1; j >= 0; --j) {
          if (z[j] == running[m].largest) at = j;
        }
        running[m].place = part.element(slot) + at;
      }
      const Running<double> merged = merge_warp(e, running[m]);
      if (lane == 0) shared.warp[m][warp] = merged;
    }
    __syncthreads();
    const int lane_model = lane / 16;  // of the first warp: half a warp a model
    if (warp == 0) {
      Running<double> r = no_logits<double>();
      if (lane_model < models) r = shared.warp[lane_model][lane % 16];
      r = merge_lanes(e, r, 16);
      if (lane % 16 == 0 && lane_model < models) shared.block[turn][lane_model] = r;
    } else if (finishes_later && warp == 1 && before >= 0) {
      bring_kl(turn ^ 1);
    }
    cluster.sync();
    if (warp == 0) {
      Running<double> r = no_logits<double>();
      if (lane_model < models && lane % 16 < cluster_blocks) {
        r = cluster.map_shared_rank(&shared, lane % 16)->block[turn][lane_model];
      }
      r = merge_lanes(e, r, 16);
      const Normaliser normaliser = normalise(e, r);
      if (lane % 16 == 0 && lane_model < models) shared.normaliser[turn][lane_model] = normaliser;
      const double teacher_log2 = __shfl_sync(0xffffffffu, normaliser.log2_t, 16);
      if (with_teacher && lane == 0) {
        const double shift =
            (teacher_log2 - normaliser.log2_t) / static_cast<double>(e.c) * static_cast<double>(c.inverse_temperature);
        const auto rounded_shift = static_cast<float>(shift);
        shared.shift[turn] = {rounded_shift, shift - static_cast<double>(rounded_shift)};
      }
    } else if (finishes_later && block == 0 && thread == 32 && before >= 0) {
      finish_before(before, turn ^ 1);
    }
    next = unmasked(row + clusters);
    __syncthreads();

    const bool has_next = next < rows;
    const Part<T> next_part = part_of(has_next ? next : row);
    const Normaliser& student = shared.normaliser[turn][0];
    const float offset_s = student.offset, offset_1 = student.offset_1;
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
    /// f(slot) for the slots of this thread, for the last time: the next row takes their places.
    const auto last_pass = [&](const auto& f) {
      for (int slot = 0; slot < slots; ++slot) {
        if (part.has(slot)) f(slot);
        fetch_slot(next_part, has_next, slot);
      }
    };

    if constexpr (!with_teacher) {
      if (c.write_gradient) {
        last_pass([&](int slot) {
          float z[width];
          stored<T>(place(slot, 0)).get(z);
#pragma unroll
          for (int j = 0; j < width; ++j) z[j] = ce_factor * power_of_two(fmaf(z[j], e.c, -offset_s));
          write(slot, z);
        });
      } else {
        last_pass([](int) {});
      }
      if (block == 0 && thread == 32) finish(row, turn, nullptr);
    } else {
      const Normaliser& teacher = shared.normaliser[turn][1];
      const float offset_t = teacher.offset, factor_s = student.factor, factor_t = teacher.factor;
      const float inverse_t = c.inverse_temperature, shift = shared.shift[turn].shift;
      /// The gradient of ce and kl with respect to z, q = 2^(z c - offset) and p: q (ce' + kl_s) - kl_t p, and the
      /// like.
      const float kl_s = c.kl * factor_s, kl_t = c.kl * factor_t;
      const auto simple_gradient = [&](float z, float q, float p) {
        if constexpr (kind == Temperature::one) return fmaf(q, ce_factor + kl_s, -(kl_t * p));
        if constexpr (kind == Temperature::two) return fmaf(q, fmaf(ce_factor, q, kl_s), -(kl_t * p));
        return fmaf(ce_factor, power_of_two(fmaf(z, log2_e, -offset_1)), fmaf(kl_s, q, -(kl_t * p)));
      };
      const auto load = [&](int slot, float(&zs)[width], float(&zt)[width]) {
        stored<T>(place(slot, 0)).get(zs);
        stored<T>(place(slot, 1)).get(zt);
      };
      if constexpr (!more) {
        float v[1] = {0};
        if (c.write_gradient) {
          last_pass([&](int slot) {
            float zs[width], zt[width];
            load(slot, zs, zt);
#pragma unroll
            for (int j = 0; j < width; ++j) {
              const float d = fmaf(zt[j] - zs[j], inverse_t, -shift);
              const float p = power_of_two(fmaf(zt[j], e.c, -offset_t)), q = power_of_two(fmaf(zs[j], e.c, -offset_s));
              v[0] = fmaf(p, d, v[0]);
              zs[j] = simple_gradient(zs[j], q, p);
            }
            write(slot, zs);
          });
        } else {
          last_pass([&](int slot) {
            float zs[width], zt[width];
            load(slot, zs, zt);
#pragma unroll
            for (int j = 0; j < width; ++j) {
              const float d = fmaf(zt[j] - zs[j], inverse_t, -shift);
              v[0] = fmaf(power_of_two(fmaf(zt[j], e.c, -offset_t)), d, v[0]);
            }
          });
        }
        keep_warp_sums(shared, v);
      } else {
        const Mixture mixture(c.beta);
        const float beta = c.beta;
        const auto probabilities = [&](float zs, float zt, float& p, float& q, float& d) {
          p = factor_t * power_of_two(fmaf(zt, e.c, -offset_t));
          q = factor_s * power_of_two(fmaf(zs, e.c, -offset_s));
          d = fmaf(zt - zs, inverse_t, -shift);
        };
        float v[measures] = {};
        const auto measure = [&](int slot) {
          float zs[width], zt[width];
          load(slot, zs, zt);
#pragma unroll
          for (int j = 0; j < width; ++j) {
            float p, q, d;
            probabilities(zs[j], zt[j], p, q, d);
            v[m_kl] = fmaf(p, d, v[m_kl]);
            if (c.with_reverse_kl) v[m_reverse_kl] = fmaf(-q, d, v[m_reverse_kl]);
            if (c.with_jsd) {
              const float b = mixture.student_over(d);
              v[m_mixture] = fmaf(fmaf(beta, p - q, q), b, v[m_mixture]);
              v[m_student_to_mixture] = fmaf(q, b, v[m_student_to_mixture]);
            }
            if (c.with_tvd) {
              v[m_tvd] += fabsf(p - q);
              v[m_mean_sign] = fmaf(q, sign(q - p), v[m_mean_sign]);
            }
          }
        };
        if (c.write_gradient) {
          for (int slot = 0; part.has(slot); ++slot) measure(slot);
        } else {
          last_pass(measure);
        }
        cluster_sum(cluster, shared, v);
        if (block == 0 && thread == 32) finish(row, turn, shared.row_measures);
        if (c.write_gradient) {
          // All that is q times a constant of the row.
          const float of_row = c.reverse_kl * static_cast<float>(shared.row_measures[m_reverse_kl]) +
                               c.jsd * static_cast<float>(shared.row_measures[m_student_to_mixture]) +
                               c.tvd * static_cast<float>(shared.row_measures[m_mean_sign]);
          last_pass([&](int slot) {
            float zs[width], zt[width];
            load(slot, zs, zt);
#pragma unroll
            for (int j = 0; j < width; ++j) {
              float p, q, d;
              probabilities(zs[j], zt[j], p, q, d);
              float g = fmaf(-c.reverse_kl, d, -of_row);
              if (c.with_jsd) g = fmaf(c.jsd, mixture.student_over(d), g);
              if (c.with_tvd) g = fmaf(c.tvd, sign(q - p), g);
              const float power = power_of_two(fmaf(zs[j], e.c, -offset_s));
              zs[j] = fmaf(q, g, simple_gradient(zs[j], power, power_of_two(fmaf(zt[j], e.c, -offset_t))));
            }
            write(slot, zs);
          });
        }
      }
    }
  }
  if (finishes_later) {
    __syncthreads();
    if (warp == 1 && before >= 0) bring_kl(turn ^ 1);
  }
  cluster.sync();  // no block ends while another may read its shared memory
  if (finishes_later && block == 0 && thread == 32 && before >= 0) finish_before(before, turn ^ 1);
}

template <class T, Temperature kind, bool with_teacher, bool more>
cudaError_t launch(const DistillConstants& c, T* student, const T* teacher, const std::int32_t* labels,
                   double* row_sums, std::int64_t rows, std::int64_t n, std::int64_t pitch, cudaStream_t stream) {
  const std::int64_t packs = (n + 2 * pack_width<T> - 2) / pack_width<T>;  // with the longest lead
  const std::int64_t each = (packs + cluster_blocks - 1) / cluster_blocks;
  const int slots = static_cast<int>((each + threads - 1) / threads);
  const std::size_t bytes = static_cast<std::size_t>(slots) * (with_teacher ? 2 : 1) * threads * sizeof(uint4);
  const auto kernel = rows_loss<T, kind, with_teacher, more>;
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {cluster_blocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(cluster_blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;  // that run at once
  status = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (status != cudaSuccess) return status;
  config.gridDim.x = static_cast<unsigned>(cluster_blocks * std::min<std::int64_t>(rows, std::max(clusters, 1)));
  return cudaLaunchKernelEx(&config, kernel, c, student, teacher, labels, row_sums, rows, static_cast<int>(n), pitch,
                            slots);
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
                         double* row_sums, std::int64_t rows, std::int64_t n, std::int64_t pitch, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  const auto with = [&]<Temperature kind, bool with_teacher, bool more>() {
    return launch<T, kind, with_teacher, more>(c, student, teacher, labels, row_sums, rows, n, pitch, stream);
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
                                  std::int64_t, std::int64_t, std::int64_t, cudaStream_t);
template cudaError_t distill_loss(const DistillConstants&, float*, const float*, const std::int32_t*, double*,
                                  std::int64_t, std::int64_t, std::int64_t, cudaStream_t);

}  // namespace deltapipe::kernels::cuda
