#include "kernels/cuda/launches.h"
#include "kernels/cuda/vector.cuh"

#include <algorithm>

namespace deltapipe::kernels::cuda {
namespace {

constexpr int gather_warps = 8;
constexpr int gather_packs = 5;  // that a thread has in flight

/// One warp a token.
template <class T, bool aligned>
__global__ void __launch_bounds__(32 * gather_warps)
    gather(const std::int32_t* tokens, const T* table, T* out, std::int64_t length, std::int64_t vocabulary,
           std::int64_t d) {
  constexpr int width = pack_width<T>;
  const std::int64_t t = static_cast<std::int64_t>(blockIdx.x) * gather_warps + threadIdx.y;
  if (t >= length) return;
  const std::int64_t token = tokens[t];
  const bool known = token >= 0 && token < vocabulary;
  const T* row = table + (known ? token : 0) * d;
  for (std::int64_t first = threadIdx.x * width; first < d; first += gather_packs * 32 * width) {
    Pack<T, width> v[gather_packs];
#pragma unroll
    for (int u = 0; u < gather_packs; ++u) {
      const std::int64_t at = first + u * 32 * width;
      if (at < d) v[u].template load<aligned>(row + at, d - at < width ? static_cast<int>(d - at) : width);
    }
#pragma unroll
    for (int u = 0; u < gather_packs; ++u) {
      const std::int64_t at = first + u * 32 * width;
      if (at >= d) break;
      if (!known) {
#pragma unroll
        for (std::uint32_t& w : v[u].words) w = 0xffffffffu;  // NaN: a token outside the table is seen
      }
      v[u].template store<aligned>(out + t * d + at, d - at < width ? static_cast<int>(d - at) : width);
    }
  }
}

constexpr int scatter_width = 8;  // columns of a thread, whatever the type
constexpr int most_scatter_threads = 512;
constexpr int ids_each = 4;  // token ids that a thread reads at once

// One block a token and tile of columns. The block of a token's first occurrence adds the rows of all of them, in order
// of their places; the others end. So no row of the table has two owners, and nothing needs sorting: the ids stay in
// the caches while every block looks through them.
template <class T, bool aligned>
__global__ void __launch_bounds__(most_scatter_threads)
    scatter(const T* dout, const std::int32_t* tokens, float* dtable, std::int64_t length, std::int64_t vocabulary,
            std::int64_t d) {
  constexpr int width = scatter_width, in_flight = 4;
  __shared__ std::int32_t places[most_scatter_threads * ids_each];
  __shared__ int counts[most_scatter_threads / 32];
  const std::int64_t own = blockIdx.x;
  const std::int32_t token = tokens[own];
  if (token < 0 || token >= vocabulary) return;
  const int threads = static_cast<int>(blockDim.x), step = threads * ids_each;
  const auto mine = [&](std::int64_t begin, std::int64_t end, bool(&match)[ids_each]) {
    bool any = false;
#pragma unroll
    for (int j = 0; j < ids_each; ++j) {
      const std::int64_t t = begin + threadIdx.x * ids_each + j;
      match[j] = t < end && tokens[t] == token;
      any = any || match[j];
    }
    return any;
  };
  bool match[ids_each];
  for (std::int64_t begin = 0; begin < own; begin += step) {
    if (__syncthreads_or(mine(begin, own, match))) return;
  }
  const std::int64_t column = (static_cast<std::int64_t>(blockIdx.y) * threads + threadIdx.x) * width;
  const int count = d - column < width ? static_cast<int>(d - column) : width;
  float sum[width] = {};
  const auto add = [&](const Pack<T, width>& p) {
    float v[width];
    p.get(v);
#pragma unroll
    for (int j = 0; j < width; ++j) sum[j] += v[j];
  };
  for (std::int64_t begin = own; begin < length; begin += step) {
    if (!__syncthreads_or(mine(begin, length, match))) continue;
    // The places of the matches, in order.
    int before = 0, all = 0;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int own_count = match[0] + match[1] + match[2] + match[3];
    int inclusive = own_count;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int lower = __shfl_up_sync(0xffffffffu, inclusive, offset);
      if (lane >= offset) inclusive += lower;
    }
    if (lane == 31) counts[warp] = inclusive;
    __syncthreads();
    for (int w = 0; w < threads / 32; ++w) {
      if (w == warp) before = all;
      all += counts[w];
    }
    before += inclusive - own_count;
#pragma unroll
    for (int j = 0; j < ids_each; ++j) {
      if (match[j]) places[before++] = static_cast<std::int32_t>(begin + threadIdx.x * ids_each + j);
    }
    __syncthreads();
    if (count > 0) {
      int i = 0;
      for (; i + in_flight <= all; i += in_flight) {
        Pack<T, width> p[in_flight];
#pragma unroll
        for (int u = 0; u < in_flight; ++u) p[u].template load<aligned>(dout + places[i + u] * d + column, count);
#pragma unroll
        for (int u = 0; u < in_flight; ++u) add(p[u]);
      }
      for (; i < all; ++i) {
        Pack<T, width> p;
        p.template load<aligned>(dout + places[i] * d + column, count);
        add(p);
      }
    }
    __syncthreads();
  }
  if (count <= 0) return;
  float* row = dtable + token * d + column;
  Pack<float, width> out;
  float old[width];
  out.template load<aligned>(row, count);
  out.get(old);
#pragma unroll
  for (int j = 0; j < width; ++j) old[j] += sum[j];
  out.set(old);
  out.template store<aligned>(row, count);
}

}  // namespace

