#include "kernels/cpu/kda_chunk.h"

#include "kernels/cpu/common.h"
#include "kernels/cpu/small_gemm.h"

#include <algorithm>
#include <limits>

namespace deltapipe::kernels::cpu::kda {
namespace {

constexpr std::int64_t C = chunk_tokens;
constexpr std::int64_t B = block_tokens;
constexpr double norm_eps = 1e-6;

template <class T>
void exp_in_place(T* x, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) x[i] = vexp(x[i]);
}

template <class T>
void add(const T* a, const T* b, T* out, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) out[i] = a[i] + b[i];
}

/// Normalised q and k, beta, and g (into c.e), token by token.
template <class T>
void load_tokens(const Head<T>& h, Chunk<T>& c) {
  const std::int64_t K = h.k_dim;
  for (std::int64_t i = 0; i < c.n; ++i) {
    const std::int64_t t = c.first + i;
    const T *q = h.q + t * h.row_k, *k = h.k + t * h.row_k;
    const T rq = T(1) / std::sqrt(dot(q, q, K) + static_cast<T>(norm_eps));
    const T rk = T(1) / std::sqrt(dot(k, k, K) + static_cast<T>(norm_eps));
    const T beta = sigmoid(h.b[t * h.row_b]);
    c.rq[i] = rq;
    c.rk[i] = rk;
    c.beta[i] = beta;
    T *out_q = c.qb + 2 * i * K, *out_b = out_q + K, *out_k = c.k + i * K;
    const T scale_q = h.scale * rq;
#pragma omp simd
    for (std::int64_t x = 0; x < K; ++x) {
      const T kx = k[x] * rk;
      out_q[x] = q[x] * scale_q;
      out_k[x] = kx;
      out_b[x] = beta * kx;
    }
    if (h.start[t] == t) {
      std::fill_n(c.e + i * K, K, -std::numeric_limits<T>::infinity());
    } else {
      h.gate.forward(h.f + t * h.row_k, h.dt_bias, K, c.e + i * K);
    }
  }
}

/// All decays of the chunk from g in c.e: sums first, then one exp of each.
template <class T>
void build_decays(std::int64_t K, Chunk<T>& c) {
  const T* g = c.e;
  const std::int64_t blocks = c.blocks();
  for (std::int64_t j = 0; j < blocks; ++j) {
    const std::int64_t a = j * B, m = c.block_size(j);
    T *pre = c.pre + a * K, *tail = c.tail + a * K;
    std::fill_n(pre, K, T(0));
    for (std::int64_t i = 1; i < m; ++i) add(pre + (i - 1) * K, g + (a + i) * K, pre + i * K, K);
    std::fill_n(tail + (m - 1) * K, K, T(0));
    for (std::int64_t i = m - 2; i >= 0; --i) add(tail + (i + 1) * K, g + (a + i + 1) * K, tail + i * K, K);
  }
  const auto last_pre = [&](std::int64_t j) { return c.pre + (j * B + c.block_size(j) - 1) * K; };
  std::copy_n(g, K, c.head);
  for (std::int64_t i = 1; i < blocks; ++i) {
    const T* g_first = g + i * B * K;
    add(c.head + (i - 1) * K, last_pre(i - 1), c.head + i * K, K);
    add(c.head + i * K, g_first, c.head + i * K, K);
    for (std::int64_t j = 0; j + 1 < i; ++j) {
      T* gap = c.gap + c.gap_index(j, i) * K;
      add(c.gap + c.gap_index(j, i - 1) * K, last_pre(i - 1), gap, K);
      add(gap, g_first, gap, K);
    }
    std::copy_n(g_first, K, c.gap + c.gap_index(i - 1, i) * K);
  }
  std::fill_n(c.rear + (blocks - 1) * K, K, T(0));
  for (std::int64_t j = blocks - 2; j >= 0; --j) {
    T* rear = c.rear + j * K;
    add(c.rear + (j + 1) * K, last_pre(j + 1), rear, K);
    add(rear, g + (j + 1) * B * K, rear, K);
  }
  add(c.head + (blocks - 1) * K, last_pre(blocks - 1), c.decay, K);

  exp_in_place(c.e, c.n * K);
  exp_in_place(c.pre, c.n * K);
  exp_in_place(c.tail, c.n * K);
  exp_in_place(c.head, blocks * K);
  exp_in_place(c.rear, blocks * K);
  exp_in_place(c.gap, blocks * (blocks - 1) / 2 * K);
  exp_in_place(c.decay, K);
}

