// The gradients of one chunk, after both scans: all of it state-free products, in parallel over chunks.
#include "kernels/cpu/common.h"
#include "kernels/cpu/kda_chunk.h"
#include "kernels/cpu/small_gemm.h"

#include <algorithm>

namespace deltapipe::kernels::cpu::kda {
namespace {

constexpr std::int64_t C = chunk_tokens;
constexpr std::int64_t B = block_tokens;

/// From s.products (rows dAqk_i and dM_i), decays left out of neither side:
///   s.inner   [n, 2, K]  sum over j < i of dAqk_ij k_j D_ij, and of dM_ij k_j D_ij
///   s.reached [n, K]     sum over i > j of (dAqk_ij scale q_i + dM_ij beta_i k_i) D_ij
/// The diagonal of Aqk has no decay and is left to the caller.
template <class T>
void pair_gradients(std::int64_t K, const Chunk<T>& c, Scratch<T>& s) {
  const std::int64_t blocks = c.blocks();
  std::fill_n(s.reached, c.n * K, T(0));
  std::fill_n(s.inner, 2 * std::min(B, c.n) * K, T(0));  // the first block has no blocks before it
  if (blocks > 1) {
#pragma omp simd
    for (std::int64_t x = 0; x < (blocks - 1) * B * K; ++x) s.keys[x] = c.k[x] * c.tail[x];
  }
  for (std::int64_t block = 1; block < blocks; ++block) {
    const std::int64_t a = block * B, m = c.block_size(block);
    for (std::int64_t j = 0; j < a; ++j) {
      const T *in = s.keys + j * K, *gap = c.gap + c.gap_index(j / B, block) * K;
      T* out = s.keys_gap + j * K;
#pragma omp simd
      for (std::int64_t x = 0; x < K; ++x) out[x] = in[x] * gap[x];
    }
    const T* products = s.products + 2 * a * C;
    T* inner = s.inner + 2 * a * K;
    small_gemm<false>(2 * m, K, a, products, C, 1, s.keys_gap, K, inner, K);
    for (std::int64_t i = 0; i < m; ++i) {
      const T *pre = c.pre + (a + i) * K, *q = c.qb + 2 * (a + i) * K;
      T *row = s.anchored + 2 * i * K, *in = inner + 2 * i * K;
#pragma omp simd
      for (std::int64_t x = 0; x < K; ++x) {
        row[x] = q[x] * pre[x];
        row[K + x] = q[K + x] * pre[x];
        in[x] *= pre[x];
        in[K + x] *= pre[x];
      }
    }
    small_gemm<false>(a, K, 2 * m, products, 1, C, s.anchored, K, s.wide, K);
    for (std::int64_t j = 0; j < a; ++j) {
      const T *wide = s.wide + j * K, *tail = c.tail + j * K, *gap = c.gap + c.gap_index(j / B, block) * K;
      T* out = s.reached + j * K;
#pragma omp simd
      for (std::int64_t x = 0; x < K; ++x) out[x] += wide[x] * tail[x] * gap[x];
    }
  }
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t a = block * B, end = a + c.block_size(block);
    for (std::int64_t j = a; j < end; ++j) {
      const T* k = c.k + j * K;
      T *decay = s.run, *reached = s.reached + j * K;
      std::fill_n(decay, K, T(1));
      for (std::int64_t i = j + 1; i < end; ++i) {
        const T by_q = s.products[2 * i * C + j], by_b = s.products[(2 * i + 1) * C + j];
        const T *e = c.e + i * K, *q = c.qb + 2 * i * K, *b = q + K;
        T *inner_q = s.inner + 2 * i * K, *inner_b = inner_q + K;
#pragma omp simd
        for (std::int64_t x = 0; x < K; ++x) {
          const T d = decay[x] * e[x];
          const T kd = k[x] * d;
          decay[x] = d;
          inner_q[x] += by_q * kd;
          inner_b[x] += by_b * kd;
          reached[x] += (by_q * q[x] + by_b * b[x]) * d;
        }
      }
    }
  }
}

/// dx = r (dn - n (n . dn)) of x -> n = r x, r = 1 / sqrt(x . x + eps), with dn = factor * d and projection = n . dn.
template <class T>
void norm_backward(const T* x, T r, const T* d, T factor, T projection, std::int64_t n, T* dx) {
  const T along = r * projection;
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) dx[i] = r * (factor * d[i] - x[i] * along);
}

