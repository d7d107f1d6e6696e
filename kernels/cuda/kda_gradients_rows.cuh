// The rest of the gradients kernel's parts: the products with the states and the pairs of a chunk, and what becomes of
// the gradients after them. Included by kda_gradients.cu alone.
#pragma once

#include "kernels/cuda/kda_gradients.cuh"

namespace deltapipe::kernels::cuda::kda {
namespace {

/// Products with the states: of d_o, y and v_new. Overwrites r but for r.dg, relative to the chunk's ends.
template <int K>
__device__ __forceinline__ void multiply_states(Shared<K>& s, int side, const Part& own, Rows& r) {
  const int lane = own.lane, warp = own.warp, block = own.block, part = own.part;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) r.by_q[n][e] = r.by_b[n][e] = r.by_k[n][e] = 0.0f;
  }
  const std::uint8_t *state = s.state(), *dstate = s.dstate(side);
  {  // channels 8 warp to 8 warp + 7
    float dot0 = 0.0f, dot1 = 0.0f;
#pragma unroll 4
    for (int n = 0; n < K / 8; ++n) {
      const int from = (n * (K / 8) + warp) * 128 + lane * 4;
      const auto x = *reinterpret_cast<const std::uint32_t*>(state + from);
      const auto y = *reinterpret_cast<const std::uint32_t*>(dstate + from);
      dot0 += low(x) * low(y);
      dot1 += high(x) * high(y);
    }
#pragma unroll
    for (int step = 4; step <= 16; step *= 2) {
      dot0 += __shfl_xor_sync(0xffffffffu, dot0, step);
      dot1 += __shfl_xor_sync(0xffffffffu, dot1, step);
    }
    if (lane < 4) *reinterpret_cast<float2*>(s.dot + 8 * warp + 2 * lane) = {dot0, dot1};
  }
#pragma unroll 2
  for (int n = 0; n < K / 16; ++n) {
    std::uint32_t d_o[4], y[4], v_new[4];
    load_matrices(d_o, shared_address(s.d_o) + block_offset<K>(16 * block, 16 * n, lane));
    load_matrices_transposed(y, tiles_address<false>(s.minus_y, 8, 2 * n, 2 * block, lane));
    load_matrices_transposed(v_new, tiles_address<false>(s.v_new(side), 8, 2 * n, 2 * block, lane));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      std::uint32_t b[4];
      load_matrices_transposed(b, tiles_address<true>(state, K / 8, 2 * n, 4 * part + 2 * h, lane));
      mma(r.by_q[2 * h], d_o, b[0], b[1]);
      mma(r.by_q[2 * h + 1], d_o, b[2], b[3]);
      mma(r.by_b[2 * h], y, b[0], b[1]);
      mma(r.by_b[2 * h + 1], y, b[2], b[3]);
      load_matrices_transposed(b, tiles_address<true>(dstate, K / 8, 2 * n, 4 * part + 2 * h, lane));
      mma(r.by_k[2 * h], v_new, b[0], b[1]);
      mma(r.by_k[2 * h + 1], v_new, b[2], b[3]);
    }
  }
}

/// acc [16, 32] times d by channel.
__device__ __forceinline__ void rescale(float (&acc)[4][4], const float* d) {
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const float2 x = *reinterpret_cast<const float2*>(d + 8 * n);
    acc[n][0] *= x.x;
    acc[n][1] *= x.y;
    acc[n][2] *= x.x;
    acc[n][3] *= x.y;
  }
}
/// acc [16, 32] times 2^g by channel.
__device__ __forceinline__ void rescale_log(float (&acc)[4][4], const float* g) {
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    float2 x = *reinterpret_cast<const float2*>(g + 8 * n);
    x = {exp2_fast(x.x), exp2_fast(x.y)};
    acc[n][0] *= x.x;
    acc[n][1] *= x.y;
    acc[n][2] *= x.x;
    acc[n][3] *= x.y;
  }
}

/// The rows h of by_q and by_b times `in`, of by_k times `out`.
__device__ __forceinline__ void scale_pair(float (&by_q)[4], float (&by_b)[4], float (&by_k)[4], int h, float2 in,
                                           float2 out) {
  by_q[2 * h] *= in.x;
  by_q[2 * h + 1] *= in.y;
  by_b[2 * h] *= in.x;
  by_b[2 * h + 1] *= in.y;
  by_k[2 * h] *= out.x;
  by_k[2 * h + 1] *= out.y;
}

