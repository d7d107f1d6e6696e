// Clusters of eight blocks, as many as the device holds at once, walk through the rows. Each block keeps its part of
// both models' logits of a row in shared memory from the first read to the last use, so device memory is read once and
// written once. A row passes through stages, of which different rows are in at the same time:
//   1. sums of exponentials, the largest logit and its place, sum p (z_t - z_s): of every thread, running, then of the
//      warp, the block, and through distributed shared memory the cluster, which gives ce and kl;
//   2. with reverse_kl, jsd or tvd: probabilities from the normalisers, divergences, and their sums over the cluster;
//   3. the gradient, written over the student's logits. What a thread no longer needs makes room for a later row.
// Between a row's stages the warps' sums go to one warp of their block, which sends the block's to all blocks and joins
// what it gets. The other warps are in the next row's first stage meanwhile, copies of the slots after it on their way;
// no warp waits for another one but for joined sums.
// A thread's own terms are added in float (N / 4096 of them), everything else in double.
//
// Exponentials are powers of two of fma(z, log2(e) / T, -normaliser). What the float normaliser loses of the double one
// is the same factor for the whole row and goes into the constants of the terms. In the second and third stage
// d = log(p / q) is one fused operation; what a float difference of normalisers lacks is added to sum q d once.
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/distill_ring.cuh"
#include "kernels/cuda/launches.h"

#include <cooperative_groups.h>

#include <algorithm>

namespace deltapipe::kernels::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr int blocks_an_sm = 2;
/// Bytes of shared memory of a multiprocessor, and what a block takes of them unseen.
constexpr int shared_of_sm = 228 * 1024, reserved = 1024;