template <class T>
void scale_keys_and_queries(std::int64_t K, Chunk<T>& c) {
  for (std::int64_t i = 0; i < c.n; ++i) {
    const T *pre = c.pre + i * K, *head = c.head + i / B * K, *tail = c.tail + i * K, *rear = c.rear + i / B * K;
    const T *q = c.qb + 2 * i * K, *b = q + K, *k = c.k + i * K;
    T *qg = c.qbg + 2 * i * K, *bg = qg + K, *kg = c.kg + i * K;
#pragma omp simd
    for (std::int64_t x = 0; x < K; ++x) {
      const T decay = pre[x] * head[x];
      qg[x] = q[x] * decay;
      bg[x] = b[x] * decay;
      kg[x] = k[x] * (tail[x] * rear[x]);
    }
  }
}

/// Aqk and M into c.pair, zero above their diagonals.
template <class T>
void build_pairs(std::int64_t K, Chunk<T>& c, Scratch<T>& s) {
  const std::int64_t blocks = c.blocks();
  if (blocks > 1) {
    const std::int64_t rows = (blocks - 1) * B;
#pragma omp simd
    for (std::int64_t x = 0; x < rows * K; ++x) s.keys_gap[x] = c.k[x] * c.tail[x];
    transpose(rows, K, s.keys_gap, K, s.keys, C);
  }
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t a = block * B, m = c.block_size(block);
    T* out = c.pair + 2 * a * C;
    for (std::int64_t row = 0; row < 2 * m; ++row) std::fill(out + row * C + a, out + (row + 1) * C, T(0));
    if (a > 0) {
      for (std::int64_t i = 0; i < m; ++i) {
        const T *pre = c.pre + (a + i) * K, *q = c.qb + 2 * (a + i) * K;
        T* row = s.anchored + 2 * i * K;
#pragma omp simd
        for (std::int64_t x = 0; x < K; ++x) {
          row[x] = q[x] * pre[x];
          row[K + x] = q[K + x] * pre[x];
        }
      }
      for (std::int64_t x = 0; x < K; ++x) {
        for (std::int64_t j = 0; j < block; ++j) {
          const T gap = c.gap[c.gap_index(j, block) * K + x];
          const T* in = s.keys + x * C + j * B;
          T* row = s.keys_gap + x * C + j * B;
#pragma omp simd
          for (std::int64_t y = 0; y < B; ++y) row[y] = in[y] * gap;
        }
      }
      small_gemm<false>(2 * m, a, K, s.anchored, K, 1, s.keys_gap, C, out, C);
    }
    for (std::int64_t j = 0; j < m; ++j) {
      const T* k = c.k + (a + j) * K;
      T* run = s.run;  // k_j times the decay from j to i
      std::copy_n(k, K, run);
      out[2 * j * C + a + j] = dot(c.qb + 2 * (a + j) * K, k, K);
      for (std::int64_t i = j + 1; i < m; ++i) {
        const T *e = c.e + (a + i) * K, *q = c.qb + 2 * (a + i) * K, *b = q + K;
        T by_q = 0, by_b = 0;
#pragma omp simd reduction(+ : by_q, by_b)
        for (std::int64_t x = 0; x < K; ++x) {
          const T r = run[x] * e[x];
          run[x] = r;
          by_q += r * q[x];
          by_b += r * b[x];
        }
        out[2 * i * C + a + j] = by_q;
        out[(2 * i + 1) * C + a + j] = by_b;
      }
    }
  }
}

