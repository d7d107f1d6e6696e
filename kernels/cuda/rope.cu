#include "kernels/cuda/launches.h"
#include "kernels/cuda/vector.cuh"

namespace deltapipe::kernels::cuda {
namespace {

constexpr int threads = 256;
constexpr int tokens_each = 4;  // of a block: their sines and cosines serve all heads
constexpr int tile = 64;        // frequencies of a block, so that shared memory does not depend on d

template <class T, bool aligned>
__global__ void __launch_bounds__(threads)
    rotate(const T* x, const std::int32_t* positions, const float* frequencies, float attention_factor, float direction,
           T* out, std::int64_t tokens, int heads, int d) {
  constexpr int width = pack_width<T>;
  __shared__ float cosines[tokens_each][tile], sines[tokens_each][tile];
  const int half = d / 2, first = static_cast<int>(blockIdx.y) * tile, channels = min(tile, half - first);
  const std::int64_t token = static_cast<std::int64_t>(blockIdx.x) * tokens_each;
  const int n = tokens - token < tokens_each ? static_cast<int>(tokens - token) : tokens_each;
  for (int i = static_cast<int>(threadIdx.x); i < n * channels; i += threads) {
    const int t = i / channels, c = i - t * channels;
    float sine, cosine;
    sincosf(static_cast<float>(positions[token + t]) * frequencies[first + c], &sine, &cosine);
    cosines[t][c] = cosine * attention_factor;
    sines[t][c] = sine * attention_factor * direction;
  }
  __syncthreads();
  const int packs = (channels + width - 1) / width, each = heads * packs;
  for (int i = static_cast<int>(threadIdx.x); i < n * each; i += threads) {
    const int t = i / each, h = (i - t * each) / packs, c = (i % packs) * width, count = min(width, channels - c);
    const std::int64_t at = ((token + t) * heads + h) * d + first + c;
    Pack<T, width> p1, p2;
    p1.template load<aligned>(x + at, count);
    p2.template load<aligned>(x + at + half, count);
    float a[width], b[width];
    p1.get(a);
    p2.get(b);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const float cosine = c + j < tile ? cosines[t][c + j] : 0.0f, sine = c + j < tile ? sines[t][c + j] : 0.0f;
      const float a1 = a[j], b1 = b[j];
      a[j] = a1 * cosine - b1 * sine;
      b[j] = b1 * cosine + a1 * sine;
    }
    p1.set(a);
    p2.set(b);
    p1.template store<aligned>(out + at, count);
    p2.template store<aligned>(out + at + half, count);
  }
}

}  // namespace

template <class T>
cudaError_t rope(const T* x, const std::int32_t* positions, const float* inverse_frequencies, float attention_factor,
                 float direction, T* out, std::int64_t tokens, int heads, int d, cudaStream_t stream) {
  if (tokens == 0 || heads == 0 || d == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>((tokens + tokens_each - 1) / tokens_each),
                  static_cast<unsigned>((d / 2 + tile - 1) / tile));
  if (d / 2 % pack_width<T> == 0 && all_aligned(x, out)) {
    rotate<T, true><<<grid, threads, 0, stream>>>(x, positions, inverse_frequencies, attention_factor, direction, out,
                                                  tokens, heads, d);
  } else {
    rotate<T, false><<<grid, threads, 0, stream>>>(x, positions, inverse_frequencies, attention_factor, direction, out,
                                                   tokens, heads, d);
  }
  return cudaGetLastError();
}
template cudaError_t rope(const Bits*, const std::int32_t*, const float*, float, float, Bits*, std::int64_t, int, int,
                          cudaStream_t);
template cudaError_t rope(const float*, const std::int32_t*, const float*, float, float, float*, std::int64_t, int, int,
                          cudaStream_t);

}  // namespace deltapipe::kernels::cuda