/// A warp: x of channels n -> 8 n and 8 n + 1 past the lane's first, added up over the lanes of the same channels (lane
/// % 4), to[channel].
__device__ __forceinline__ void add_rows(float (&x)[8], float* to, int lane) {
#pragma unroll
  for (int power = 0; power < 3; ++power) {
    constexpr int first = 4;
    const int half = first >> power, step = 16 >> power;
    const bool upper = (lane & step) != 0;
#pragma unroll
    for (int i = 0; i < first; ++i) {
      if (i >= half) continue;
      const float give = upper ? x[i] : x[i + half], keep = upper ? x[i + half] : x[i];
      x[i] = keep + __shfl_xor_sync(0xffffffffu, give, step);
    }
  }
  to[8 * (2 * (lane >> 4) + (lane >> 3 & 1)) + 2 * (lane & 3) + (lane >> 2 & 1)] = x[0];
}

template <int K>
__device__ __forceinline__ float square_at(const std::uint8_t* square, int r, int c) {
  const auto bits = *reinterpret_cast<const std::uint16_t*>(square + piece_offset<chunk_tokens>(r, c / 8) + c % 8 * 2);
  return __uint_as_float(static_cast<std::uint32_t>(bits) << 16);
}

/// The lane's anchors moved to its block: by_q and by_b from the chunk's start to the block's last token (exact: to its
/// first), by_k from the chunk's end to the block's first token (exact: to its last), adding what other blocks and, but
/// for exact ones, the block itself contribute. Before that, what the chunk's end takes of dG goes to s.end_sum.
template <int K>
__device__ __forceinline__ void walk_blocks(Shared<K>& s, int side, const Part& own, bool exact, Rows& r) {
  const int lane = own.lane, block = own.block, part = own.part, channel = own.channel;
  const std::uint8_t *qp = s.qp(side), *bp = s.bp(side), *kt = s.kt(side);
  {  // What the chunk's end takes of dG, but for the decay from the next block on: sum over tokens of kt dkg.
    float sum[8];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int from = 4 * part + n;
      const auto k0 = *reinterpret_cast<const std::uint32_t*>(kt + piece_offset<K>(own.rows[0], from) + lane % 4 * 4);
      const auto k1 = *reinterpret_cast<const std::uint32_t*>(kt + piece_offset<K>(own.rows[1], from) + lane % 4 * 4);
      sum[2 * n] = low(k0) * r.by_k[n][0] + low(k1) * r.by_k[n][2];
      sum[2 * n + 1] = high(k0) * r.by_k[n][1] + high(k1) * r.by_k[n][3];
    }
    add_rows(sum, s.end_sum + block * K + 32 * part, lane);
  }
  // r.by_q, by_b: from the chunk's start to the block's last token (exact: to its first).
#pragma unroll 1
  for (int j = 0; j <= block; ++j) {
    if (j == block && exact) {
      rescale_log(r.by_q, s.g_first + block * K + channel);
      rescale_log(r.by_b, s.g_first + block * K + channel);
      break;
    }
    rescale(r.by_q, s.up + j * K + channel);
    rescale(r.by_b, s.up + j * K + channel);
    std::uint32_t da[4], dm[4];
    load_matrices(da, shared_address(s.da) + block_offset<chunk_tokens>(16 * block, 16 * j, lane));
    load_matrices(dm, shared_address(s.dm) + block_offset<chunk_tokens>(16 * block, 16 * j, lane));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      std::uint32_t b[4];
      load_matrices_transposed(b, shared_address(kt) + block_offset<K>(16 * j, 32 * part + 16 * h, lane));
      mma(r.by_q[2 * h], da, b[0], b[1]);
      mma(r.by_q[2 * h + 1], da, b[2], b[3]);
      mma(r.by_b[2 * h], dm, b[0], b[1]);
      mma(r.by_b[2 * h + 1], dm, b[2], b[3]);
    }
  }
  // by_k: from the chunk's end to the block's first token (exact: to its last).
