// The parts of the gradients kernel: its shared memory, what a chunk's tokens become before the products with the
// states, and what becomes of the gradients after them. Included by kda_gradients.cu alone.
#pragma once

#include "kernels/cuda/kda_common.cuh"

namespace deltapipe::kernels::cuda::kda {
namespace {

template <int K>
struct Shared {
  static constexpr int row = K + 8;  // fp32 rows of pairs then fall into different banks
  union {
    struct {
      std::uint8_t state[K * K * 2], dstate[K * K * 2];  // [V, K] in 8x8 tiles
      std::uint8_t v_new[K * chunk_tokens * 2];          // [V, 64] in 8x8 tiles
    };
    float dg[chunk_tokens * row];  // once the products with the states are done
  };
  std::uint8_t d_o[chunk_tokens * K * 2];      // swizzled; then dv
  std::uint8_t minus_y[K * chunk_tokens * 2];  // [V, 64] in 8x8 tiles
  std::uint8_t qp[chunk_tokens * K * 2];  // swizzled: scale q times the decay from the block's first token; then dq
  std::uint8_t bp[chunk_tokens * K * 2];  // beta k, likewise; then dk
  std::uint8_t kt[chunk_tokens * K * 2];  // k times the decay to the block's last token
  std::uint8_t da[chunk_tokens * chunk_tokens * 2], dm[chunk_tokens * chunk_tokens * 2];  // strictly lower, swizzled
  float c[chunk_tokens * row];
  float g_first[4 * K], total[4 * K];  // as in kda_prepare.cu
  float state_dot[K];                  // sum over V of state times dstate
  float end_sum[4][K];                 // by block: sum over tokens of k dkg
  float outgoing[4][K];                // by block: what a block's tokens add to dg before it
  float row_sums[4][chunk_tokens][3];  // by 32 channels: k by_b, q dq, k dk
  float y_dot_v[2][chunk_tokens];
  float diagonal[chunk_tokens];  // of dAqk
  float da_log[8];
  Tokens tokens;
  std::uint64_t values_full, states_full;
};

template <int threads>
__device__ __forceinline__ void group_sync(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(threads) : "memory");
}

/// ldmatrix address of four 8x8 tiles of a matrix `groups` tiles wide: (r, c), then by `order` (r, c + 1), (r + 1, c)
/// or (r + 1, c), (r, c + 1), then (r + 1, c + 1).
template <bool rows_first>
__device__ __forceinline__ std::uint32_t tiles_address(const void* base, int groups, int r, int c, int lane) {
  const int m = lane >> 3;
  const int tile = (r + (rows_first ? m & 1 : m >> 1)) * groups + c + (rows_first ? m >> 1 : m & 1);
  return shared_address(base) + tile * 128 + (lane & 7) * 16;
}

/// The warp's share of the first half: decays and scaled operands of the chunk. threads: 2 K.
template <int K>
__device__ __forceinline__ void build_operands(const Problem& p, const Place& at, Shared<K>& s, int thread) {
  Tokens& t = s.tokens;
  const Share<K> own(thread);
  std::uint32_t q[16], k[16], f[16];
  load_share<K>(q, p.q, p, at, own);
  load_share<K>(k, p.k, p, at, own);
  load_share<K>(f, p.f, p, at, own);
  sum_squares<K>(t, q, k, own, thread % 32);
  if (thread < 64) load_tokens(t, p, at, thread);
  group_sync<2 * K>(1);
  if (thread < 64) finish_tokens<K>(t, thread);
  group_sync<2 * K>(1);
  const int first = own.block * 16, x = 2 * own.pair;
  float c[16][2], g_first[2];
  const unsigned starts = t.starts(own.block);
  cumulate(f, p.gate_lower_bound, expf(p.a_log[at.head]),
           reinterpret_cast<const float2*>(p.dt_bias)[at.head * (K / 2) + own.pair], starts, at.tokens - first, c, g_first);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    *reinterpret_cast<float2*>(s.c + (first + i) * Shared<K>::row + x) = {c[i][0], c[i][1]};
  }
  const bool whole = reached(starts, 15);
  const float total0 = whole ? c[15][0] : -INFINITY, total1 = whole ? c[15][1] : -INFINITY;
  if (total0 < -range_limit || total1 < -range_limit) t.exact[own.block] = 1;
  *reinterpret_cast<float2*>(s.g_first + own.block * K + x) = {g_first[0], g_first[1]};
  *reinterpret_cast<float2*>(s.total + own.block * K + x) = {total0, total1};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int token = first + i;
    const bool before = reached(starts, i), after = reaches(starts, i);
    const float rq = p.scale * t.rq[token], rk = t.rk[token], beta = t.beta[token];
    const float k0 = low(k[i]) * rk, k1 = high(k[i]) * rk;
    const float d0 = before ? exp2_fast(c[i][0]) : 0.0f, d1 = before ? exp2_fast(c[i][1]) : 0.0f;
    const float e0 = after ? exp2_fast(c[15][0] - c[i][0]) : 0.0f;
    const float e1 = after ? exp2_fast(c[15][1] - c[i][1]) : 0.0f;
    const int to = piece_offset<K>(token, own.pair / 4) + own.pair % 4 * 4;
    *reinterpret_cast<std::uint32_t*>(s.qp + to) = pack(low(q[i]) * rq * d0, high(q[i]) * rq * d1);
    *reinterpret_cast<std::uint32_t*>(s.bp + to) = pack(beta * k0 * d0, beta * k1 * d1);
    *reinterpret_cast<std::uint32_t*>(s.kt + to) = pack(k0 * e0, k1 * e1);
  }
}