/// `more`: reverse_kl, jsd or tvd have a weight.
template <class T, Temperature kind, bool with_teacher, bool more>
__global__ void __launch_bounds__(threads, blocks_an_sm)
    rows_loss(DistillConstants c, T* student_logits, const T* teacher_logits, const std::int32_t* labels,
              double* row_sums, Layout layout) {
  constexpr int width = pack_width<T>, models = with_teacher ? 2 : 1;
  constexpr int slot_bytes = slot_packs * models * 16;
  extern __shared__ uint4 stash[];  // [ring, halves, models, half_packs], an entry its thread's own
  __shared__ Shared<models> shared;
  __shared__ std::conditional_t<more, MeasuresShared, NoMeasures> measured;
  cg::cluster_group cluster = cg::this_cluster();
  const int block = static_cast<int>(cluster.block_rank()), thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32, lane = thread % 32;
  const int clusters = static_cast<int>(gridDim.x) / cluster_blocks, n = layout.n;
  const Exponents<kind> e{c.inverse_temperature * log2_e};
  const float margin = most_exponent / fmaxf(e.c, log2_e);

  const auto student_row = [&](int row) { return student_logits + static_cast<std::int64_t>(row) * layout.pitch; };
  const std::int64_t to_teacher =  // bytes from a student's logit to the teacher's
      reinterpret_cast<std::intptr_t>(teacher_logits) - reinterpret_cast<std::intptr_t>(student_logits);
  // Copies of 16 bytes bring both models' rows.
  const bool copied = !with_teacher || to_teacher % 16 == 0;
  const auto teacher_of = [&](const T* student) {
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(student) + to_teacher);
  };
  /// A thread's first pack of `row`.
  const auto span_of = [&](int row, int place) {
    const int lead = static_cast<int>(reinterpret_cast<std::uintptr_t>(student_row(row)) % line / sizeof(T));
    Span s;
    s.end = min(n, (block + 1) * layout.each * width - lead);
    s.last = s.end - width;
    s.at = thread < half_packs ? (block * layout.each + thread) * width - lead : INT_MAX / 2;
    s.place = place;
    return s;
  };
  const int ring_bytes = layout.ring * slot_bytes;
  const auto wrapped = [&](int place) { return place >= ring_bytes ? place - ring_bytes : place; };
  /// The thread's packs of a half of a slot.
  const auto packs_at = [&](int place, int half) {
    return reinterpret_cast<uint4*>(reinterpret_cast<char*>(stash) + place) + half * models * half_packs + thread;
  };
  constexpr int half_elements = half_packs * width, slot_elements = slot_packs * width;

  /// Writes zeros over a masked row.
  const auto clear = [&](int row) {
    if (block == 0 && thread < sums) row_sums[static_cast<std::int64_t>(row) * sums + thread] = 0;
    if (!c.write_gradient) return;
    T* const to = student_row(row);
    Span s = span_of(row, 0);
#pragma unroll 1
    for (int i = 0; i < halves * layout.slots; ++i, s.at += half_elements) {
      if (s.whole()) {
        store_whole(to + s.at, {0, 0, 0, 0});
      } else if (s.there(width)) {
#pragma unroll 1
        for (int j = max(s.at, 0); j < min(s.at + width, n); ++j) to[j] = T(0);
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
  Span arriving_span{};
  const T* arriving_from = nullptr;
  int arriving_slots = 0;  // that are left of the row
  const auto begin_arriving = [&] {
    arriving_span = span_of(arriving.row, 0);
    arriving_from = student_row(arriving.row);
    arriving_slots = layout.slots;
  };
  if (arriving.there()) begin_arriving();
  /// Starts to copy the next slot, but for packs that lie in the row in part: `complete` brings those.
  const auto fetch = [&](int place) {
    if (arriving.there()) {
#pragma unroll
      for (int half = 0; half < halves; ++half, arriving_span.at += half_elements) {
        const std::uint32_t to = address_of(packs_at(place, half));
        const T* const from = arriving_from + arriving_span.at;
        if (copied && arriving_span.whole()) {
          asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
          if constexpr (with_teacher) {
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + half_packs * 16), "l"(teacher_of(from))
                         : "memory");
          }
        } else if (arriving_span.there(width)) {
          const T* const first = arriving_from + max(arriving_span.at, 0);
          asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(first)));
          if constexpr (with_teacher) {
            asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(teacher_of(first))));
          }
        }
      }
      if (--arriving_slots == 0) {
        arriving = advance(arriving_rows, clear);
        if (arriving.there()) begin_arriving();
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  /// Brings a pack's elements that no copy did. Outside the row it puts the lowest finite number: its probability is 0
  /// on both sides, and their difference too.
  const auto complete = [&](int row, int at, uint4* packs) {
    constexpr T lowest = std::is_same_v<T, Bits> ? T(0xff7f) : T(-FLT_MAX);
#pragma unroll 1
    for (int m = 0; m < models; ++m) {
      T* const to = reinterpret_cast<T*>(packs + m * half_packs);
      const T* const from = m == 0 ? student_row(row) : teacher_of(student_row(row));
      T x[width];
#pragma unroll
      for (int j = 0; j < width; ++j) x[j] = at + j >= 0 && at + j < n ? from[at + j] : lowest;
#pragma unroll
      for (int j = 0; j < width; ++j) to[j] = x[j];
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
        const double pivot =
            static_cast<double>(e.pivot(r.of[1].largest)) - static_cast<double>(e.pivot(r.of[0].largest));
        const double mean = (r.difference / r.of[1].at_t + pivot) / static_cast<double>(e.units_a_logit());
        out.kl = t * t * inverse_t * (mean - shift);
      }
    } else if (with_teacher && lane == 2) {
      keep(models - 1);
      out.kl_t = c.kl * own.factor;
      out.offset_kl = static_cast<float>(own.log2_t - log2(static_cast<double>(c.kl)));
    }
  };

  constexpr int sums_bytes = cluster_blocks * static_cast<int>(sizeof(RowSums<double, models>));
  constexpr int measures_bytes = cluster_blocks * measures * static_cast<int>(sizeof(double));
  if (thread == 0) {
    for (int k = 0; k < 2; ++k) {
      for (int& known : shared.known_largest[k]) known = INT_MIN;
      start_barrier(shared.summed[k], work_warps);
      start_barrier(shared.normalised[k], 32);
      start_barrier(shared.arrived[k], 1);
      expect(shared.arrived[k], sums_bytes);
      if constexpr (more) {
        start_barrier(measured.summed[k], work_warps);
        start_barrier(measured.ready[k], 32);
        start_barrier(measured.arrived[k], 1);
        expect(measured.arrived[k], measures_bytes);
      }
    }
  }
  if (warp < work_warps) {
    for (int i = 0; i < layout.ring; ++i) fetch(i * slot_bytes);
  }
  cluster.sync();  // all blocks run, their barriers too
  const auto pass_over = [](int) {};

  if (warp == work_warps) {  // joins sums, row by row
    unsigned number = 0;
    for (Row row = advance(rows, pass_over); row.there(); row = advance(rows, pass_over), ++number) {
      const unsigned turn = number % 2, phase = number / 2;
      Normalised<models>& normalised = shared.row[turn];
      await(shared.summed[turn], phase);
      {
        RowSums<double, models> r = no_sums<models>();
        if (lane < work_warps) r = widened(shared.warp[turn][lane]);
        if (lane < models) shared.known_largest[turn][lane] = INT_MIN;
        r = merge_lanes(e, r, work_warps);
        if (lane < cluster_blocks) send(r, shared.block[turn][block], shared.arrived[turn], lane);
      }
      await(shared.arrived[turn], phase);
      if (lane == 0) expect(shared.arrived[turn], sums_bytes);
      join(shared.block[turn], normalised);
      __syncwarp();                     // `finish` reads what lane 2 wrote
      arrive(shared.normalised[turn]);  // every lane, for what it has written and read
      [[maybe_unused]] const double* of_row = nullptr;
      if constexpr (more) {
        await(measured.summed[turn], phase);
        if (lane < measures) {
          double sum = 0;
          for (int w = 0; w < work_warps; ++w) sum += static_cast<double>(measured.warp[turn][w][lane]);
          for (int b = 0; b < cluster_blocks; ++b) {
            send(sum, measured.block[turn][block][lane], measured.arrived[turn], b);
          }
        }
        await(measured.arrived[turn], phase);
        if (lane == 0) expect(measured.arrived[turn], measures_bytes);
        if (lane < measures) {
          double sum = 0;
          for (int b = 0; b < cluster_blocks; ++b) sum += measured.block[turn][b][lane];
          measured.row[turn][lane] = sum;
        }
        __syncwarp();  // `finish` reads what the other lanes wrote
        arrive(measured.ready[turn]);
        of_row = measured.row[turn];
      }
      if (block == 0 && lane == 0) finish(row, normalised, of_row);
    }
    return;
  }

  // Rows in the stages; a later stage's is the same as an earlier one's, or an earlier row.
  const auto start = [&](Stage& stage) {
    stage.row = advance(stage.rows, pass_over);
    if (stage.row.there()) stage.span = span_of(stage.row.row, stage.span.place);
    stage.slot = 0;
  };
  const auto next_slot = [&](Stage& stage) {
    stage.span.place = wrapped(stage.span.place + slot_bytes);
    if (++stage.slot == layout.slots) {
      ++stage.number;
      start(stage);
    }
  };
  Stage summing{rows}, measuring{rows}, leaving{rows};
  start(summing);
  if constexpr (more) start(measuring);
  start(leaving);
  // Slots that the first stage is ahead of the last and of the second.
  int ahead = 0;
  [[maybe_unused]] int ahead_of_measuring = 0;
  RunningRow<T, models> running;
  [[maybe_unused]] float v[measures] = {};
  const Mixture mixture(c.beta);