#pragma unroll 1
  for (int i = 3; i >= block; --i) {
    if (i == block && exact) {
      if (block < 3) rescale_log(r.by_k, s.g_first + (block + 1) * K + channel);
      break;
    }
    rescale(r.by_k, s.down + i * K + channel);
    std::uint32_t da[4], dm[4];
    load_matrices_transposed(da, shared_address(s.da) + block_offset_right<chunk_tokens>(16 * i, 16 * block, lane));
    load_matrices_transposed(dm, shared_address(s.dm) + block_offset_right<chunk_tokens>(16 * i, 16 * block, lane));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      std::uint32_t b[4];
      load_matrices_transposed(b, shared_address(qp) + block_offset<K>(16 * i, 32 * part + 16 * h, lane));
      mma(r.by_k[2 * h], da, b[0], b[1]);
      mma(r.by_k[2 * h + 1], da, b[2], b[3]);
      load_matrices_transposed(b, shared_address(bp) + block_offset<K>(16 * i, 32 * part + 16 * h, lane));
      mma(r.by_k[2 * h], dm, b[0], b[1]);
      mma(r.by_k[2 * h + 1], dm, b[2], b[3]);
    }
  }
}

/// dG, then the rows, from the anchors to the tokens. What a pair of tokens adds to dG at the later one it takes away
/// at the earlier one, exactly, since both products use the same rounded operands: dg, a sum over the tokens after
/// both, would otherwise keep the difference.
template <int K>
__device__ __forceinline__ void move_to_tokens(Shared<K>& s, int side, const Part& own, bool exact, Rows& r) {
  const Tokens& t = s.tokens;
  const int lane = own.lane, block = own.block, part = own.part, channel = own.channel;
  const int(&rows)[2] = own.rows;
  const std::uint8_t *qp = s.qp(side), *bp = s.bp(side), *kt = s.kt(side);
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int x = channel + 8 * n;
    const float2 total = *reinterpret_cast<const float2*>(s.total + block * K + x);
    const float2 back = {exact ? 1.0f : exp2_fast(-total.x), exact ? 1.0f : exp2_fast(-total.y)};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int from = piece_offset<K>(rows[h], 4 * part + n) + lane % 4 * 4;
      const auto qw = *reinterpret_cast<const std::uint32_t*>(qp + from);
      const auto bw = *reinterpret_cast<const std::uint32_t*>(bp + from);
      const auto kw = *reinterpret_cast<const std::uint32_t*>(kt + from);
      r.dg[n][h].x = back.x * low(qw) * r.by_q[n][2 * h] + back.x * low(bw) * r.by_b[n][2 * h] -
                     back.x * low(kw) * r.by_k[n][2 * h];
      r.dg[n][h].y = back.y * high(qw) * r.by_q[n][2 * h + 1] + back.y * high(bw) * r.by_b[n][2 * h + 1] -
                     back.y * high(kw) * r.by_k[n][2 * h + 1];
    }
    if (exact) {
      const unsigned starts = t.starts(block);
      const float2 end = *reinterpret_cast<const float2*>(s.c + (16 * block + 15) * Shared<K>::row + x);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 c = *reinterpret_cast<const float2*>(s.c + rows[h] * Shared<K>::row + x);
        const bool before = reached(starts, rows[h] & 15), after = reaches(starts, rows[h] & 15);
        const float2 in = {before ? exp2_fast(c.x) : 0.0f, before ? exp2_fast(c.y) : 0.0f};
        const float2 out = {after ? exp2_fast(end.x - c.x) : 0.0f, after ? exp2_fast(end.y - c.y) : 0.0f};
        scale_pair(r.by_q[n], r.by_b[n], r.by_k[n], h, in, out);
      }
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 c = *reinterpret_cast<const float2*>(s.c + rows[h] * Shared<K>::row + x);
        const float2 in = {exp2_fast(c.x - total.x), exp2_fast(c.y - total.y)};
        const float2 out = {exp2_fast(-c.x), exp2_fast(-c.y)};
        scale_pair(r.by_q[n], r.by_b[n], r.by_k[n], h, in, out);
      }
    }
  }
}