/// The other half's share: s.d_o, then dAqk and dM strictly below their diagonals. threads: 2 K.
template <int K>
__device__ __forceinline__ void build_products(const Problem& p, const Place& at, const std::uint16_t* d_o,
                                               Shared<K>& s, int thread) {
  const int lane = thread % 32;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int task = thread + n * 2 * K, r = task / (K / 8), piece = task % (K / 8);
    const bool live = r < at.tokens;
    const std::size_t from = (at.first + (live ? static_cast<std::size_t>(r) * p.heads : 0)) * K + piece * 8;
    copy_async_16(shared_address(s.d_o) + piece_offset<K>(r, piece), d_o + from, live);
  }
  copy_async_commit();
  copy_async_wait<0>();
  group_sync<2 * K>(2);
  barrier_wait(&s.values_full, 0);
#pragma unroll 1
  for (int task = thread / 32; task < 8; task += K / 16) {
    const int i = task < 4 ? task : 7 - task;
    const bool is_q = task < 4;
    float acc[4][2][4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[j][0][e] = acc[j][1][e] = 0.0f;
    }
#pragma unroll 2
    for (int n = 0; n < K / 16; ++n) {
      std::uint32_t a[4];
      if (is_q) {
        load_matrices(a, shared_address(s.d_o) + block_offset<K>(16 * i, 16 * n, lane));
      } else {
        load_matrices_transposed(a, tiles_address<false>(s.minus_y, 8, 2 * n, 2 * i, lane));
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j > i) break;
        std::uint32_t b[4];
        load_matrices_transposed(b, tiles_address<true>(s.v_new, 8, 2 * n, 2 * j, lane));
        mma(acc[j][0], a, b[0], b[1]);
        mma(acc[j][1], a, b[2], b[3]);
      }
    }
    std::uint8_t* to = is_q ? s.da : s.dm;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j > i) break;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          const int r = 16 * i + lane / 4 + 4 * e, c = 16 * j + 8 * h + lane % 4 * 2;
          const float x = acc[j][h][e], y = acc[j][h][e + 1];
          if (is_q && c == r) s.diagonal[r] = x;
          if (is_q && c + 1 == r) s.diagonal[r] = y;
          *reinterpret_cast<std::uint32_t*>(to + piece_offset<chunk_tokens>(r, c / 8) + lane % 4 * 4) =
              pack(c < r ? x : 0.0f, c + 1 < r ? y : 0.0f);
        }
      }
    }
  }
}

/// acc [16, 32] times 2^(x + y) by channel.
__device__ __forceinline__ void rescale(float (&acc)[4][4], const float* x, const float* y) {
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    float2 d = *reinterpret_cast<const float2*>(x + 8 * n);
    if (y != nullptr) {
      const float2 e = *reinterpret_cast<const float2*>(y + 8 * n);
      d.x += e.x;
      d.y += e.y;
    }
    d.x = exp2_fast(d.x);
    d.y = exp2_fast(d.y);
    acc[n][0] *= d.x;
    acc[n][1] *= d.y;
    acc[n][2] *= d.x;
    acc[n][3] *= d.y;
  }
}
__device__ __forceinline__ void rescale(float (&acc)[4][4], float (&other)[4][4], const float* x, const float* y) {
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    float2 d = *reinterpret_cast<const float2*>(x + 8 * n);
    if (y != nullptr) {
      const float2 e = *reinterpret_cast<const float2*>(y + 8 * n);
      d.x += e.x;
      d.y += e.y;
    }
    d.x = exp2_fast(d.x);
    d.y = exp2_fast(d.y);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      acc[n][e] *= e & 1 ? d.y : d.x;
      other[n][e] *= e & 1 ? d.y : d.x;
    }
  }
}

