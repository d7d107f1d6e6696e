// Products of matrices that fit in the caches, without packing or a library call: KDA multiplies [16 .. 128]-row
// operands hundreds of times a step, where a BLAS call would mostly prepare itself.
#pragma once

#include <cstdint>

namespace deltapipe::kernels::cpu {

namespace small_gemm_detail {

constexpr int vector_bytes = 32;
constexpr int tile_rows = 6;  // 6 rows x 2 vectors of sums, 2 of B and a broadcast fill the 16 AVX registers

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(vector_bytes), aligned(sizeof(T)), may_alias));
};

template <class T, int rows, int vectors, bool accumulate>
inline void tile(std::int64_t k, const T* a, std::int64_t row_a, std::int64_t col_a, const T* b, std::int64_t ldb, T* c,
                 std::int64_t ldc) {
  using Vec = typename Vector<T>::type;
  constexpr std::int64_t width = vector_bytes / sizeof(T);
  Vec sum[rows][vectors] = {};
  for (std::int64_t p = 0; p < k; ++p, a += col_a, b += ldb) {
    Vec row[vectors];
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) row[j] = *reinterpret_cast<const Vec*>(b + j * width);
#pragma GCC unroll 6
    for (int i = 0; i < rows; ++i) {
      const T x = a[i * row_a];
#pragma GCC unroll 2
      for (int j = 0; j < vectors; ++j) sum[i][j] += x * row[j];
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) {
      Vec* out = reinterpret_cast<Vec*>(c + i * ldc + j * width);
      *out = accumulate ? *out + sum[i][j] : sum[i][j];
    }
  }
}

/// m <= rows rows of C over all columns of a panel of `vectors` vectors.
template <class T, int rows, int vectors, bool accumulate>
inline void any_rows(std::int64_t m, std::int64_t k, const T* a, std::int64_t row_a, std::int64_t col_a, const T* b,
                     std::int64_t ldb, T* c, std::int64_t ldc) {
  if (m == rows) {
    tile<T, rows, vectors, accumulate>(k, a, row_a, col_a, b, ldb, c, ldc);
  } else if constexpr (rows > 1) {
    any_rows<T, rows - 1, vectors, accumulate>(m, k, a, row_a, col_a, b, ldb, c, ldc);
  }
}

}  // namespace small_gemm_detail

/// C [m, n] = A B, or C += A B when `accumulate`. A(i, p) is a[i * row_a + p * col_a]: (ld, 1) reads A as stored,
/// (1, ld) reads its transpose. B [k, n] and C have rows ldb and ldc elements apart. C aliases neither.
/// Every sum runs over p in order, whatever m and n are.
template <bool accumulate, class T>
void small_gemm(std::int64_t m, std::int64_t n, std::int64_t k, const T* a, std::int64_t row_a, std::int64_t col_a,
                const T* b, std::int64_t ldb, T* c, std::int64_t ldc) {
  using namespace small_gemm_detail;
  constexpr std::int64_t width = vector_bytes / sizeof(T);
  std::int64_t j = 0;
  for (; j + 2 * width <= n; j += 2 * width) {
    for (std::int64_t i = 0; i < m; i += tile_rows) {
      any_rows<T, tile_rows, 2, accumulate>(m - i < tile_rows ? m - i : tile_rows, k, a + i * row_a, row_a, col_a,
                                            b + j, ldb, c + i * ldc + j, ldc);
    }
  }
  for (; j + width <= n; j += width) {
    for (std::int64_t i = 0; i < m; i += tile_rows) {
      any_rows<T, tile_rows, 1, accumulate>(m - i < tile_rows ? m - i : tile_rows, k, a + i * row_a, row_a, col_a,
                                            b + j, ldb, c + i * ldc + j, ldc);
    }
  }
  for (; j < n; ++j) {
    for (std::int64_t i = 0; i < m; ++i) {
      T sum = 0;
      for (std::int64_t p = 0; p < k; ++p) sum += a[i * row_a + p * col_a] * b[p * ldb + j];
      c[i * ldc + j] = accumulate ? c[i * ldc + j] + sum : sum;
    }
  }
}

/// out [n, m] = in [m, n] transposed; rows are ld_in and ld_out elements apart.
template <class T>
void transpose(std::int64_t m, std::int64_t n, const T* in, std::int64_t ld_in, T* out, std::int64_t ld_out) {
  constexpr std::int64_t block = 8;
  for (std::int64_t i = 0; i < m; i += block) {
    const std::int64_t rows = m - i < block ? m - i : block;
    for (std::int64_t j = 0; j < n; ++j) {
      for (std::int64_t r = 0; r < rows; ++r) out[j * ld_out + i + r] = in[(i + r) * ld_in + j];
    }
  }
}

}  // namespace deltapipe::kernels::cpu