/// Adds the pairs inside an exact block, one by one. Lanes as in an accumulator; channel: the lane's first.
template <int K>
__device__ __noinline__ void add_exact_pairs(const Problem& p, const Place at, const Shared<K>& s, int block,
                                             int channel, Rows& rows) {
  const Tokens& t = s.tokens;
  const unsigned starts = t.starts(block);
  const int lane = threadIdx.x % 32;
  const std::size_t stride = static_cast<std::size_t>(p.heads) * (K / 2);
  const auto* q = reinterpret_cast<const std::uint32_t*>(p.q) + at.first * (K / 2) + channel / 2;
  const auto* k = reinterpret_cast<const std::uint32_t*>(p.k) + at.first * (K / 2) + channel / 2;
#pragma unroll 1
  for (int h = 0; h < 2; ++h) {
    const int own = 16 * block + lane / 4 + 8 * h;
    if (own >= at.tokens) continue;
    float by_q[4][2] = {}, by_b[4][2] = {}, by_k[4][2] = {};
#pragma unroll 1
    for (int other = 16 * block; other < min(16 * block + 16, at.tokens); ++other) {
      if (own == other) continue;
      const bool earlier = other < own;  // then it is the key, else the query
      const int query = earlier ? own : other, key = earlier ? other : own;
      if (!reached(starts >> (key & 15), query - key)) continue;
      const float da = square_at<K>(s.da, query, key), dm = square_at<K>(s.dm, query, key);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float2 cq = *reinterpret_cast<const float2*>(s.c + query * Shared<K>::row + channel + 8 * n);
        const float2 ck = *reinterpret_cast<const float2*>(s.c + key * Shared<K>::row + channel + 8 * n);
        const float d0 = exp2_fast(cq.x - ck.x), d1 = exp2_fast(cq.y - ck.y);
        const std::uint32_t kw = k[other * stride + 4 * n];
        const float k0 = low(kw) * t.row[other].z * d0, k1 = high(kw) * t.row[other].z * d1;
        if (earlier) {
          by_q[n][0] += da * k0;
          by_q[n][1] += da * k1;
          by_b[n][0] += dm * k0;
          by_b[n][1] += dm * k1;
        } else {
          const std::uint32_t qw = q[other * stride + 4 * n];
          const float rq = t.row[other].x, beta = t.beta[other];
          by_k[n][0] += da * low(qw) * rq * d0 + dm * beta * k0;
          by_k[n][1] += da * high(qw) * rq * d1 + dm * beta * k1;
        }
      }
    }
    const float rq = t.row[own].x, rk = t.row[own].z, beta = t.beta[own];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const std::uint32_t qw = q[own * stride + 4 * n], kw = k[own * stride + 4 * n];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        rows.by_q[n][2 * h + e] += by_q[n][e];
        rows.by_b[n][2 * h + e] += by_b[n][e];
        rows.by_k[n][2 * h + e] += by_k[n][e];
      }
      rows.dg[n][h].x += low(qw) * rq * by_q[n][0] + low(kw) * rk * (beta * by_b[n][0] - by_k[n][0]);
      rows.dg[n][h].y += high(qw) * rq * by_q[n][1] + high(kw) * rk * (beta * by_b[n][1] - by_k[n][1]);
    }
  }
}

/// dG into s.c; dq and dk of the normalised vectors into by_q and by_k; sums over the part's channels into s.row_sums.
/// After a barrier. q, k: as load_rows.
template <int K>
__device__ __forceinline__ void finish_rows(Shared<K>& s, const Part& own, const std::uint32_t (&q)[4][2],
                                            const std::uint32_t (&k)[4][2], Rows& r) {
  const Tokens& t = s.tokens;
  const int lane = own.lane, part = own.part, channel = own.channel;
  const int(&rows)[2] = own.rows;
  float sums[2][3] = {};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float4 row = t.row[rows[h]];
    const float beta = t.beta[rows[h]], diagonal = s.diagonal[rows[h]];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float qx = (e ? high(q[n][h]) : low(q[n][h])) * row.x;
        const float kx = (e ? high(k[n][h]) : low(k[n][h])) * row.z;
        float &bq = r.by_q[n][2 * h + e], &bk = r.by_k[n][2 * h + e];
        const float bb = r.by_b[n][2 * h + e];
        bq += diagonal * kx;
        bk += beta * bb + diagonal * qx;
        sums[h][0] += kx * bb;
        sums[h][1] += qx * bq;
        sums[h][2] += kx * bk;
      }
      *reinterpret_cast<float2*>(s.c + rows[h] * Shared<K>::row + channel + 8 * n) = r.dg[n][h];
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int m = 0; m < 3; ++m) {
      float x = sums[h][m];
      x += __shfl_xor_sync(0xffffffffu, x, 1);
      x += __shfl_xor_sync(0xffffffffu, x, 2);
      if (lane % 4 == 0) s.row_sums[part][rows[h]][m] = x;
    }
  }
}