#pragma unroll 1
  while (leaving.row.there()) {
    if (summing.row.there() && ahead < layout.most_ahead) {
      if (layout.deep) {
        asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
      } else {
        asm volatile("cp.async.wait_group 0;" ::: "memory");
      }
#pragma unroll
      for (int half = 0; half < halves; ++half, summing.span.at += half_elements) {
        uint4* const from = packs_at(summing.span.place, half);
        if (!copied || !summing.span.whole()) {
          if (!summing.span.there(width)) continue;
          complete(summing.row.row, summing.span.at, from);
        }
        Pack<T, width> packs[models];
#pragma unroll
        for (int m = 0; m < models; ++m) packs[m] = stored<T>(from + m * half_packs);
        accumulate<T, kind>(e, margin, packs, running);
      }
      ++ahead;
      ++ahead_of_measuring;
      if (summing.slot == layout.slots - 1) {
        const unsigned turn = summing.number % 2;
        const Row& now = summing.row;
        const int now_place =  // of the row's first slot
            summing.span.place - (layout.slots - 1) * slot_bytes +
            (summing.span.place < (layout.slots - 1) * slot_bytes ? ring_bytes : 0);
        float label_logits[models] = {};
        const Span row = span_of(now.row, now_place);
        const int from_first = now.label - row.at, label_slot = from_first / slot_elements,
                  in_slot = from_first - label_slot * slot_elements, label_half = in_slot / half_elements,
                  in_pack = in_slot - label_half * half_elements;
        if (from_first >= 0 && now.label < row.end && in_pack < width) {
          const uint4* const packs = packs_at(wrapped(now_place + label_slot * slot_bytes), label_half);
#pragma unroll
          for (int m = 0; m < models; ++m) {
            label_logits[m] = to_compute(reinterpret_cast<const T*>(packs + m * half_packs)[in_pack]);
          }
        }
        RowSums<float, models> merged = merge_warp<T>(e, running, label_logits);
        // The first place of the largest logit: threads look for it that have it, of warps that know of no larger one.
#pragma unroll
        for (int m = 0; m < models; ++m) {
          const int largest = ordered(merged.of[m].largest);
          int known = 0, place = INT_MAX;
          if (lane == 0) known = atomicMax(&shared.known_largest[turn][m], largest);
          known = __shfl_sync(0xffffffffu, known, 0);
          if (known <= largest && largest_of<T>(running.of[m].largest) == merged.of[m].largest) {
            const Largest<T> wanted = as_largest<T>(merged.of[m].largest);
            Span s = row;
#pragma unroll 1
            for (int i = 0; place == INT_MAX && i < halves * layout.slots; ++i, s.at += half_elements) {
              if (!s.there(width)) continue;
              const int of_slot = wrapped(now_place + i / halves * slot_bytes);
              const auto pack = stored<T>(packs_at(of_slot, i % halves) + m * half_packs);
              if (!holds(pack, wanted)) continue;
              float z[width];
              pack.get(z);
#pragma unroll
              for (int j = width - 1; j >= 0; --j) {
                if (z[j] == merged.of[m].largest && s.at + j >= 0) place = s.at + j;
              }
            }
          }
          merged.of[m].place = __reduce_min_sync(0xffffffffu, place);
        }
        __syncwarp();  // lane 0 arrives for the warp: what the others have read of earlier rows comes before
        if (lane == 0) {
          shared.warp[turn][warp] = merged;
          arrive(shared.summed[turn]);
        }
        running = {};
      }
      next_slot(summing);
      continue;
    }
    if constexpr (more) {
      if (measuring.row.there() && (measuring.slot > 0 || ahead_of_measuring >= layout.slots)) {
        const unsigned turn = measuring.number % 2;
        if (measuring.slot == 0) await(shared.normalised[turn], measuring.number / 2);
        const Normalised<models>& row = shared.row[turn];
#pragma unroll
        for (int half = 0; half < halves; ++half, measuring.span.at += half_elements) {
          if (!measuring.span.there(width)) continue;
          const uint4* const from = packs_at(measuring.span.place, half);
          float zs[width], zt[width];
          stored<T>(from).get(zs);
          stored<T>(from + half_packs).get(zt);
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
        if (measuring.slot == layout.slots - 1) {
#pragma unroll
          for (int i = 0; i < measures; ++i) {
            v[i] = warp_sum(v[i]);
            if (lane == 0) measured.warp[turn][warp][i] = v[i];
            v[i] = 0;
          }
          __syncwarp();
          if (lane == 0) arrive(measured.summed[turn]);
        }
        --ahead_of_measuring;
        next_slot(measuring);
        continue;
      }
    }
    const unsigned turn = leaving.number % 2;
    if (leaving.slot == 0) {
      if constexpr (more) {
        await(measured.ready[turn], leaving.number / 2);
      } else {
        await(shared.normalised[turn], leaving.number / 2);
      }
    }
    if (c.write_gradient) {
      T* const to = student_row(leaving.row.row);
      const Normalised<models>& row = shared.row[turn];
#pragma unroll
      for (int half = 0; half < halves; ++half, leaving.span.at += half_elements) {
        const int at = leaving.span.at;
        const bool whole = leaving.span.whole();
        if (!whole && !leaving.span.there(width)) continue;
        const uint4* const from = packs_at(leaving.span.place, half);
        float zs[width], zt[width];
        stored<T>(from).get(zs);
        if constexpr (with_teacher) stored<T>(from + half_packs).get(zt);
        if constexpr (!with_teacher) {
#pragma unroll
          for (int j = 0; j < width; ++j) zs[j] = row.ce * power_of_two(fmaf(zs[j], e.c, -row.offset[0]));
        } else {
          // Of ce and kl with respect to z, from q = 2^(z c - offset) and kl p: q (ce' + kl_s) - kl p, and the like.
          const float of_ce = row.ce, kl_s = row.kl_s, kl_t = row.kl_t, offset_1 = row.offset_1;
          constexpr bool has_kl_p = sizeof(T) == 2 && !more;
          const auto simple = [&](float z, float q, float p) {
            const float kl_p = has_kl_p ? p : kl_t * p;
            if constexpr (kind == Temperature::one) return fmaf(q, of_ce + kl_s, -kl_p);
            if constexpr (kind == Temperature::two) return fmaf(q, fmaf(of_ce, q, kl_s), -kl_p);
            return fmaf(of_ce, power_of_two(fmaf(z, log2_e, -offset_1)), fmaf(kl_s, q, -kl_p));
          };
          const float offset_s = row.offset[0], offset_t = has_kl_p ? row.offset_kl : row.offset[models - 1];
          [[maybe_unused]] float of_row = 0;  // all that is q times a constant of the row
          if constexpr (more) {
            const double* sum = measured.row[turn];
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
        if (static_cast<unsigned>(leaving.row.label - at) < width) {
#pragma unroll
          for (int j = 0; j < width; ++j) zs[j] -= at + j == leaving.row.label ? c.ce : 0.0f;
        }
        if (whole) {
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
    --ahead;
    fetch(leaving.span.place);
    next_slot(leaving);
  }
}

template <class T, Temperature kind, bool with_teacher, bool more>
cudaError_t launch(const DistillConstants& c, T* student, const T* teacher, const std::int32_t* labels,
                   double* row_sums, std::int64_t rows, std::int64_t n, std::int64_t pitch, cudaStream_t stream) {
  constexpr int models = with_teacher ? 2 : 1, of_line = line / static_cast<int>(sizeof(uint4));
  const auto divided = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
  const auto rounded_up = [](std::int64_t a, std::int64_t to) { return (a + to - 1) / to * to; };
  const std::int64_t packs = divided(n + line / static_cast<int>(sizeof(T)) - 1, pack_width<T>);  // the longest lead
  Layout layout{};
  layout.rows = static_cast<int>(rows);
  layout.n = static_cast<int>(n);
  layout.pitch = pitch;
  layout.each = static_cast<int>(rounded_up(divided(packs, cluster_blocks), of_line));
  layout.slots = static_cast<int>(divided(layout.each, slot_packs));

  const auto kernel = rows_loss<T, kind, with_teacher, more>;
  cudaFuncAttributes attributes{};
  cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
  if (status != cudaSuccess) return status;
  constexpr int slot_bytes = slot_packs * models * static_cast<int>(sizeof(uint4));
  // A slot is needed until its row has left; while the cluster's sums are joined, the next row's first two are summed.
  // No warp may bring sums of the row after the next before all have a row's joined ones; so rows of one slot: one.
  const int lag = layout.slots > 1 ? 2 : 1;
  for (int blocks = blocks_an_sm; blocks > 0 && layout.ring == 0; --blocks) {
    const int fit = (shared_of_sm / blocks - reserved - static_cast<int>(attributes.sharedSizeBytes)) / slot_bytes;
    for (const int needed : {layout.slots + lag + pending, layout.slots + pending, layout.slots}) {
      if (fit < needed || (needed == layout.slots && blocks > 1)) continue;
      layout.ring = needed;
      layout.deep = needed != layout.slots;
      layout.most_ahead = layout.deep ? needed - pending : needed;
      break;
    }
  }
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
  return static_cast<std::int64_t>(most_slots) * slot_packs * cluster_blocks * pack_width<T> -
         line / static_cast<int>(sizeof(T)) + 1;
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