/// The odd rows of c.pair: M -> A = (I + M)^-1, by forward substitution in blocks of 16 rows.
template <class T>
void invert(Chunk<T>& c) {
  constexpr std::int64_t ld = 2 * C;
  T* const matrix = c.pair + C;
  T product[B * C], diagonal[B * B], negative[B * B];
  for (std::int64_t block = 0; block < c.blocks(); ++block) {
    const std::int64_t a = block * B, m = c.block_size(block);
    T* rows = matrix + a * ld;
    for (std::int64_t i = 0; i < m; ++i) {
      T row[B] = {};
      row[i] = T(1);
      for (std::int64_t j = 0; j < i; ++j) {
        const T x = rows[i * ld + a + j];
        for (std::int64_t y = 0; y < B; ++y) row[y] -= x * diagonal[j * B + y];
      }
      for (std::int64_t y = 0; y < B; ++y) {
        diagonal[i * B + y] = row[y];
        negative[i * B + y] = -row[y];
      }
    }
    if (a > 0) {
      small_gemm<false>(m, a, a, rows, ld, 1, matrix, ld, product, C);
      small_gemm<false>(m, a, m, negative, B, 1, product, C, rows, ld);
    }
    for (std::int64_t i = 0; i < m; ++i) std::copy_n(diagonal + i * B, m, rows + i * ld + a);
  }
}

/// out [n, columns] (=, +=) L in, L lower triangular [n, n]: each block of rows stops at its own diagonal.
template <bool accumulate, class T>
void lower_product(std::int64_t n, std::int64_t columns, const T* l, std::int64_t ldl, const T* in, std::int64_t ld_in,
                   T* out, std::int64_t ld_out) {
  for (std::int64_t a = 0; a < n; a += B) {
    const std::int64_t m = std::min(B, n - a);
    small_gemm<accumulate>(m, columns, a + m, l + a * ldl, ldl, 1, in, ld_in, out + a * ld_out, ld_out);
  }
}

/// The same with L transposed: each block of rows begins at its own diagonal.
template <bool accumulate, class T>
void lower_transposed_product(std::int64_t n, std::int64_t columns, const T* l, std::int64_t ldl, const T* in,
                              std::int64_t ld_in, T* out, std::int64_t ld_out) {
  for (std::int64_t a = 0; a < n; a += B) {
    const std::int64_t m = std::min(B, n - a);
    small_gemm<accumulate>(m, columns, n - a, l + a * ldl + a, 1, ldl, in + a * ld_in, ld_in, out + a * ld_out, ld_out);
  }
}

template <class T>
void scale_rows(const T* by, std::int64_t rows, std::int64_t columns, T* x) {
  for (std::int64_t i = 0; i < rows; ++i) {
#pragma omp simd
    for (std::int64_t j = 0; j < columns; ++j) x[i * columns + j] *= by[i];
  }
}

}  // namespace

template <class T>
Chunk<T>::Chunk(Carver<T>& carver, std::int64_t k_dim, std::int64_t v_dim, bool gradients)
    : qb(carver.take(2 * C * k_dim)),
      k(carver.take(C * k_dim)),
      qbg(carver.take(2 * C * k_dim)),
      kg(carver.take(C * k_dim)),
      pair(carver.take(2 * C * C)),
      beta(carver.take(C)),
      rq(carver.take(C)),
      rk(carver.take(C)),
      e(carver.take(C * k_dim)),
      pre(carver.take(C * k_dim)),
      tail(carver.take(C * k_dim)),
      head(carver.take(chunk_blocks * k_dim)),
      rear(carver.take(chunk_blocks * k_dim)),
      gap(carver.take(block_pairs * k_dim)),
      decay(carver.take(k_dim)),
      z(gradients ? carver.take(2 * C * v_dim) : nullptr),
      v_new(gradients ? carver.take(C * v_dim) : nullptr),
      state(gradients ? carver.take(k_dim * v_dim) : nullptr),
      dstate(gradients ? carver.take(k_dim * v_dim) : nullptr) {}

template <class T>
Scratch<T>::Scratch(Carver<T>& carver, std::int64_t k_dim, std::int64_t v_dim, std::int64_t columns, bool gradients)
    : state(carver.take(k_dim * columns)),
      ps(carver.take(2 * C * columns)),
      v_new(carver.take(C * columns)),
      anchored(carver.take(2 * B * k_dim)),
      keys(carver.take(C * k_dim)),
      keys_gap(carver.take(C * k_dim)),
      run(carver.take(k_dim)),
      dqk(gradients ? carver.take(2 * C * k_dim) : nullptr),
      dkg(gradients ? carver.take(C * k_dim) : nullptr),
      products(gradients ? carver.take(2 * C * C) : nullptr),
      inner(gradients ? carver.take(2 * C * k_dim) : nullptr),
      reached(gradients ? carver.take(C * k_dim) : nullptr),
      wide(gradients ? carver.take(C * k_dim) : nullptr),
      state_t(gradients ? carver.take(k_dim * v_dim) : nullptr),
      v_new_t(gradients ? carver.take(C * v_dim) : nullptr),
      rows(gradients ? carver.take(4 * k_dim) : nullptr) {}

