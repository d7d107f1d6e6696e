// The first parts of the gradients kernel: its shared memory, and what a chunk's tokens become before the products with
// the states. Included by kda_gradients.cu alone.
//
// 4 K threads, as two neighbouring channels of 8 tokens each ("eighths") where a token's channels are independent, and
// as warps of 16 tokens and 32 channels around products.
#pragma once

#include "kernels/cuda/kda_common.cuh"

namespace deltapipe::kernels::cuda::kda {
namespace {

template <int K>
struct Shared {
  static constexpr int row = K + 8;  // fp32 rows of pairs then fall into different banks
  static constexpr int tile = chunk_tokens * K * 2, matrix = K * K * 2;
  static constexpr int warps = K / 8, parts = K / 32;
  // Three tiles, a matrix, three tiles. The matrix is the chunk's state; the tiles are the operands' on one side and
  // dstate's and v_new's on the other, and change sides from chunk to chunk: what comes next is fetched into what the
  // products with the states no longer need.
  std::uint8_t area[6 * tile + matrix];
  std::uint8_t d_o[tile];      // swizzled; then dv
  std::uint8_t minus_y[tile];  // [V, 64] in 8x8 tiles
  union {
    struct {  // strictly lower, swizzled
      std::uint8_t da[chunk_tokens * chunk_tokens * 2], dm[chunk_tokens * chunk_tokens * 2];
    };
    float outgoing[8 * K];  // by eighth: what its tokens add to dg before it
  };
  float c[chunk_tokens * row];         // then dg, then by eighth the sums of df
  float g_first[4 * K], total[4 * K];  // as in kda_prepare.cu
  float up[4 * K];                     // decay from before a block to its end
  float down[4 * K];                   // decay from a block's first token to the next block's
  float dot[K];                        // sum over V of state times dstate; then dg after the chunk's last token
  union {
    float part[8 * K];  // by eighth: the sum of the gates of its tokens
    struct {
      float end_sum[4 * K];                    // by block: sum over tokens of k dkg
      float row_sums[parts][chunk_tokens][3];  // by 32 channels: k by_b, q dq, k dk
    };
  };
  float y_dot_v[parts][chunk_tokens];
  float diagonal[chunk_tokens];  // of dAqk
  float da_log[warps];
  Tokens tokens;
  std::uint64_t values_full, state_full, dstate_full;

