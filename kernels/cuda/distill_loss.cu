// Clusters of eight blocks, as many as the device holds at once, walk through the rows. Each block keeps its part of
// both models' logits of a row in shared memory from the first read to the last use, so device memory is read once and
// written once. A row passes through stages, of which different rows are in at the same time:
//   1. sums of exponentials, the largest logit and its place, sum p (z_t - z_s): of every thread, running, then of the
//      warp, the block, and through distributed shared memory the cluster, which gives ce and kl;
//   2. with reverse_kl, jsd or tvd: probabilities from the normalisers, divergences, and their sums over the cluster;
//   3. the gradient, written over the student's logits. What a thread no longer needs makes room for a later row.
// Between a row's stages every block sends its sums to all. One warp waits for them and joins them while the others
// are in the next row's first stage, and copies of the rows after it are on their way.
// A thread's own terms are added in float (N / 4096 of them), everything else in double.
//
// Exponentials are powers of two of fma(z, log2(e) / T, -normaliser). What the float normaliser loses of the double one
// is the same factor for the whole row and goes into the constants of the terms. In the third stage d = log(p / q) is
// one fused operation, rounded relative to itself, but for what the difference of the normalisers loses as a float,
// the same for all classes: what lacks of a sum q d is added once.
#include "kernels/cuda/distill_row.cuh"
#include "kernels/cuda/launches.h"

#include <cooperative_groups.h>

#include <algorithm>

namespace deltapipe::kernels::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr int cluster_blocks = 8;  // the most that every Hopper GPU runs
constexpr int threads = 512, warps = threads / 32;
constexpr int most_slots = 13;  // of a row, so that another one's first slot fits beside it
constexpr int line = 128;       // bytes: parts of rows begin at multiples, but for a row's first
constexpr int most_pending = 8;

/// Places of a row's sums, as LossSum in kernels/distill_loss.h.
enum Sum : int { ce, kl, reverse_kl, jsd, tvd, top1_agree, student_correct, teacher_correct, teacher_ce, tokens, sums };

/// How rows lie in blocks. A row's packs of 16 bytes are counted from the line's beginning at or before its first
/// element. A block holds `each` consecutive packs, in `slots` of `stride`, a pack of both models a thread. The ring in
/// shared memory holds `ring` slots, those of different rows one after the other.
struct Layout {
  int rows, n, each, stride, slots, ring;
  int pending;  // slots that may still be on their way when one is needed
  int idle;     // turns after a row's first stage in which no other row begins
};

/// A row, or none: row = -1.
struct Row {
  int row, label;
  __device__ __forceinline__ bool there() const { return row >= 0; }
};
/// The row to look at next.
struct Cursor {
  int next, next_label;
};

/// A block's sums over its part: p d, -q d, m log(q / m), q log(q / m), |p - q|, q sign(q - p).
enum Measure : int { m_kl, m_reverse_kl, m_mixture, m_student_to_mixture, m_tvd, m_mean_sign, measures };

/// Waits for this thread's copies but for the latest `pending` groups.
__device__ __forceinline__ void wait_for(int pending) {
#define DELTAPIPE_WAIT(i) \
  case i: asm volatile("cp.async.wait_group %0;" ::"n"(i) : "memory"); break
  switch (pending) {
    DELTAPIPE_WAIT(8);
    DELTAPIPE_WAIT(7);
    DELTAPIPE_WAIT(6);
    DELTAPIPE_WAIT(5);
    DELTAPIPE_WAIT(4);
    DELTAPIPE_WAIT(3);
    DELTAPIPE_WAIT(2);
    DELTAPIPE_WAIT(1);
    default: asm volatile("cp.async.wait_group 0;" ::: "memory");
  }
#undef DELTAPIPE_WAIT
}