template <class T>
void prepare_chunk(const Head<T>& h, std::int64_t first, std::int64_t n, Chunk<T>& c, Scratch<T>& s) {
  c.first = first;
  c.n = n;
  load_tokens(h, c);
  build_decays(h.k_dim, c);
  scale_keys_and_queries(h.k_dim, c);
  build_pairs(h.k_dim, c, s);
  invert(c);
}

template <class T>
void advance_state(const Head<T>& h, const Chunk<T>& c, std::int64_t columns, T* state, T* v_new, T* o, Scratch<T>& s) {
  const std::int64_t K = h.k_dim, V = h.v_dim, n = c.n;
  if (o != nullptr) {
    small_gemm<false>(2 * n, columns, K, c.qbg, K, 1, state, columns, s.ps, columns);
  } else {
    small_gemm<false>(n, columns, K, c.qbg + K, 2 * K, 1, state, columns, s.ps + columns, 2 * columns);
  }
  for (std::int64_t i = 0; i < n; ++i) {
    const T* v = h.v + (c.first + i) * h.row_v;
    T* rhs = s.ps + (2 * i + 1) * columns;
    const T beta = c.beta[i];
#pragma omp simd
    for (std::int64_t x = 0; x < V; ++x) rhs[x] = beta * v[x] - rhs[x];
#pragma omp simd
    for (std::int64_t x = V; x < columns; ++x) rhs[x] = -rhs[x];
  }
  lower_product<false>(n, columns, c.pair + C, 2 * C, s.ps + columns, 2 * columns, v_new, columns);
  if (o != nullptr) {
    for (std::int64_t i = 0; i < n; ++i) std::copy_n(s.ps + 2 * i * columns, V, o + i * h.row_v);
    lower_product<true>(n, V, c.pair, 2 * C, v_new, columns, o, h.row_v);
  }
  scale_rows(c.decay, K, columns, state);
  small_gemm<true>(K, columns, n, c.kg, 1, K, v_new, columns, state, columns);
}

template <class T>
void retreat_state(const Head<T>& h, const Chunk<T>& c, const T* d_o, T* dstate, T* z, Scratch<T>& s) {
  const std::int64_t K = h.k_dim, V = h.v_dim, n = c.n;
  T* dv_new = s.v_new;
  small_gemm<false>(n, V, K, c.kg, K, 1, dstate, V, dv_new, V);
  lower_transposed_product<true>(n, V, c.pair, 2 * C, d_o, h.row_v, dv_new, V);
  lower_transposed_product<false>(n, V, c.pair + C, 2 * C, dv_new, V, z + V, 2 * V);
  for (std::int64_t i = 0; i < n; ++i) {
    T* row = z + 2 * i * V;
    std::copy_n(d_o + i * h.row_v, V, row);
#pragma omp simd
    for (std::int64_t x = V; x < 2 * V; ++x) row[x] = -row[x];
  }
  scale_rows(c.decay, K, V, dstate);
  small_gemm<true>(K, V, 2 * n, c.qbg, 1, K, z, V, dstate, V);
}

template struct Chunk<float>;
template struct Chunk<double>;
template struct Scratch<float>;
template struct Scratch<double>;
template void prepare_chunk(const Head<float>&, std::int64_t, std::int64_t, Chunk<float>&, Scratch<float>&);
template void prepare_chunk(const Head<double>&, std::int64_t, std::int64_t, Chunk<double>&, Scratch<double>&);
template void advance_state(const Head<float>&, const Chunk<float>&, std::int64_t, float*, float*, float*,
                            Scratch<float>&);
template void advance_state(const Head<double>&, const Chunk<double>&, std::int64_t, double*, double*, double*,
                            Scratch<double>&);
template void retreat_state(const Head<float>&, const Chunk<float>&, const float*, float*, float*, Scratch<float>&);
template void retreat_state(const Head<double>&, const Chunk<double>&, const double*, double*, double*,
                            Scratch<double>&);

}  // namespace deltapipe::kernels::cpu::kda
