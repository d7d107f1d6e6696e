#include "kernels/cuda/launches.h"
#include "kernels/cuda/vector.cuh"

#include <algorithm>

namespace deltapipe::kernels::cuda {
namespace {

constexpr int threads = 256;
// Eight elements a thread and step, whatever the type: the order of additions does not depend on where x lies.
constexpr int width = 8;
constexpr std::int64_t step = static_cast<std::int64_t>(threads) * width;
constexpr std::int64_t most_partials = 1056;  // eight blocks on each of an H100's 132 multiprocessors
constexpr std::int64_t smallest_chunk = 8 * step;

/// Elements of one block: a multiple of `step`.
std::int64_t chunk_of(std::int64_t n) {
  const std::int64_t even = (n + most_partials - 1) / most_partials;
  return std::max(smallest_chunk, (even + step - 1) / step * step);
}

/// Sums of squares of [block * chunk, ...); `out` gets one sum a block, or, with `only`, takes the sum of the one
/// block.
template <class T>
__global__ void __launch_bounds__(threads)
    squares(const T* x, std::int64_t n, std::int64_t chunk, bool aligned, double* out, bool only) {
  __shared__ double shared[32];
  const std::int64_t begin = blockIdx.x * chunk, end = begin + chunk < n ? begin + chunk : n;
  double sum[1] = {0};
  std::int64_t i = begin + threadIdx.x * width;
  const auto add = [&](const Pack<T, width>& p) {
    Compute<T> v[width];
    p.get(v);
#pragma unroll
    for (int j = 0; j < width; ++j) sum[0] += static_cast<double>(v[j]) * static_cast<double>(v[j]);
  };
  if (aligned) {
    constexpr int packs = 4;
    for (; i + (packs - 1) * step + width <= end; i += packs * step) {
      Pack<T, width> p[packs];
#pragma unroll
      for (int u = 0; u < packs; ++u) p[u].template load<true>(x + i + u * step);
#pragma unroll
      for (int u = 0; u < packs; ++u) add(p[u]);
    }
  }
  for (; i < end; i += step) {
    Pack<T, width> p;
    p.template load<false>(x + i, end - i < width ? static_cast<int>(end - i) : width);
    add(p);
  }
  block_sum(sum, shared);
  if (threadIdx.x == 0) out[blockIdx.x] = only ? out[0] + sum[0] : sum[0];
}

constexpr int sum_columns = 32, sum_lanes = 8;  // threads of a block along columns and rows

__global__ void __launch_bounds__(sum_columns* sum_lanes)
    column_sums(const float* partials, std::int64_t rows, std::int64_t columns, float* out) {
  __shared__ float shared[sum_lanes][sum_columns];
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * sum_columns + threadIdx.x;
  float sum = 0;
  if (column < columns) {
#pragma unroll 8
    for (std::int64_t r = threadIdx.y; r < rows; r += sum_lanes) sum += partials[r * columns + column];
  }
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= columns) return;
  float total = shared[0][threadIdx.x];
#pragma unroll
  for (int i = 1; i < sum_lanes; ++i) total += shared[i][threadIdx.x];
  out[column] += total;
}

/// Few columns: one block a column.
__global__ void __launch_bounds__(threads)
    tall_column_sums(const double* partials, std::int64_t rows, std::int64_t columns, double* out) {
  __shared__ double shared[32];
  double sum[1] = {0};
#pragma unroll 4
  for (std::int64_t r = threadIdx.x; r < rows; r += threads) sum[0] += partials[r * columns + blockIdx.x];
  block_sum(sum, shared);
  if (threadIdx.x == 0) out[blockIdx.x] += sum[0];
}

}  // namespace

std::int64_t sum_of_squares_partials(std::int64_t n) {
  const std::int64_t chunk = chunk_of(n);
  return n <= chunk ? 0 : (n + chunk - 1) / chunk;
}

template <class T>
cudaError_t sum_of_squares(const T* x, std::int64_t n, double* partials, double* out, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const std::int64_t chunk = chunk_of(n), blocks = (n + chunk - 1) / chunk;
  const bool only = blocks == 1;
  squares<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(x, n, chunk, all_aligned(x), only ? out : partials,
                                                                 only);
  const cudaError_t status = cudaGetLastError();
  return only || status != cudaSuccess ? status : add_column_sums(partials, blocks, 1, out, stream);
}
template cudaError_t sum_of_squares(const Bits*, std::int64_t, double*, double*, cudaStream_t);
template cudaError_t sum_of_squares(const float*, std::int64_t, double*, double*, cudaStream_t);
template cudaError_t sum_of_squares(const double*, std::int64_t, double*, double*, cudaStream_t);

cudaError_t add_column_sums(const float* partials, std::int64_t rows, std::int64_t columns, float* out,
                            cudaStream_t stream) {
  if (columns == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>((columns + sum_columns - 1) / sum_columns);
  column_sums<<<blocks, dim3(sum_columns, sum_lanes), 0, stream>>>(partials, rows, columns, out);
  return cudaGetLastError();
}

cudaError_t add_column_sums(const double* partials, std::int64_t rows, std::int64_t columns, double* out,
                            cudaStream_t stream) {
  if (columns == 0) return cudaSuccess;
  tall_column_sums<<<static_cast<unsigned>(columns), threads, 0, stream>>>(partials, rows, columns, out);
  return cudaGetLastError();
}

}  // namespace deltapipe::kernels::cuda