/// Everything token by token, from the last to the first, since dg_t sums dG over t and the tokens after it.
template <class T>
void token_gradients(const Head<T>& h, const Chunk<T>& c, const HeadGradients<T>& out, T* sums, Scratch<T>& s) {
  const std::int64_t K = h.k_dim, V = h.v_dim;
  T *dq = s.rows, *dk = s.rows + K, *dg = s.rows + 2 * K, *none = s.rows + 3 * K;
  std::fill_n(none, K, T(0));
  std::fill_n(sums, K + 1, T(0));
  // G_end enters through the state's decay and through kg; dkg becomes dkg * (decay of kg).
  for (std::int64_t x = 0; x < K; ++x) dg[x] = c.decay[x] * dot(c.state + x * V, c.dstate + x * V, V);
  for (std::int64_t i = 0; i < c.n; ++i) {
    const T *tail = c.tail + i * K, *rear = c.rear + i / B * K, *k = c.k + i * K;
    T* dkg = s.dkg + i * K;
#pragma omp simd
    for (std::int64_t x = 0; x < K; ++x) {
      dkg[x] *= tail[x] * rear[x];
      dg[x] += k[x] * dkg[x];
    }
  }
  for (std::int64_t i = c.n - 1; i >= 0; --i) {
    const std::int64_t t = c.first + i;
    const T *pre = c.pre + i * K, *head = c.head + i / B * K;
    const T *q = c.qb + 2 * i * K, *k = c.k + i * K;
    const T *dqg = s.dqk + 2 * i * K, *dbg = dqg + K, *dkg = s.dkg + i * K;
    const T *inner_q = s.inner + 2 * i * K, *inner_b = inner_q + K, *reached = s.reached + i * K;
    const T diagonal = s.products[2 * i * C + i], beta = c.beta[i];
    T dbeta = 0, along_q = 0, along_k = 0;
#pragma omp simd reduction(+ : dbeta, along_q, along_k)
    for (std::int64_t x = 0; x < K; ++x) {
      const T decay = pre[x] * head[x];
      const T by_q = dqg[x] * decay + inner_q[x];
      const T by_b = dbg[x] * decay + inner_b[x];
      const T by_k = dkg[x] + reached[x];
      const T dqx = by_q + diagonal * k[x];
      const T dkx = beta * by_b + by_k + diagonal * q[x];
      dq[x] = dqx;
      dk[x] = dkx;
      dg[x] += q[x] * by_q + k[x] * (beta * by_b - by_k);
      dbeta += k[x] * by_b;
      along_q += q[x] * dqx;
      along_k += k[x] * dkx;
    }
    norm_backward(h.q + t * h.row_k, c.rq[i], dq, h.scale, along_q, K, out.dq + t * h.row_k);
    norm_backward(h.k + t * h.row_k, c.rk[i], dk, T(1), along_k, K, out.dk + t * h.row_k);

    const bool starts = h.start[t] == t;  // no decay reaches across: neither g_t nor earlier tokens see later ones
    sums[K] += h.gate.backward(starts ? none : dg, h.f + t * h.row_k, h.dt_bias, K, out.df + t * h.row_k, sums);
    if (starts) std::fill_n(dg, K, T(0));

    const T *minus_y = c.z + (2 * i + 1) * V, *v = h.v + t * h.row_v;
    T* dv = out.dv + t * h.row_v;
    T by_v = 0;
#pragma omp simd reduction(+ : by_v)
    for (std::int64_t x = 0; x < V; ++x) {
      dv[x] = -beta * minus_y[x];
      by_v += minus_y[x] * v[x];
    }
    out.db[t * h.row_b] = (dbeta - by_v) * beta * (T(1) - beta);
  }
}

}  // namespace

template <class T>
void chunk_gradients(const Head<T>& h, const Chunk<T>& c, const HeadGradients<T>& out, T* sums, Scratch<T>& s) {
  const std::int64_t K = h.k_dim, V = h.v_dim, n = c.n;
  transpose(K, V, c.state, V, s.state_t, K);
  small_gemm<false>(2 * n, K, V, c.z, V, 1, s.state_t, K, s.dqk, K);
  transpose(K, V, c.dstate, V, s.state_t, K);
  small_gemm<false>(n, K, V, c.v_new, V, 1, s.state_t, K, s.dkg, K);
  transpose(n, V, c.v_new, V, s.v_new_t, C);
  for (std::int64_t a = 0; a < n; a += B) {
    const std::int64_t m = std::min(B, n - a);
    small_gemm<false>(2 * m, a + m, V, c.z + 2 * a * V, V, 1, s.v_new_t, C, s.products + 2 * a * C, C);
  }
  pair_gradients(K, c, s);
  token_gradients(h, c, out, sums, s);
}

template void chunk_gradients(const Head<float>&, const Chunk<float>&, const HeadGradients<float>&, float*,
                              Scratch<float>&);
template void chunk_gradients(const Head<double>&, const Chunk<double>&, const HeadGradients<double>&, double*,
                              Scratch<double>&);

}  // namespace deltapipe::kernels::cpu::kda