  /// side: 0 or 1. q, k, f, then operands: scale q times the decay from the block's first token; then dq,
  __device__ __forceinline__ std::uint8_t* qp(int side) { return area + side * (3 * tile + matrix); }
  /// beta k, likewise; then dk,
  __device__ __forceinline__ std::uint8_t* bp(int side) { return qp(side) + tile; }
  /// k times the decay to the block's last token.
  __device__ __forceinline__ std::uint8_t* kt(int side) { return qp(side) + 2 * tile; }
  __device__ __forceinline__ std::uint8_t* state() { return area + 3 * tile; }  // [V, K] in 8x8 tiles, as dstate
  __device__ __forceinline__ std::uint8_t* dstate(int side) { return qp(1 - side); }
  __device__ __forceinline__ std::uint8_t* v_new(int side) { return dstate(side) + matrix; }  // [V, 64] in 8x8 tiles
};

/// Two neighbouring channels of 8 tokens: what a thread owns of a chunk.
template <int K>
struct Eighth {
  int pair, index, block;  // channels 2 pair and 2 pair + 1; tokens 8 index to 8 index + 7
  bool leads;              // the first of its block
  __device__ __forceinline__ explicit Eighth(int thread)
      : pair(thread % (K / 2)), index(thread / (K / 2)), block(index / 2), leads(index % 2 == 0) {}
  /// The bits of its tokens, from the block's.
  __device__ __forceinline__ unsigned starts(unsigned of_block) const {
    return leads ? of_block & 0xffu : of_block >> 8;
  }
};

/// What a warp works at around products: 16 tokens, 32 channels.
struct Part {
  int lane, warp, block, part;
  int channel;  // the lane's first; the others are the next, and 8, 16 and 24 further
  int rows[2];  // the lane's tokens
  __device__ __forceinline__ explicit Part(int thread)
      : lane(thread % 32),
        warp(thread / 32),
        block(warp % 4),
        part(warp / 4),
        channel(32 * part + lane % 4 * 2),
        rows{16 * block + lane / 4, 16 * block + lane / 4 + 8} {}
};

/// A lane's share of its warp's 16 tokens and 32 channels, as accumulators: by_q, by_b and by_k are the gradients of
/// (scale q), (beta k) and (k) through the decays.
struct Rows {
  float by_q[4][4], by_b[4][4], by_k[4][4];
  float2 dg[4][2];
};

/// ldmatrix address of four 8x8 tiles of a matrix `groups` tiles wide: (r, c), then by `order` (r, c + 1), (r + 1, c)
/// or (r + 1, c), (r, c + 1), then (r + 1, c + 1).
template <bool rows_first>
__device__ __forceinline__ std::uint32_t tiles_address(const void* base, int groups, int r, int c, int lane) {
  const int m = lane >> 3;
  const int tile = (r + (rows_first ? m & 1 : m >> 1)) * groups + c + (rows_first ? m >> 1 : m & 1);
  return shared_address(base) + tile * 128 + (lane & 7) * 16;
}

/// The eighth's decays, as if its block began with it, into c; their sums and the block's first gate into shared
/// memory.
template <int K>
__device__ __forceinline__ void sum_gates(const Problem& p, const Place& at, Shared<K>& s, const Eighth<K>& own,
                                          const Ahead& ahead, const std::uint8_t* tile, float (&c)[8][2]) {
  std::uint32_t f[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int from = own.index * 16 * K + piece_offset<K>(i, own.pair / 4) + own.pair % 4 * 4;
    f[i] = *reinterpret_cast<const std::uint32_t*>(tile + from);
  }
  float g_first[2];
  cumulate(f, p.gate_lower_bound, ahead.rate, ahead.bias, own.starts(s.tokens.starts(own.block)), own.leads,
           at.tokens - 8 * own.index, c, g_first);
  const int x = 2 * own.pair;
  *reinterpret_cast<float2*>(s.part + own.index * K + x) = {c[7][0], c[7][1]};
  if (own.leads) *reinterpret_cast<float2*>(s.g_first + own.block * K + x) = {g_first[0], g_first[1]};
}

/// After a barrier: decays between blocks, and q, k and f replaced by operands. whole: no document starts inside the
/// block.
template <int K, bool whole>
__device__ __forceinline__ void build_operands(Shared<K>& s, const Eighth<K>& own, int side, float (&c)[8][2]) {
  const unsigned starts = s.tokens.starts(own.block), late = starts >> 8;
  const int x = 2 * own.pair, first = own.leads ? 0 : 8;
  const float2 sum0 = *reinterpret_cast<const float2*>(s.part + 2 * own.block * K + x);
  const float2 sum1 = *reinterpret_cast<const float2*>(s.part + (2 * own.block + 1) * K + x);
  const bool cut = !whole && late != 0;
  const float2 end = {cut ? sum1.x : sum0.x + sum1.x, cut ? sum1.y : sum0.y + sum1.y};
  if (!own.leads) {
    const float2 total = whole ? end : float2{-INFINITY, -INFINITY};
    const float2 g = *reinterpret_cast<const float2*>(s.g_first + own.block * K + x);
    float2 next = {0.0f, 0.0f};
    if (own.block < 3) next = *reinterpret_cast<const float2*>(s.g_first + (own.block + 1) * K + x);
    const int to = own.block * K + x;
    *reinterpret_cast<float2*>(s.total + to) = total;
    *reinterpret_cast<float2*>(s.up + to) = {exp2_fast(g.x + total.x), exp2_fast(g.y + total.y)};
    *reinterpret_cast<float2*>(s.down + to) = {exp2_fast(total.x + next.x), exp2_fast(total.y + next.y)};
    if (total.x < -range_limit || total.y < -range_limit) s.tokens.exact[own.block] = 1;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (whole || (late & ((2u << i) - 1u)) == 0) {
        c[i][0] += sum0.x;
        c[i][1] += sum0.y;
      }
    }
  }
  std::uint8_t *qp = s.qp(side), *bp = s.bp(side), *kt = s.kt(side);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int token = 8 * own.index + i;
    const int to = own.index * 16 * K + piece_offset<K>(i, own.pair / 4) + own.pair % 4 * 4;
    const auto qw = *reinterpret_cast<const std::uint32_t*>(qp + to);
    const auto kw = *reinterpret_cast<const std::uint32_t*>(bp + to);
    const float4 row = s.tokens.row[token];
    float2 in = {exp2_fast(c[i][0]), exp2_fast(c[i][1])};
    float2 out = {exp2_fast(end.x - c[i][0]), exp2_fast(end.y - c[i][1])};
    if (!whole) {
      if (!reached(starts, first + i)) in = {0.0f, 0.0f};
      if (!reaches(starts, first + i)) out = {0.0f, 0.0f};
    }
    *reinterpret_cast<float2*>(s.c + token * Shared<K>::row + x) = {c[i][0], c[i][1]};
    *reinterpret_cast<std::uint32_t*>(qp + to) = pack(low(qw) * (row.x * in.x), high(qw) * (row.x * in.y));
    *reinterpret_cast<std::uint32_t*>(bp + to) = pack(-low(kw) * (row.y * in.x), -high(kw) * (row.y * in.y));
    *reinterpret_cast<std::uint32_t*>(kt + to) = pack(low(kw) * (row.z * out.x), high(kw) * (row.z * out.y));
  }
}

