#include "kernels/cuda/linear_kernels.h"

#include <cuda_bf16.h>

namespace deltapipe::kernels::cuda {
namespace {

// One block owns 16 columns, a 32-byte sector of bf16, and all rows: so no sums of blocks have to be joined. Its 64
// row groups take every 64th row; a group's 16 threads take a column each.
constexpr int block_columns = 16;
constexpr int row_groups = 64;
constexpr int unroll = 8;  // loads under way in a thread: the grid alone does not fill the memory's latency

template <class T>
__global__ void __launch_bounds__(block_columns* row_groups)
    column_sums(const T* __restrict__ x, int rows, int columns, float* __restrict__ sums) {
  __shared__ float partial[row_groups][block_columns + 1];
  const int lane = static_cast<int>(threadIdx.x) % block_columns, group = static_cast<int>(threadIdx.x) / block_columns;
  const int column = static_cast<int>(blockIdx.x) * block_columns + lane;
  float sum = 0;
  if (column < columns) {
    int row = group;
    for (; row + (unroll - 1) * row_groups < rows; row += unroll * row_groups) {
      float values[unroll];
#pragma unroll
      for (int i = 0; i < unroll; ++i) {
        values[i] = static_cast<float>(x[static_cast<std::int64_t>(row + i * row_groups) * columns + column]);
      }
#pragma unroll
      for (int i = 0; i < unroll; ++i) sum += values[i];
    }
    for (; row < rows; row += row_groups)
      sum += static_cast<float>(x[static_cast<std::int64_t>(row) * columns + column]);
  }
  partial[group][lane] = sum;
  for (int half = row_groups / 2; half > 0; half /= 2) {
    __syncthreads();
    if (group < half) partial[group][lane] += partial[group + half][lane];
  }
  if (group == 0 && column < columns) sums[column] += partial[0][lane];
}

template <class T>
cudaError_t launch(const T* x, int rows, int columns, float* sums, cudaStream_t stream) {
  if (rows == 0 || columns == 0) return cudaSuccess;
  const int blocks = (columns + block_columns - 1) / block_columns;
  column_sums<<<blocks, block_columns * row_groups, 0, stream>>>(x, rows, columns, sums);
  return cudaGetLastError();
}

}  // namespace

cudaError_t add_column_sums(const std::uint16_t* x_bf16, int rows, int columns, float* sums, cudaStream_t stream) {
  return launch(reinterpret_cast<const __nv_bfloat16*>(x_bf16), rows, columns, sums, stream);
}

cudaError_t add_column_sums(const float* x, int rows, int columns, float* sums, cudaStream_t stream) {
  return launch(x, rows, columns, sums, stream);
}

}  // namespace deltapipe::kernels::cuda