template <int K>
__device__ __forceinline__ float square_at(const std::uint8_t* square, int r, int c) {
  const auto bits = *reinterpret_cast<const std::uint16_t*>(square + piece_offset<chunk_tokens>(r, c / 8) + c % 8 * 2);
  return __uint_as_float(static_cast<std::uint32_t>(bits) << 16);
}

/// Adds the pairs inside an exact block, one by one. Lanes as in an accumulator; channel: the lane's first.
template <int K>
__device__ __noinline__ void add_exact_pairs(const Problem& p, const Place& at, const Shared<K>& s, int block,
                                             int channel, float (&by_q)[4][4], float (&by_b)[4][4],
                                             float (&by_k)[4][4]) {
  const Tokens& t = s.tokens;
  const int lane = threadIdx.x % 32;
  const std::size_t stride = static_cast<std::size_t>(p.heads) * (K / 2);
  const auto* q = reinterpret_cast<const std::uint32_t*>(p.q) + at.first * (K / 2) + channel / 2;
  const auto* k = reinterpret_cast<const std::uint32_t*>(p.k) + at.first * (K / 2) + channel / 2;
#pragma unroll 1
  for (int other = 16 * block; other < min(16 * block + 16, at.tokens); ++other) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int own = 16 * block + lane / 4 + 8 * h;
      if (own >= at.tokens || own == other) continue;
      const bool earlier = other < own;  // then it is the key, else the query
      const int query = earlier ? own : other, key = earlier ? other : own;
      if (key < t.origin[query]) continue;
      const float da = square_at<K>(s.da, query, key), dm = square_at<K>(s.dm, query, key);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float2 cq = *reinterpret_cast<const float2*>(s.c + query * Shared<K>::row + channel + 8 * n);
        const float2 ck = *reinterpret_cast<const float2*>(s.c + key * Shared<K>::row + channel + 8 * n);
        const float d0 = exp2_fast(cq.x - ck.x), d1 = exp2_fast(cq.y - ck.y);
        const std::uint32_t kw = k[other * stride + 4 * n];
        const float k0 = low(kw) * t.rk[other] * d0, k1 = high(kw) * t.rk[other] * d1;
        if (earlier) {
          by_q[n][2 * h] += da * k0;
          by_q[n][2 * h + 1] += da * k1;
          by_b[n][2 * h] += dm * k0;
          by_b[n][2 * h + 1] += dm * k1;
        } else {
          const std::uint32_t qw = q[other * stride + 4 * n];
          const float rq = p.scale * t.rq[other], beta = t.beta[other];
          by_k[n][2 * h] += da * low(qw) * rq * d0 + dm * beta * k0;
          by_k[n][2 * h + 1] += da * high(qw) * rq * d1 + dm * beta * k1;
        }
      }
    }
  }
}

/// dg by token, then df and this chunk's sums of the gate's parameters. threads: 2 K.
template <int K>
__device__ __forceinline__ void gate_gradients(const Problem& p, const Place& at, Shared<K>& s, const Gradients& out,
                                               float* sums, int thread, const std::uint32_t (&f)[16]) {
  const Tokens& t = s.tokens;
  const Share<K> own(thread);
  const int first = own.block * 16, x = 2 * own.pair;
  const unsigned starts = t.starts(own.block);
  float local0 = 0.0f, local1 = 0.0f;
#pragma unroll
  for (int i = 15; i >= 0; --i) {
    const float2 d = *reinterpret_cast<const float2*>(s.dg + (first + i) * Shared<K>::row + x);
    const bool begins = starts >> i & 1u;
    local0 = begins ? 0.0f : local0 + d.x;
    local1 = begins ? 0.0f : local1 + d.y;
  }
  *reinterpret_cast<float2*>(&s.outgoing[own.block][x]) = {local0, local1};
  // The chunk's last decay also scales the state: its part is the outgoing state times its gradient.
  float decay0 = 0.0f, decay1 = 0.0f, run0 = 0.0f, run1 = 0.0f;
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    decay0 += s.g_first[b * K + x] + s.total[b * K + x];
    decay1 += s.g_first[b * K + x + 1] + s.total[b * K + x + 1];
    run0 += s.end_sum[b][x];
    run1 += s.end_sum[b][x + 1];
  }
  run0 += exp2_fast(decay0) * s.state_dot[x];
  run1 += exp2_fast(decay1) * s.state_dot[x + 1];
  group_sync<2 * K>(1);