/// One store of 16 bytes; the compiler makes four of an assignment here.
__device__ __forceinline__ void store_whole(void* to, const std::uint32_t (&words)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

/// What the cluster's sums over a row make of it.
template <int models>
struct Normalised {
  float offset[models], factor[models], offset_1, ce;  // ce: c.ce times the factor of exponentials at 1
  float kl_s, kl_t;                                    // c.kl times factors
  float shift;                                         // d = (z_t - z_s) / T - shift, of which `lost` lacks
  int argmax[models];
  double lost, kl, ce_sum[models];
};

template <int models>
struct Shared {
  RowSums<float, models> warp[warps];
  RowSums<double, models> block[2][cluster_blocks];  // by turns of two rows: every block's, sent by it
  std::uint64_t arrived[2];                          // barriers of those
  Normalised<models> row[4];                         // by turns of four rows
};
struct MeasuresShared {
  float warp[warps][measures];
  double block[2][cluster_blocks][measures];  // as above
  std::uint64_t arrived[2];
  double row[2][measures];
};
struct NoMeasures {};

// Barriers in shared memory that count bytes which other blocks send. A phase ends with the block's own arrival, by
// `expect`, and as many bytes.
__device__ __forceinline__ std::uint32_t address_of(const void* shared) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
}
__device__ __forceinline__ void expect(std::uint64_t& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(&barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void start_barrier(std::uint64_t& barrier, int bytes) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address_of(&barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  expect(barrier, bytes);
}
/// Waits for a barrier's phase, counted from 0.
__device__ __forceinline__ void await(std::uint64_t& barrier, unsigned phase) {
  std::uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(address_of(&barrier)), "r"(phase % 2)
        : "memory");
  }
}
/// Copies `from` to where `to` and its barrier are in block `rank`.
template <class V>
__device__ __forceinline__ void send(const V& from, V& to, std::uint64_t& barrier, int rank) {
  static_assert(sizeof(V) % 8 == 0);
  const auto in_rank = [rank](std::uint32_t address) {
    std::uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
  };
  const std::uint32_t at = in_rank(address_of(&to)), end = in_rank(address_of(&barrier));
  std::uint64_t words[sizeof(V) / 8];
  memcpy(words, &from, sizeof(V));
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(V) / 8); ++i) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(at + 8 * i),
                 "l"(words[i]), "r"(end)
                 : "memory");
  }
}

/// `more`: reverse_kl, jsd or tvd have a weight.
template <class T, bool more>
inline constexpr int blocks_an_sm = sizeof(T) == 2 && !more ? 2 : 1;