/// dq and dk, through the norms, in place of operands. After a barrier.
template <int K>
__device__ __forceinline__ void project_rows(Shared<K>& s, int side, const Part& own, const std::uint32_t (&q)[4][2],
                                             const std::uint32_t (&k)[4][2], const Rows& r) {
  const Tokens& t = s.tokens;
  const int lane = own.lane, part = own.part;
  const int(&rows)[2] = own.rows;
  std::uint8_t *qp = s.qp(side), *bp = s.bp(side);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float along_q = 0.0f, along_k = 0.0f;
#pragma unroll
    for (int m = 0; m < Shared<K>::parts; ++m) {
      along_q += s.row_sums[m][rows[h]][1];
      along_k += s.row_sums[m][rows[h]][2];
    }
    const float4 row = t.row[rows[h]];
    const float minus_q = -row.w * row.w * along_q, minus_k = -row.z * row.z * along_k;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int to = piece_offset<K>(rows[h], 4 * part + n) + lane % 4 * 4;
      *reinterpret_cast<std::uint32_t*>(qp + to) = pack(row.x * r.by_q[n][2 * h] + minus_q * low(q[n][h]),
                                                        row.x * r.by_q[n][2 * h + 1] + minus_q * high(q[n][h]));
      *reinterpret_cast<std::uint32_t*>(bp + to) = pack(row.z * r.by_k[n][2 * h] + minus_k * low(k[n][h]),
                                                        row.z * r.by_k[n][2 * h + 1] + minus_k * high(k[n][h]));
    }
  }
}

/// What an eighth's tokens add to dg before it; from the last eighth, dg after the chunk's last token: what the
/// chunk's last decay takes as a factor of keys and of the state. Before a barrier.
template <int K>
__device__ __forceinline__ void sum_dg(Shared<K>& s, const Eighth<K>& own) {
  const int x = 2 * own.pair;
  const unsigned starts = own.starts(s.tokens.starts(own.block));
  float2 sum = {0.0f, 0.0f};
#pragma unroll
  for (int i = 7; i >= 0; --i) {
    const float2 d = *reinterpret_cast<const float2*>(s.c + (8 * own.index + i) * Shared<K>::row + x);
    const bool begins = starts >> i & 1u;
    sum.x = begins ? 0.0f : sum.x + d.x;
    sum.y = begins ? 0.0f : sum.y + d.y;
  }
  *reinterpret_cast<float2*>(s.outgoing + own.index * K + x) = sum;
  if (own.index == 7) {
    float2 run = {0.0f, 0.0f}, rear = run;
#pragma unroll
    for (int b = 3; b >= 0; --b) {
      const float2 end = *reinterpret_cast<const float2*>(s.end_sum + b * K + x);
      run.x += end.x * exp2_fast(rear.x);
      run.y += end.y * exp2_fast(rear.y);
      const float2 g = *reinterpret_cast<const float2*>(s.g_first + b * K + x);
      const float2 w = *reinterpret_cast<const float2*>(s.total + b * K + x);
      rear.x += g.x + w.x;
      rear.y += g.y + w.y;
    }
    float2* dot = reinterpret_cast<float2*>(s.dot + x);
    *dot = {run.x + exp2_fast(rear.x) * dot->x, run.y + exp2_fast(rear.y) * dot->y};
  }
}