#pragma unroll
  for (int b = 3; b > 0; --b) {
    if (b <= own.block) break;
    const bool cut = t.starts(b) != 0;
    run0 = s.outgoing[b][x] + (cut ? 0.0f : run0);
    run1 = s.outgoing[b][x + 1] + (cut ? 0.0f : run1);
  }
  const float rate = expf(p.a_log[at.head]);
  const float2 bias = reinterpret_cast<const float2*>(p.dt_bias)[at.head * (K / 2) + own.pair];
  auto* df = reinterpret_cast<std::uint32_t*>(out.df) +
             (at.first + static_cast<std::size_t>(first) * p.heads) * (K / 2) + own.pair;
  const std::size_t stride = static_cast<std::size_t>(p.heads) * (K / 2);
  float da = 0.0f, bias0 = 0.0f, bias1 = 0.0f;
  const auto walk = [&](const auto& gate) {
#pragma unroll
    for (int i = 15; i >= 0; --i) {
      const float2 d = *reinterpret_cast<const float2*>(s.dg + (first + i) * Shared<K>::row + x);
      const bool begins = starts >> i & 1u;
      run0 += d.x;
      run1 += d.y;
      if (first + i < at.tokens) {
        const float y0 = gate.backward(low(f[i]) + bias.x, begins ? 0.0f : run0, da);
        const float y1 = gate.backward(high(f[i]) + bias.y, begins ? 0.0f : run1, da);
        df[i * stride] = pack(y0, y1);
        bias0 += y0;
        bias1 += y1;
      }
      run0 = begins ? 0.0f : run0;
      run1 = begins ? 0.0f : run1;
    }
  };
  if (p.gate_lower_bound == 0.0f) {
    walk(Gate<false>{rate, 0.0f});
  } else {
    walk(Gate<true>{rate, p.gate_lower_bound});
  }
#pragma unroll
  for (int step = 16; step >= 1; step /= 2) da += __shfl_xor_sync(0xffffffffu, da, step);
  if (thread % 32 == 0) s.da_log[thread / 32] = da;
  group_sync<2 * K>(1);  // everyone has read outgoing
  *reinterpret_cast<float2*>(&s.outgoing[own.block][x]) = {bias0, bias1};
  group_sync<2 * K>(1);
  if (thread < K) {
    sums[thread] = (s.outgoing[0][thread] + s.outgoing[1][thread]) + (s.outgoing[2][thread] + s.outgoing[3][thread]);
  } else if (thread == K) {
    float all = 0.0f;
    for (int n = 0; n < K / 16; ++n) all += s.da_log[n];
    sums[K] = all;
  }
}

/// The words of v that value_gradients needs.
template <int K>
__device__ __forceinline__ void load_values(std::uint32_t (&v)[16], const Problem& p, const Place& at, int thread) {
  const int warp = thread / 32, lane = thread % 32, block = warp % 4, part = warp / 4;
  const auto* words = reinterpret_cast<const std::uint32_t*>(p.v) + at.first * (K / 2) + lane % 4;
  const std::size_t stride = static_cast<std::size_t>(p.heads) * (K / 2);
#pragma unroll
  for (int n = 0; n < 16; ++n) {
    const int r = 16 * block + lane / 4 + (n & 1) * 8, piece = 2 * (4 * part + n / 4) + n / 2 % 2;
    v[n] = r < at.tokens ? words[r * stride + piece * 4] : 0u;
  }
}

/// dv (into s.d_o) and y . v of every token. threads: 2 K.
template <int K>
__device__ __forceinline__ void value_gradients(const Place& at, Shared<K>& s, int thread,
                                                const std::uint32_t (&v)[16]) {
  const int warp = thread / 32, lane = thread % 32, block = warp % 4, part = warp / 4;
  const Tokens& t = s.tokens;
  const int r0 = 16 * block + lane / 4, r1 = r0 + 8;
  float dot0 = 0.0f, dot1 = 0.0f;
#pragma unroll
  for (int group = 0; group < 4; ++group) {
    const int n = 4 * part + group;
    std::uint32_t y[4];  // tokens r0, r1, r0, r1; columns 16 n + 2 (lane % 4), and 8 further
    load_matrices_transposed(y, tiles_address<false>(s.minus_y, 8, 2 * n, 2 * block, lane));
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int r = m & 1 ? r1 : r0, piece = 2 * n + m / 2;
      const std::uint32_t w = v[4 * group + m];
      float& dot = m & 1 ? dot1 : dot0;
      dot -= low(y[m]) * low(w) + high(y[m]) * high(w);
      const float beta = -t.beta[r];
      *reinterpret_cast<std::uint32_t*>(s.d_o + piece_offset<K>(r, piece) + lane % 4 * 4) =
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
