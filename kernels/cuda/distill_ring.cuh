// What distill_loss.cu keeps of rows: how they lie in a cluster's blocks and in the ring in shared memory, where a
// thread is in them, and what its blocks tell each other.
#pragma once

#include "kernels/cuda/distill_row.cuh"

namespace deltapipe::kernels::cuda {

inline constexpr int cluster_blocks = 8;                               // the most that every Hopper GPU runs
inline constexpr int work_warps = 8, threads = 32 * (work_warps + 1);  // one warp joins the others' sums
// A slot of the ring in shared memory holds two packs of each model of a thread. Those of a few threads would be one
// slot too many beside what else a block keeps there.
inline constexpr int half_packs = 252, halves = 2, slot_packs = halves * half_packs;
inline constexpr int most_slots = 14;  // of a row
inline constexpr int line = 128;       // bytes: parts of rows begin at multiples, but for a row's first
inline constexpr int pending = 1;      // slots that may be on their way while one is used

static_assert(work_warps >= cluster_blocks);  // whose lanes hold what the others sent

/// Places of a row's sums, as LossSum in kernels/distill_loss.h.
enum Sum : int { ce, kl, reverse_kl, jsd, tvd, top1_agree, student_correct, teacher_correct, teacher_ce, tokens, sums };

/// How rows lie in blocks. A row's packs of 16 bytes are counted from the line's beginning at or before its first
/// element. A block holds `each` consecutive packs, in `slots`. The ring holds `ring` slots, those of different rows
/// one after the other.
struct Layout {
  std::int64_t pitch;  // elements from a row to the next
  int rows, n, each, slots, ring;
  int most_ahead;  // slots that the first stage may be ahead of the last
  bool deep;       // there is room for `pending` slots
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

/// One store of 16 bytes; the compiler makes four of an assignment here.
__device__ __forceinline__ void store_whole(void* to, const std::uint32_t (&words)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

/// A thread's place in a row, in the row and in the ring.
struct Span {
  int at;     // element that the thread's pack begins with
  int end;    // of the block's part, and of the row
  int last;   // place of a whole pack
  int place;  // bytes, of the slot
  __device__ __forceinline__ bool whole() const { return at >= 0 && at <= last; }
  __device__ __forceinline__ bool there(int width) const { return at > -width && at < end; }
};

/// Where one stage is.
struct Stage {
  Cursor rows;
  Row row;
  unsigned number;  // of the row among the cluster's
  int slot;
  Span span;
};

/// What the cluster's sums over a row make of it.
template <int models>
struct Normalised {
  float offset[models], factor[models], offset_1, ce;  // ce: c.ce times the factor of exponentials at 1
  float kl_s, kl_t;                                    // c.kl times factors
  float offset_kl;                                     // c.kl p = 2^(z_t c - offset_kl), good enough for bfloat16
  float shift;                                         // d = (z_t - z_s) / T - shift, of which `lost` lacks
  int argmax[models];
  double lost, kl, ce_sum[models];
};

template <int models>
struct Shared {
  // By turns of two rows.
  RowSums<float, models> warp[2][work_warps];
  RowSums<double, models> block[2][cluster_blocks];  // every block's, sent by it
  Normalised<models> row[2];
  int known_largest[2][models];                        // of warps so far, ordered
  std::uint64_t summed[2], arrived[2], normalised[2];  // barriers of `warp`, `block`, `row`
};
struct MeasuresShared {
  float warp[2][work_warps][measures];
  double block[2][cluster_blocks][measures];
  double row[2][measures];
  std::uint64_t summed[2], arrived[2], ready[2];
};
struct NoMeasures {};

}  // namespace deltapipe::kernels::cuda