template <class T>
cudaError_t embedding_forward(const std::int32_t* tokens, const T* table, T* out, std::int64_t length,
                              std::int64_t vocabulary, std::int64_t d, cudaStream_t stream) {
  if (length == 0 || d == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>((length + gather_warps - 1) / gather_warps);
  const dim3 threads(32, gather_warps);
  if (d % pack_width<T> == 0 && all_aligned(table, out)) {
    gather<T, true><<<blocks, threads, 0, stream>>>(tokens, table, out, length, vocabulary, d);
  } else {
    gather<T, false><<<blocks, threads, 0, stream>>>(tokens, table, out, length, vocabulary, d);
  }
  return cudaGetLastError();
}
template cudaError_t embedding_forward(const std::int32_t*, const Bits*, Bits*, std::int64_t, std::int64_t,
                                       std::int64_t, cudaStream_t);
template cudaError_t embedding_forward(const std::int32_t*, const float*, float*, std::int64_t, std::int64_t,
                                       std::int64_t, cudaStream_t);

template <class T>
cudaError_t embedding_backward(const T* dout, const std::int32_t* tokens, float* dtable, std::int64_t length,
                               std::int64_t vocabulary, std::int64_t d, cudaStream_t stream) {
  if (length == 0 || d == 0) return cudaSuccess;
  const std::int64_t packs = (d + scatter_width - 1) / scatter_width;
  const std::int64_t tiles = (packs + most_scatter_threads - 1) / most_scatter_threads;
  const auto threads = static_cast<unsigned>(std::max<std::int64_t>(128, (packs + tiles * 32 - 1) / (tiles * 32) * 32));
  const dim3 grid(static_cast<unsigned>(length), static_cast<unsigned>(tiles));
  if (d % scatter_width == 0 && all_aligned(dout, dtable)) {
    scatter<T, true><<<grid, threads, 0, stream>>>(dout, tokens, dtable, length, vocabulary, d);
  } else {
    scatter<T, false><<<grid, threads, 0, stream>>>(dout, tokens, dtable, length, vocabulary, d);
  }
  return cudaGetLastError();
}
template cudaError_t embedding_backward(const Bits*, const std::int32_t*, float*, std::int64_t, std::int64_t,
                                        std::int64_t, cudaStream_t);
template cudaError_t embedding_backward(const float*, const std::int32_t*, float*, std::int64_t, std::int64_t,
                                        std::int64_t, cudaStream_t);

}  // namespace deltapipe::kernels::cuda