template <class T, Temperature kind, bool with_teacher, bool more>
__global__ void __launch_bounds__(threads, blocks_an_sm<T, more>)
    rows_loss(DistillConstants c, T* student_logits, const T* teacher_logits, const std::int32_t* labels,
              double* row_sums, Layout layout) {
  constexpr int width = pack_width<T>, models = with_teacher ? 2 : 1;
  extern __shared__ uint4 stash[];  // [ring, models, stride], an entry its thread's own
  __shared__ Shared<models> shared;
  __shared__ std::conditional_t<more, MeasuresShared, NoMeasures> measured;
  cg::cluster_group cluster = cg::this_cluster();
  const int block = static_cast<int>(cluster.block_rank()), thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32, lane = thread % 32;
  const int clusters = static_cast<int>(gridDim.x) / cluster_blocks, n = layout.n;
  const Exponents<kind> e{c.inverse_temperature * log2_e};
  const float margin = most_exponent / fmaxf(e.c, log2_e);

  // A thread's packs in its block's part: from `first` on, every stride, below `limit`.
  const int limit = (block + 1) * layout.each, first = thread < layout.stride ? block * layout.each + thread : limit;
  const auto student_row = [&](int row) { return student_logits + static_cast<std::int64_t>(row) * n; };
  const auto teacher_row = [&](int row) { return teacher_logits + static_cast<std::int64_t>(row) * n; };
  const auto lead_of = [](const T* row) {
    return static_cast<int>(reinterpret_cast<std::uintptr_t>(row) % line / sizeof(T));
  };
  /// Whether copies of 16 bytes bring both models' rows.
  const auto copied = [&](int row) {
    return !with_teacher ||
           (reinterpret_cast<std::uintptr_t>(student_row(row)) ^ reinterpret_cast<std::uintptr_t>(teacher_row(row))) %
                   16 ==
               0;
  };
  /// Element of the row that a slot's pack begins with, which may lie before it.
  const auto element = [&](int slot, int lead) { return (first + slot * layout.stride) * width - lead; };
  const auto has = [&](int slot, int at) { return first + slot * layout.stride < limit && at > -width && at < n; };
  const auto whole = [&](int at) { return at >= 0 && at <= n - width; };
  const auto place = [&](int index, int model) { return stash + (index * models + model) * layout.stride + thread; };
  const auto wrapped = [&](int index) { return index >= layout.ring ? index - layout.ring : index; };

  const auto clear = [&](int row) {
    if (block == 0 && thread < sums) row_sums[static_cast<std::int64_t>(row) * sums + thread] = 0;
    if (!c.write_gradient) return;
    T* const to = student_row(row);
    const int lead = lead_of(to);
    for (int slot = 0; slot < layout.slots; ++slot) {
      const int at = element(slot, lead);
      if (!has(slot, at)) continue;
      if (whole(at)) {
        store_whole(to + at, {0, 0, 0, 0});
      } else {
        for (int j = max(at, 0); j < min(at + width, n); ++j) to[j] = T(0);
      }
    }
  };
  /// Goes to this cluster's next row that is not masked, after `clear` of those that are. Labels are read a row ahead.
  const auto advance = [&](Cursor& cursor, const auto& masked) {
    int row = cursor.next, label = cursor.next_label;
    while (row < layout.rows && label < 0) {
      masked(row);
      row += clusters;
      label = row < layout.rows ? labels[row] : 0;
    }
    cursor.next = row + clusters;
    if (cursor.next < layout.rows) cursor.next_label = labels[cursor.next];
    return row < layout.rows ? Row{row, label} : Row{-1, 0};
  };

  Cursor arriving_rows{static_cast<int>(blockIdx.x) / cluster_blocks, labels[blockIdx.x / cluster_blocks]};
  Cursor rows = arriving_rows;
  Row arriving = advance(arriving_rows, clear);
  int arriving_slot = 0, arriving_index = 0;
  /// Starts to copy the next slot. A pack at a row's end brings elements of its line before the row, nothing behind it.
  const auto fetch = [&] {
    if (arriving.there()) {
      T* const from = student_row(arriving.row);
      const int at = element(arriving_slot, lead_of(from));
      if (has(arriving_slot, at) && copied(arriving.row)) {
        const int bytes = min(width, n - at) * static_cast<int>(sizeof(T));
        const auto copy = [&](const T* row, int model) {
          const auto to = static_cast<std::uint32_t>(__cvta_generic_to_shared(place(arriving_index, model)));
          asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(row + at), "r"(bytes) : "memory");
        };
        copy(from, 0);
        if constexpr (with_teacher) copy(teacher_row(arriving.row), 1);
      }
      arriving_index = wrapped(arriving_index + 1);
      if (++arriving_slot == layout.slots) {
        arriving_slot = 0;
        arriving = advance(arriving_rows, clear);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  /// Puts the lowest finite number where a pack lies outside the row: its probability is 0 on both sides, and their
  /// difference too. Brings the row's elements where no copy did.
  const auto complete = [&](int row, int at, int index) {
    const bool here = copied(row);
#pragma unroll 1
    for (int m = 0; m < models; ++m) {
      T* const to = reinterpret_cast<T*>(place(index, m));
      const T* const from = m == 0 ? student_row(row) : teacher_row(row);
#pragma unroll 1
      for (int j = 0; j < width; ++j) {
        if (at + j >= 0 && at + j < n) {
          if (!here) to[j] = from[at + j];
        } else if constexpr (std::is_same_v<T, Bits>) {
          to[j] = 0xff7f;
        } else {
          to[j] = -FLT_MAX;
        }
      }
    }
  };

  /// Row sums of a row: one thread of block 0.
  const auto finish = [&](const Row& row, const Normalised<models>& s, [[maybe_unused]] const double* measure) {
    const double bad_label = row.label < n ? 0 : nan("");
    double* out = row_sums + static_cast<std::int64_t>(row.row) * sums;
    out[ce] = s.ce_sum[0] + bad_label;
    out[student_correct] = s.argmax[0] == row.label;
    out[tokens] = 1;
#pragma unroll
    for (const int i : {kl, reverse_kl, jsd, tvd, top1_agree, teacher_correct, teacher_ce}) out[i] = 0;
    if constexpr (with_teacher) {
      out[teacher_ce] = s.ce_sum[1] + bad_label;
      out[teacher_correct] = s.argmax[1] == row.label;
      out[top1_agree] = s.argmax[0] == s.argmax[1];
      out[kl] = s.kl;
      if constexpr (more) {
        const double t2 = static_cast<double>(c.temperature) * static_cast<double>(c.temperature);
        if (c.with_reverse_kl) out[reverse_kl] = t2 * (measure[m_reverse_kl] + s.lost);
        // beta p log(p / m) + (1 - beta) q log(q / m) = m log(q / m) + beta p d; what d lacks cancels.
        if (c.with_jsd) out[jsd] = t2 * (measure[m_mixture] + static_cast<double>(c.beta) * measure[m_kl]);
        if (c.with_tvd) out[tvd] = 0.5 * measure[m_tvd];
      }
    }
  };
  /// Joins the blocks' sums: one warp.
  const auto join = [&](const RowSums<double, models>(&blocks)[cluster_blocks], Normalised<models>& out) {
    RowSums<double, models> r = no_sums<models>();
    if (lane < cluster_blocks) r = blocks[lane];
    r = merge_lanes(e, r, cluster_blocks);
    const Normaliser own = normalise<kind, models>(e, r);
    // From powers of two back with the very constants that led there, so that their rounding cancels.
    const double ln_2 = 1 / static_cast<double>(log2_e);
    const auto keep = [&](int m) {
      out.offset[m] = own.offset;
      out.factor[m] = own.factor;
      out.argmax[m] = r.of[m].place;
      out.ce_sum[m] = own.log2_1 * ln_2 - static_cast<double>(r.of[m].label_logit);
    };
    [[maybe_unused]] const double teacher_log2 = __shfl_sync(0xffffffffu, own.log2_t, 2 * (models - 1));
    if (lane == 0) {
      keep(0);
      out.offset_1 = own.offset_1;
      out.ce = c.ce * (kind == Temperature::one ? own.factor : own.factor_1);
      out.kl_s = c.kl * own.factor;
      if constexpr (with_teacher) {
        const double t = static_cast<double>(c.temperature), inverse_t = static_cast<double>(c.inverse_temperature);
        const double shift = (teacher_log2 - own.log2_t) / static_cast<double>(e.c);  // of z_t - z_s
        const double lost_from = shift * inverse_t;
        out.shift = static_cast<float>(lost_from);
        out.lost = lost_from - static_cast<double>(out.shift);
        const double largest = static_cast<double>(r.of[1].largest) - static_cast<double>(r.of[0].largest);
        out.kl = t * t * inverse_t * (r.difference / r.of[1].at_t + (largest - shift));
      }
    } else if (with_teacher && lane == 2) {
      keep(models - 1);
      out.kl_t = c.kl * own.factor;
    }
  };

  constexpr int sums_bytes = cluster_blocks * static_cast<int>(sizeof(RowSums<double, models>));
  constexpr int measures_bytes = cluster_blocks * measures * static_cast<int>(sizeof(double));
  if (thread == 0) {
    for (std::uint64_t& barrier : shared.arrived) start_barrier(barrier, sums_bytes);
    if constexpr (more) {
      for (std::uint64_t& barrier : measured.arrived) start_barrier(barrier, measures_bytes);
    }
  }
  for (int i = 0; i < layout.ring; ++i) fetch();
  cluster.sync();  // all blocks run, their barriers too
  // In the first stage, in the one after it, and in the third if there are three.
  const auto pass_over = [](int) {};
  Row now = advance(rows, pass_over), previous{-1, 0}, before{-1, 0};
  int now_index = 0, previous_index = 0, before_index = 0;  // of the row's first slot in the ring
  int idle = layout.idle;
  // Counts rows: the next for `now`, and of `previous` and `before`.
  unsigned now_number = 0, previous_number = 0, before_number = 0;
  while (now.there() || previous.there() || (more && before.there())) {
    const bool sent = previous.there() || (more && before.there());  // in the turn before
    if (warp == 0 && previous.there()) {
      std::uint64_t& barrier = shared.arrived[previous_number % 2];
      await(barrier, previous_number / 2);
      if (lane == 0) expect(barrier, sums_bytes);
      join(shared.block[previous_number % 2], shared.row[previous_number % 4]);
    }
    if constexpr (more) {
      if (warp == 1 && before.there()) {
        std::uint64_t& barrier = measured.arrived[before_number % 2];
        await(barrier, before_number / 2);
        if (lane == 0) expect(barrier, measures_bytes);
        if (lane < measures) {
          double sum = 0;
          for (int b = 0; b < cluster_blocks; ++b) sum += measured.block[before_number % 2][b][lane];
          measured.row[before_number % 2][lane] = sum;
        }
      }
    }
    RunningRow<models> running;
    const int now_lead = now.there() ? lead_of(student_row(now.row)) : 0;
    [[maybe_unused]] float v[measures] = {};
    for (int slot = 0; slot < layout.slots; ++slot) {
      const bool last = slot == layout.slots - 1;
      if (now.there()) {
        wait_for(layout.pending);
        const int at = element(slot, now_lead), index = wrapped(now_index + slot);
        if (has(slot, at)) {
          if (!whole(at) || !copied(now.row)) complete(now.row, at, index);
          Pack<T, width> packs[models];
#pragma unroll
          for (int m = 0; m < models; ++m) packs[m] = stored<T>(place(index, m));
          accumulate<T, kind>(e, margin, packs, slot, running);
        }
      }
      if (slot == 0 && sent) {
        __syncthreads();
        if (block == 0 && thread == 32) {
          if constexpr (more) {
            if (before.there()) finish(before, shared.row[before_number % 4], measured.row[before_number % 2]);
          } else {
            finish(previous, shared.row[previous_number % 4], nullptr);
          }
        }
      }
      if (last && now.there()) {
        int places[models];
        float label_logits[models];
        const int label_pack = (now.label + now_lead) / width - first, label_slot = label_pack / layout.stride;
        const bool labelled =
            now.label < n && label_pack >= 0 && label_pack + first < limit && label_pack == label_slot * layout.stride;
#pragma unroll
        for (int m = 0; m < models; ++m) {
          // From the slot of a thread's largest logit to its place in the row.
          places[m] = INT_MAX;
          if (const int of = running.of[m].slot; of != INT_MAX) {
            float z[width];
            stored<T>(place(wrapped(now_index + of), m)).get(z);
            int in_pack = 0;
#pragma unroll
            for (int j = width - 1; j >= 0; --j) {
              if (z[j] == running.of[m].largest) in_pack = j;
            }
            places[m] = element(of, now_lead) + in_pack;
          }
          label_logits[m] = 0;
          if (labelled) {
            label_logits[m] = to_compute(
                reinterpret_cast<const T*>(place(wrapped(now_index + label_slot), m))[(now.label + now_lead) % width]);
          }
        }
        const RowSums<float, models> merged = merge_warp(e, running, places, label_logits);
        if (lane == 0) shared.warp[warp] = merged;
      }
      const auto load = [&](int row_index, float(&zs)[width], float(&zt)[width]) {
        stored<T>(place(wrapped(row_index + slot), 0)).get(zs);
        if constexpr (with_teacher) stored<T>(place(wrapped(row_index + slot), 1)).get(zt);
      };
      const Mixture mixture(c.beta);
      if constexpr (more) {
        if (previous.there()) {
          const int at = element(slot, lead_of(student_row(previous.row)));
          if (has(slot, at)) {
            const Normalised<models>& row = shared.row[previous_number % 4];
            float zs[width], zt[width];
            load(previous_index, zs, zt);
#pragma unroll
            for (int j = 0; j < width; ++j) {
              const float p = row.factor[1] * power_of_two(fmaf(zt[j], e.c, -row.offset[1]));
              const float q = row.factor[0] * power_of_two(fmaf(zs[j], e.c, -row.offset[0]));
              const float d = fmaf(zt[j] - zs[j], c.inverse_temperature, -row.shift);
              if (c.with_reverse_kl) v[m_reverse_kl] = fmaf(-q, d, v[m_reverse_kl]);
              if (c.with_jsd) {
                const float b = mixture.student_over(d);
                v[m_kl] = fmaf(p, d, v[m_kl]);
                v[m_mixture] = fmaf(fmaf(c.beta, p - q, q), b, v[m_mixture]);
                v[m_student_to_mixture] = fmaf(q, b, v[m_student_to_mixture]);
              }
              if (c.with_tvd) {
                v[m_tvd] += fabsf(p - q);
                v[m_mean_sign] = fmaf(q, sign(q - p), v[m_mean_sign]);
              }
            }
          }
          if (last) {
#pragma unroll
            for (int i = 0; i < measures; ++i) {
              v[i] = warp_sum(v[i]);
              if (lane == 0) measured.warp[warp][i] = v[i];
            }
          }
        }
      }
      if (last && (now.there() || (more && previous.there()))) {
        __syncthreads();
        if (warp == 0 && now.there()) {
          RowSums<double, models> r = no_sums<models>();
          if (lane < warps) r = widened(shared.warp[lane]);
          r = merge_lanes(e, r, warps);
          if (lane < cluster_blocks) send(r, shared.block[now_number % 2][block], shared.arrived[now_number % 2], lane);
        }
        if constexpr (more) {
          if (warp >= 1 && warp <= measures && previous.there()) {
            const double sum = warp_sum(lane < warps ? static_cast<double>(measured.warp[lane][warp - 1]) : 0.0);
            const unsigned half = previous_number % 2;
            if (lane < cluster_blocks) send(sum, measured.block[half][block][warp - 1], measured.arrived[half], lane);
          }
        }
      }

      const Row& leaving = more ? before : previous;
      if (!leaving.there()) continue;
      if (c.write_gradient) {
        T* const to = student_row(leaving.row);
        const int at = element(slot, lead_of(to));
        if (has(slot, at)) {
          const Normalised<models>& row = shared.row[(more ? before_number : previous_number) % 4];
          float zs[width], zt[width];
          load(more ? before_index : previous_index, zs, zt);
          if constexpr (!with_teacher) {
#pragma unroll
            for (int j = 0; j < width; ++j) zs[j] = row.ce * power_of_two(fmaf(zs[j], e.c, -row.offset[0]));
          } else {
            /// Of ce and kl with respect to z, from q = 2^(z c - offset) and p: q (ce' + kl_s) - kl_t p, and the like.
            const float of_ce = row.ce, kl_s = row.kl_s, kl_t = row.kl_t, offset_1 = row.offset_1;
            const auto simple = [&](float z, float q, float p) {
              if constexpr (kind == Temperature::one) return fmaf(q, of_ce + kl_s, -(kl_t * p));
              if constexpr (kind == Temperature::two) return fmaf(q, fmaf(of_ce, q, kl_s), -(kl_t * p));
              return fmaf(of_ce, power_of_two(fmaf(z, log2_e, -offset_1)), fmaf(kl_s, q, -(kl_t * p)));
            };
            const float offset_s = row.offset[0], offset_t = row.offset[models - 1];
            [[maybe_unused]] float of_row = 0;  // all that is q times a constant of the row
            if constexpr (more) {
              const double* sum = measured.row[before_number % 2];
              of_row = c.reverse_kl * static_cast<float>(sum[m_reverse_kl]) +
                       c.jsd * static_cast<float>(sum[m_student_to_mixture]) +
                       c.tvd * static_cast<float>(sum[m_mean_sign]);
            }
#pragma unroll
            for (int j = 0; j < width; ++j) {
              const float q = power_of_two(fmaf(zs[j], e.c, -offset_s)), p = power_of_two(fmaf(zt[j], e.c, -offset_t));
              float g = simple(zs[j], q, p);
              if constexpr (more) {
                const float qq = row.factor[0] * q, d = fmaf(zt[j] - zs[j], c.inverse_temperature, -row.shift);
                float of_q = fmaf(-c.reverse_kl, d, -of_row);
                if (c.with_jsd) of_q = fmaf(c.jsd, mixture.student_over(d), of_q);
                if (c.with_tvd) of_q = fmaf(c.tvd, sign(qq - row.factor[models - 1] * p), of_q);
                g = fmaf(qq, of_q, g);
              }
              zs[j] = g;
            }
          }
          if (leaving.label >= at && leaving.label < at + width) {
#pragma unroll
            for (int j = 0; j < width; ++j) zs[j] -= at + j == leaving.label ? c.ce : 0.0f;
          }
          if (whole(at) && copied(leaving.row)) {
            Pack<T, width> p;
            p.set(zs);
            store_whole(to + at, p.words);
          } else {
#pragma unroll
            for (int j = 0; j < width; ++j) {
              if (at + j >= 0 && at + j < n) to[at + j] = round_to<T>(zs[j]);
            }
          }
        }
      }
      fetch();
    }
    before = previous;
    before_index = previous_index;
    before_number = previous_number;
    previous = now;
    previous_index = now_index;
    previous_number = now_number;
    if (now.there()) {
      now_index = wrapped(now_index + layout.slots);
      ++now_number;
    }
    if (idle > 0) {
      --idle;
      now = {-1, 0};
    } else {
      idle = layout.idle;
      now = advance(rows, pass_over);
    }
  }
}

/// Bytes of shared memory of a multiprocessor, and what a block takes of them unseen.
constexpr int shared_of_sm = 228 * 1024, reserved = 1024;

template <class T, Temperature kind, bool with_teacher, bool more>
cudaError_t launch(const DistillConstants& c, T* student, const T* teacher, const std::int32_t* labels,
                   double* row_sums, std::int64_t rows, std::int64_t n, cudaStream_t stream) {
  constexpr int models = with_teacher ? 2 : 1, of_line = line / static_cast<int>(sizeof(uint4));
  const auto divided = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
  const auto rounded_up = [](std::int64_t a, std::int64_t to) { return (a + to - 1) / to * to; };
  const std::int64_t packs = divided(n + line / static_cast<int>(sizeof(T)) - 1, pack_width<T>);  // the longest lead
  Layout layout{};
  layout.rows = static_cast<int>(rows);
  layout.n = static_cast<int>(n);
  layout.each = static_cast<int>(rounded_up(divided(packs, cluster_blocks), of_line));
  layout.slots = static_cast<int>(divided(layout.each, threads));
  layout.stride = static_cast<int>(rounded_up(divided(layout.each, layout.slots), of_line));

  const auto kernel = rows_loss<T, kind, with_teacher, more>;
  cudaFuncAttributes attributes{};
  cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
  if (status != cudaSuccess) return status;
  const int slot_bytes = layout.stride * models * static_cast<int>(sizeof(uint4));
  /// Slots that fit where `blocks` share a multiprocessor.
  const auto fitting = [&](int blocks) {
    return (shared_of_sm / blocks - reserved - static_cast<int>(attributes.sharedSizeBytes)) / slot_bytes;
  };
  // A slot is needed until the last stage of its row, rows behind the first; the others are on their way.
  int held = (more ? 2 : 1) * layout.slots;
  int ring = fitting(blocks_an_sm<T, more>);
  if (ring < held + 2) ring = fitting(1);
  if (ring < held + 1) {  // three rows do not fit: one after the other
    layout.idle = 2;
    held = layout.slots - 1;
  }
  layout.pending = std::min(ring - held - 1, most_pending);
  layout.ring = held + 1 + layout.pending;
  const int bytes = layout.ring * slot_bytes;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {cluster_blocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(cluster_blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<std::size_t>(bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;  // that run at once
  status = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (status != cudaSuccess) return status;
  config.gridDim.x = static_cast<unsigned>(cluster_blocks * std::min<std::int64_t>(rows, std::max(clusters, 1)));
  return cudaLaunchKernelEx(&config, kernel, c, student, teacher, labels, row_sums, layout);
}

}  // namespace

template <class T>
std::int64_t most_classes() {
  return static_cast<std::int64_t>(most_slots) * threads * cluster_blocks * pack_width<T> -
         line / static_cast<int>(sizeof(T)) + 1;
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