/// df, and this chunk's sums of the gate's parameters: into s.c and s.da_log. After a barrier.
template <int K>
__device__ __forceinline__ void gate_gradients(const Problem& p, const Place& at, Shared<K>& s, const Eighth<K>& own,
                                               float rate, float2 bias, std::uint16_t* out, const std::uint32_t (&f)[8],
                                               int warp, int lane) {
  const int x = 2 * own.pair;
  const unsigned starts = own.starts(s.tokens.starts(own.block));
  float2 run = *reinterpret_cast<const float2*>(s.dot + x);
#pragma unroll
  for (int b = 7; b > 0; --b) {
    if (b <= own.index) break;
    const float2 d = *reinterpret_cast<const float2*>(s.outgoing + b * K + x);
    const bool cut = (s.tokens.begins[b / 4] >> (b % 4 * 8) & 0xffu) != 0;
    run = {d.x + (cut ? 0.0f : run.x), d.y + (cut ? 0.0f : run.y)};
  }
  const std::size_t stride = static_cast<std::size_t>(p.heads) * (K / 2);
  auto* df = reinterpret_cast<std::uint32_t*>(out) + at.first * (K / 2) + 8 * own.index * stride + own.pair;
  float* dg = s.c + 8 * own.index * Shared<K>::row + x;
  const int live = at.tokens - 8 * own.index;
  float da = 0.0f;
  float2 sum = {0.0f, 0.0f};
  const auto walk = [&](const auto& gate) {
#pragma unroll
    for (int i = 7; i >= 0; --i) {
      const float2 d = *reinterpret_cast<const float2*>(dg + i * Shared<K>::row);
      const bool begins = starts >> i & 1u;
      run.x += d.x;
      run.y += d.y;
      if (i < live) {
        const float y0 = gate.backward(low(f[i]) + bias.x, begins ? 0.0f : run.x, da);
        const float y1 = gate.backward(high(f[i]) + bias.y, begins ? 0.0f : run.y, da);
        df[i * stride] = pack(y0, y1);
        sum.x += y0;
        sum.y += y1;
      }
      if (begins) run = {0.0f, 0.0f};
    }
  };
  if (p.gate_lower_bound == 0.0f) {
    walk(Gate<false>{rate, 0.0f});
  } else {
    walk(Gate<true>{rate, p.gate_lower_bound});
  }
#pragma unroll
  for (int step = 16; step >= 1; step /= 2) da += __shfl_xor_sync(0xffffffffu, da, step);
  if (lane == 0) s.da_log[warp] = da;
  *reinterpret_cast<float2*>(dg) = sum;
}

/// The lane's words of q or k.
template <int K>
__device__ __forceinline__ void load_rows(std::uint32_t (&x)[4][2], const std::uint16_t* from, const Problem& p,
                                          const Place& at, const Part& own) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const auto* words = reinterpret_cast<const std::uint32_t*>(
        from + (at.first + static_cast<std::size_t>(own.rows[h]) * p.heads) * K + own.channel);
#pragma unroll
    for (int n = 0; n < 4; ++n) x[n][h] = own.rows[h] < at.tokens ? words[4 * n] : 0u;
  }
}
/// An eighth's words of f.
template <int K>
__device__ __forceinline__ void load_eighth(std::uint32_t (&x)[8], const std::uint16_t* from, const Problem& p,
                                            const Place& at, const Eighth<K>& own) {
  const std::size_t stride = static_cast<std::size_t>(p.heads) * (K / 2);
  const auto* words = reinterpret_cast<const std::uint32_t*>(from) + at.first * (K / 2) + own.pair;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int token = 8 * own.index + i;
    x[i] = token < at.tokens ? words[token * stride] : 0u;
  }
}

/// dv (into s.d_o) and y . v of every token. v: as load_rows.
template <int K>
__device__ __forceinline__ void value_gradients(Shared<K>& s, const Part& own, const std::uint32_t (&v)[4][2]) {
  const int lane = own.lane, block = own.block, part = own.part, r0 = own.rows[0], r1 = own.rows[1];
  const float beta0 = -s.tokens.beta[r0], beta1 = -s.tokens.beta[r1];
  float dot0 = 0.0f, dot1 = 0.0f;
#pragma unroll
  for (int group = 0; group < 2; ++group) {
    const int n = 2 * part + group;
    std::uint32_t y[4];  // tokens r0, r1, r0, r1; columns 16 n + 2 (lane % 4), and 8 further
    load_matrices_transposed(y, tiles_address<false>(s.minus_y, 8, 2 * n, 2 * block, lane));
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const std::uint32_t w = v[2 * group + m / 2][m & 1];
      float& dot = m & 1 ? dot1 : dot0;
      dot -= low(y[m]) * low(w) + high(y[m]) * high(w);
      const float beta = m & 1 ? beta1 : beta0;
      *reinterpret_cast<std::uint32_t*>(s.d_o + piece_offset<K>(m & 1 ? r1 : r0, 2 * n + m / 2) + lane % 4 * 4) =
          pack(beta * low(y[m]), beta * high(y[m]));
    }
  }
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    dot0 += __shfl_xor_sync(0xffffffffu, dot0, step);
    dot1 += __shfl_xor_sync(0xffffffffu, dot1, step);
  }
  if (lane % 4 == 0) {
    s.y_dot_v[part][r0] = dot0;
    s.y_dot_v[part][r1] = dot1;
  }
}

}  // namespace
}  // namespace deltapipe::kernels::cuda::kda