/// dAqk and dM strictly below their diagonals, and dAqk's diagonal: a warp a pair of blocks.
template <int K>
__device__ __forceinline__ void build_products(Shared<K>& s, int side, int warp, int lane) {
  const std::uint8_t* v_new = s.v_new(side);
#pragma unroll 1
  for (int task = warp; task < 20; task += Shared<K>::warps) {
    const bool is_q = task < 10;
    const int pair = is_q ? task : task - 10;
    const int i = pair < 1 ? 0 : pair < 3 ? 1 : pair < 6 ? 2 : 3, j = pair - i * (i + 1) / 2;
    float acc[2][4] = {};
#pragma unroll
    for (int n = 0; n < K / 16; ++n) {
      std::uint32_t a[4], b[4];
      if (is_q) {
        load_matrices(a, shared_address(s.d_o) + block_offset<K>(16 * i, 16 * n, lane));
      } else {
        load_matrices_transposed(a, tiles_address<false>(s.minus_y, 8, 2 * n, 2 * i, lane));
      }
      load_matrices_transposed(b, tiles_address<true>(v_new, 8, 2 * n, 2 * j, lane));
      mma(acc[0], a, b[0], b[1]);
      mma(acc[1], a, b[2], b[3]);
    }
    std::uint8_t* to = is_q ? s.da : s.dm;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const int r = 16 * i + lane / 4 + 4 * e, c = 16 * j + 8 * h + lane % 4 * 2;
        const float x = acc[h][e], y = acc[h][e + 1];
        if (is_q && c == r) s.diagonal[r] = x;
        if (is_q && c + 1 == r) s.diagonal[r] = y;
        *reinterpret_cast<std::uint32_t*>(to + piece_offset<chunk_tokens>(r, c / 8) + lane % 4 * 4) =
            pack(c < r ? x : 0.0f, c + 1 < r ? y : 0.0f);
      }
    }
  }
}

}  // namespace
}  // namespace deltapipe::kernels::cuda::kda
