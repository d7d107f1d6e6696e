#include "kernels/cuda/linear_kernels.h"

#include <cuda_bf16.h>

#include <algorithm>

namespace deltapipe::kernels::cuda {
namespace {

// One block owns 16 columns, a 32-byte sector of bf16, and all rows: so no sums of blocks have to be joined. Its 64
// row groups take every 64th row; a group's 16 threads take a column each.
constexpr int block_columns = 16;
constexpr int row_groups = 64;
constexpr int unroll = 8;  // loads under way in a thread: the grid alone does not fill the memory's latency

/// Four numbers at a multiple of their size.
__device__ __forceinline__ float4 load(const float* from) { return *reinterpret_cast<const float4*>(from); }
__device__ __forceinline__ float4 load(const __nv_bfloat16* from) {
  const uint2 v = *reinterpret_cast<const uint2*>(from);
  return {__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xffff0000u), __uint_as_float(v.y << 16),
          __uint_as_float(v.y & 0xffff0000u)};
}
__device__ __forceinline__ void store(const float4& from, float* to) { *reinterpret_cast<float4*>(to) = from; }
__device__ __forceinline__ void store(const float4& from, __nv_bfloat16* to) {
  auto* pairs = reinterpret_cast<__nv_bfloat162*>(to);
  pairs[0] = __floats2bfloat162_rn(from.x, from.y);
  pairs[1] = __floats2bfloat162_rn(from.z, from.w);
}

template <class T>
__global__ void __launch_bounds__(block_columns* row_groups)
    column_sums(const T* __restrict__ x, int rows, int columns, std::int64_t pitch, float* __restrict__ sums) {
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
        values[i] = static_cast<float>(x[(row + i * row_groups) * pitch + column]);
      }
#pragma unroll
      for (int i = 0; i < unroll; ++i) sum += values[i];
    }
    for (; row < rows; row += row_groups) sum += static_cast<float>(x[row * pitch + column]);
  }
  partial[group][lane] = sum;
  for (int half = row_groups / 2; half > 0; half /= 2) {
    __syncthreads();
    if (group < half) partial[group][lane] += partial[group + half][lane];
  }
  if (group == 0 && column < columns) sums[column] += partial[0][lane];
}

template <class T>
cudaError_t launch(const T* x, int rows, int columns, std::int64_t pitch, float* sums, cudaStream_t stream) {
  if (rows == 0 || columns == 0) return cudaSuccess;
  const int blocks = (columns + block_columns - 1) / block_columns;
  column_sums<<<blocks, block_columns * row_groups, 0, stream>>>(x, rows, columns, pitch, sums);
  return cudaGetLastError();
}

constexpr int most_terms = 7;
constexpr int product_threads = 256;

/// A thread keeps four columns of w and walks down the rows.
template <class T>
__global__ void __launch_bounds__(product_threads)
    last_products(LastProducts shape, const float* __restrict__ sums, const T* __restrict__ dy, const T* __restrict__ w,
                  T* dx) {
  const int column = (static_cast<int>(blockIdx.x) * product_threads + static_cast<int>(threadIdx.x)) * 4;
  if (column >= shape.columns) return;
  float4 factors[most_terms];
#pragma unroll
  for (int k = 0; k < most_terms; ++k) {
    if (k < shape.terms) factors[k] = load(w + static_cast<std::int64_t>(k) * shape.columns + column);
  }
  for (std::int64_t row = blockIdx.y; row < shape.rows; row += gridDim.y) {
    const std::int64_t at = row * shape.columns + column;
    float4 sum = load(sums + at);
#pragma unroll
    for (int k = 0; k < most_terms; ++k) {
      if (k < shape.terms) {
        const auto y = static_cast<float>(dy[row * shape.pitch + k]);
        sum.x = fmaf(y, factors[k].x, sum.x);
        sum.y = fmaf(y, factors[k].y, sum.y);
        sum.z = fmaf(y, factors[k].z, sum.z);
        sum.w = fmaf(y, factors[k].w, sum.w);
      }
    }
    if (shape.accumulate) {
      const float4 before = load(dx + at);
      sum = {sum.x + before.x, sum.y + before.y, sum.z + before.z, sum.w + before.w};
    }
    store(sum, dx + at);
  }
}

template <class T>
cudaError_t launch_products(const LastProducts& shape, const float* sums, const T* dy, const T* w, T* dx,
                            cudaStream_t stream) {
  constexpr int each = product_threads * 4;
  constexpr std::int64_t most_blocks_down = 512;  // with three across, at 2,560 columns, more than run at once
  const dim3 blocks(static_cast<unsigned>((shape.columns + each - 1) / each),
                    static_cast<unsigned>(std::min(shape.rows, most_blocks_down)));
  last_products<<<blocks, product_threads, 0, stream>>>(shape, sums, dy, w, dx);
  return cudaGetLastError();
}

}  // namespace

cudaError_t add_column_sums(const std::uint16_t* x_bf16, int rows, int columns, std::int64_t pitch, float* sums,
                            cudaStream_t stream) {
  return launch(reinterpret_cast<const __nv_bfloat16*>(x_bf16), rows, columns, pitch, sums, stream);
}

cudaError_t add_column_sums(const float* x, int rows, int columns, std::int64_t pitch, float* sums,
                            cudaStream_t stream) {
  return launch(x, rows, columns, pitch, sums, stream);
}

cudaError_t add_last_products(const LastProducts& shape, const float* sums, const std::uint16_t* dy_bf16,
                              const std::uint16_t* w_bf16, std::uint16_t* dx_bf16, cudaStream_t stream) {
  return launch_products(shape, sums, reinterpret_cast<const __nv_bfloat16*>(dy_bf16),
                         reinterpret_cast<const __nv_bfloat16*>(w_bf16), reinterpret_cast<__nv_bfloat16*>(dx_bf16),
                         stream);
}

cudaError_t add_last_products(const LastProducts& shape, const float* sums, const float* dy, const float* w, float* dx,
                              cudaStream_t stream) {
  return launch_products(shape, sums, dy, w, dx, stream);
}

}  // namespace deltapipe::kernels::cuda
