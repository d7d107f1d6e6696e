// Products of segment maps: small fp32 matrices, [K, K] by [K, columns] a head.
#include "kernels/cuda/kda_kernels.h"

namespace deltapipe::kernels::cuda::kda {
namespace {

constexpr int tile = 32;

/// A block of threads [8, 32] makes a [32, 32] tile; a thread four of its rows.
__global__ void multiply_add_kernel(int rows, int columns, const float* a, bool transpose, const float* b,
                                    const float* c, float* out) {
  __shared__ float left[tile][tile + 1], right[tile][tile + 1];
  const int x = threadIdx.x, y = threadIdx.y, column = blockIdx.x * tile + x, first = blockIdx.y * tile;
  a += static_cast<std::size_t>(blockIdx.z) * rows * rows;
  b += static_cast<std::size_t>(blockIdx.z) * rows * columns;
  const std::size_t at = static_cast<std::size_t>(blockIdx.z) * rows * columns;
  float sum[4] = {};
  for (int m = 0; m < rows; m += tile) {
    for (int i = y; i < tile; i += 8) {
      if (transpose) {
        left[x][i] = first + x < rows && m + i < rows ? a[(m + i) * rows + first + x] : 0.0f;
      } else {
        left[i][x] = first + i < rows && m + x < rows ? a[(first + i) * rows + m + x] : 0.0f;
      }
      right[i][x] = m + i < rows && column < columns ? b[(m + i) * columns + column] : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < tile; ++k) {
#pragma unroll
      for (int n = 0; n < 4; ++n) sum[n] += left[y + 8 * n][k] * right[k][x];
    }
    __syncthreads();
  }
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int row = first + y + 8 * n;
    if (row < rows && column < columns) {
      const std::size_t to = at + static_cast<std::size_t>(row) * columns + column;
      out[to] = sum[n] + (c != nullptr ? c[to] : 0.0f);
    }
  }
}

}  // namespace

cudaError_t multiply_add(int n, int rows, int columns, const float* a, bool transpose, const float* b, const float* c,
                         float* out, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((columns + tile - 1) / tile), static_cast<unsigned>((rows + tile - 1) / tile),
                  static_cast<unsigned>(n));
  multiply_add_kernel<<<grid, dim3(tile, 8), 0, stream>>>(rows, columns, a, transpose, b, c, out);
  return cudaGetLastError();
}

}  // namespace deltapipe::kernels::cuda::kda
