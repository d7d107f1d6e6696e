#include "kernels/cuda/launches.h"
#include "kernels/cuda/vector.cuh"

#include <algorithm>

namespace deltapipe::kernels::cuda {
namespace {

constexpr int threads = 64;
constexpr int forward_chunk = 32;   // tokens that a thread of forward walks through
constexpr int forward_at_once = 8;  // of them, loads in flight
constexpr int backward_at_once = 4;

/// Blocks of threads side by side over the channels, n a thread; the grid counts them fastest, then chunks of tokens.
__host__ __device__ std::int64_t tiles_of(const ConvolutionShape& shape, int n) {
  return (shape.channels + threads * n - 1) / (threads * n);
}

/// One segment: rows 0 .. L - 1 are x, -(taps - 1) .. -1 the halo.
template <class T>
struct Rows {
  const T *x, *halo;
  std::int64_t length, d;
  int taps;

  /// Row s, channels [channel, channel + n); zeros where there is no such row.
  template <bool aligned, int n>
  __device__ __forceinline__ void load(std::int64_t s, std::int64_t channel, int count, Pack<T, n>& p) const {
    const T* row = nullptr;
    if (s >= 0) {
      if (s < length) row = x + s * d;
    } else if (halo != nullptr && s + taps - 1 >= 0) {
      row = halo + (s + taps - 1) * d;
    }
    if (row == nullptr) {
#pragma unroll
      for (std::uint32_t& w : p.words) w = 0;
    } else {
      p.template load<aligned>(row + channel, count);
    }
  }
};

/// taps[j] of channel i, the newest token's last; kernels of fewer taps than most_taps have zeros in front, which no
/// token sees.
template <class T, int n, int most_taps>
__device__ __forceinline__ void load_taps(const T* w, std::int64_t channel, int count, int taps,
                                          float (&out)[most_taps][n]) {
#pragma unroll
  for (int j = 0; j < most_taps; ++j) {
    const int from = j - (most_taps - taps);
#pragma unroll
    for (int i = 0; i < n; ++i) out[j][i] = from >= 0 && i < count ? to_compute(w[(channel + i) * taps + from]) : 0.0f;
  }
}

/// How many tokens back token t may look, at most taps - 1.
__device__ __forceinline__ int reach_of(std::int64_t t, std::int32_t start, int taps) {
  const std::int64_t reach = t - start;
  return reach < taps - 1 ? static_cast<int>(reach) : taps - 1;
}

/// p += taps . rows, over the taps that reach at most `reach` tokens back.
template <class T, int n, int most_taps>
__device__ __forceinline__ void convolve(const float (&taps)[most_taps][n], const Pack<T, n>* rows, int reach,
                                         float (&p)[n]) {
#pragma unroll
  for (int j = 0; j < most_taps; ++j) {
    if (most_taps - 1 - j > reach) continue;
    float v[n];
    rows[j].get(v);
#pragma unroll
    for (int i = 0; i < n; ++i) p[i] += taps[j][i] * v[i];
  }
}

template <class T, int n, int most_taps, bool aligned>
__global__ void __launch_bounds__(threads)
    forward(ConvolutionShape shape, const T* x, const T* w, const T* halo, const std::int32_t* start, T* y) {
  constexpr int past = most_taps - 1;
  const std::int64_t tiles = tiles_of(shape, n), chunk_index = blockIdx.x / tiles;
  const std::int64_t channel = ((blockIdx.x - chunk_index * tiles) * threads + threadIdx.x) * n;
  if (channel >= shape.channels) return;
  const int count = shape.channels - channel < n ? static_cast<int>(shape.channels - channel) : n;
  const std::int64_t chunks = (shape.length + forward_chunk - 1) / forward_chunk;
  const std::int64_t segment = chunk_index / chunks, begin = (chunk_index - segment * chunks) * forward_chunk;
  const std::int64_t end = begin + forward_chunk < shape.length ? begin + forward_chunk : shape.length;
  const Rows<T> source{x + segment * shape.length * shape.channels,
                       halo == nullptr ? nullptr : halo + segment * (shape.taps - 1) * shape.channels, shape.length,
                       shape.channels, shape.taps};
  T* out = y + segment * shape.length * shape.channels + channel;
  start += segment * shape.length;
  float taps[most_taps][n];
  load_taps<T, n, most_taps>(w, channel, count, shape.taps, taps);
  Pack<T, n> rows[past + forward_at_once];
#pragma unroll
  for (int j = 0; j < past; ++j) source.template load<aligned, n>(begin - past + j, channel, count, rows[j]);
  for (std::int64_t t = begin; t < end; t += forward_at_once) {
    int reach[forward_at_once];
#pragma unroll
    for (int u = 0; u < forward_at_once; ++u) {
      source.template load<aligned, n>(t + u, channel, count, rows[past + u]);
      reach[u] = t + u < end ? reach_of(t + u, start[t + u], shape.taps) : 0;
    }
#pragma unroll
    for (int u = 0; u < forward_at_once; ++u) {
      if (t + u >= end) break;
      float p[n] = {};
      convolve<T, n, most_taps>(taps, rows + u, reach[u], p);
#pragma unroll
      for (int i = 0; i < n; ++i) p[i] *= sigmoid<T>(p[i]);
      Pack<T, n> result;
      result.set(p);
      result.template store<aligned>(out + (t + u) * shape.channels, count);
    }
#pragma unroll
    for (int j = 0; j < past; ++j) rows[j] = rows[forward_at_once + j];
  }
}

/// Tokens that a thread of backward walks through: long enough that the taps - 1 tokens read twice hardly count, short
/// enough that a few thousand tokens still fill the device.
std::int64_t backward_chunk(const ConvolutionShape& shape) {
  const std::int64_t even = (shape.segments * shape.length + 255) / 256;
  return std::clamp<std::int64_t>((even + 7) / 8 * 8, 16, 128);
}

// With dp[t] = dy[t] silu'(p[t]): dx[s] = sum of w[:, taps - 1 - (t - s)] dp[t] over t in s .. s + taps - 1 that may
// see s. A thread owns the dx rows and the share of dw of the tokens of its chunk; the taps - 1 tokens after the chunk
// are gone through once more for their dp. The first chunk of a segment also owns dhalo.
template <class T, int n, int most_taps, bool aligned>
__global__ void __launch_bounds__(threads)
    backward(ConvolutionShape shape, std::int64_t chunk, const T* dy, const T* x, const T* w, const T* halo,
             const std::int32_t* start, T* dx, T* dhalo, float* partials) {
  constexpr int past = most_taps - 1;
  const std::int64_t tiles = tiles_of(shape, n), chunk_index = blockIdx.x / tiles;
  const std::int64_t channel = ((blockIdx.x - chunk_index * tiles) * threads + threadIdx.x) * n;
  if (channel >= shape.channels) return;
  const int count = shape.channels - channel < n ? static_cast<int>(shape.channels - channel) : n;
  const std::int64_t chunks = (shape.length + chunk - 1) / chunk, segment = chunk_index / chunks;
  const std::int64_t begin = (chunk_index - segment * chunks) * chunk;
  const std::int64_t end = begin + chunk < shape.length ? begin + chunk : shape.length;
  const std::int64_t offset = segment * shape.length * shape.channels;
  const std::int64_t halo_offset = segment * (shape.taps - 1) * shape.channels;
  const Rows<T> source{x + offset, halo == nullptr ? nullptr : halo + halo_offset, shape.length, shape.channels,
                       shape.taps};
  const Rows<T> gradient{dy + offset, nullptr, shape.length, shape.channels, shape.taps};
  start += segment * shape.length;
  float taps[most_taps][n], dw[most_taps][n] = {};
  load_taps<T, n, most_taps>(w, channel, count, shape.taps, taps);
  Pack<T, n> rows[past + backward_at_once];
  float dp[most_taps][n] = {};  // of the newest tokens, oldest first
  int reach[most_taps];
#pragma unroll
  for (int j = 0; j < most_taps; ++j) reach[j] = -1;  // sees nothing
#pragma unroll
  for (int j = 0; j < past; ++j) source.template load<aligned, n>(begin - past + j, channel, count, rows[j]);
  for (std::int64_t first = begin; first < end + past; first += backward_at_once) {
    Pack<T, n> g[backward_at_once];
    int next_reach[backward_at_once];
#pragma unroll
    for (int u = 0; u < backward_at_once; ++u) {
      const std::int64_t t = first + u;
      source.template load<aligned, n>(t, channel, count, rows[past + u]);
      gradient.template load<aligned, n>(t, channel, count, g[u]);
      next_reach[u] = t < shape.length ? reach_of(t, start[t], shape.taps) : -1;
    }
#pragma unroll
    for (int u = 0; u < backward_at_once; ++u) {
      const std::int64_t t = first + u;
#pragma unroll
      for (int j = 0; j < past; ++j) {
        reach[j] = reach[j + 1];
#pragma unroll
        for (int i = 0; i < n; ++i) dp[j][i] = dp[j + 1][i];
      }
      reach[past] = next_reach[u];
      float p[n] = {};
      convolve<T, n, most_taps>(taps, rows + u, reach[past], p);
      g[u].get(dp[past]);
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const float s = sigmoid<T>(p[i]);
        dp[past][i] *= s * (1.0f + p[i] * (1.0f - s));
      }
      if (t < end) {
#pragma unroll
        for (int j = 0; j < most_taps; ++j) {
          if (past - j > reach[past]) continue;
          float v[n];
          rows[u + j].get(v);
#pragma unroll
          for (int i = 0; i < n; ++i) dw[j][i] += dp[past][i] * v[i];
        }
      }
      // dp[k] is of token s + k, which sees s through tap past - k.
      const std::int64_t s = t - past;
      T* out = nullptr;
      if (s >= begin && s < end) {
        out = dx + offset + s * shape.channels;
      } else if (s < 0 && begin == 0 && dhalo != nullptr && s + shape.taps - 1 >= 0) {
        out = dhalo + halo_offset + (s + shape.taps - 1) * shape.channels;
      }
      if (out == nullptr) continue;
      float sum[n] = {};
#pragma unroll
      for (int k = 0; k < most_taps; ++k) {
        if (k > reach[k]) continue;
#pragma unroll
        for (int i = 0; i < n; ++i) sum[i] += taps[past - k][i] * dp[k][i];
      }
      Pack<T, n> result;
      result.set(sum);
      result.template store<aligned>(out + channel, count);
    }
#pragma unroll
    for (int j = 0; j < past; ++j) rows[j] = rows[backward_at_once + j];
  }
  if (partials == nullptr) return;
  float* out = partials + (chunk_index * shape.channels + channel) * shape.taps;
#pragma unroll
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int j = 0; j < most_taps; ++j) {
      const int tap = j - (most_taps - shape.taps);
      if (i < count && tap >= 0) out[i * shape.taps + tap] = dw[j][i];
    }
  }
}

/// f.template operator()<n, most_taps, aligned>(): channels of a thread, fewer where eight taps fill its registers.
template <class T, class F>
cudaError_t for_taps(const ConvolutionShape& shape, bool aligned, const F& f) {
  constexpr int wide = pack_width<T>, narrow = 4;
  if (shape.taps <= 4) {
    return aligned && shape.channels % wide == 0 ? f.template operator()<wide, 4, true>()
                                                 : f.template operator()<wide, 4, false>();
  }
  return aligned && shape.channels % narrow == 0 ? f.template operator()<narrow, 8, true>()
                                                 : f.template operator()<narrow, 8, false>();
}

unsigned blocks_of(const ConvolutionShape& shape, int n, std::int64_t chunk) {
  return static_cast<unsigned>(tiles_of(shape, n) * shape.segments * ((shape.length + chunk - 1) / chunk));
}

}  // namespace

template <class T>
cudaError_t short_conv_forward(const ConvolutionShape& shape, const T* x, const T* w, const T* halo,
                               const std::int32_t* start, T* y, cudaStream_t stream) {
  if (shape.segments * shape.length * shape.channels == 0) return cudaSuccess;
  return for_taps<T>(shape, all_aligned(x, halo, y), [&]<int n, int most_taps, bool aligned>() {
    forward<T, n, most_taps, aligned>
        <<<blocks_of(shape, n, forward_chunk), threads, 0, stream>>>(shape, x, w, halo, start, y);
    return cudaGetLastError();
  });
}
template cudaError_t short_conv_forward(const ConvolutionShape&, const Bits*, const Bits*, const Bits*,
                                        const std::int32_t*, Bits*, cudaStream_t);
template cudaError_t short_conv_forward(const ConvolutionShape&, const float*, const float*, const float*,
                                        const std::int32_t*, float*, cudaStream_t);

std::int64_t short_conv_partial_rows(const ConvolutionShape& shape) {
  const std::int64_t chunk = backward_chunk(shape);
  return shape.segments * ((shape.length + chunk - 1) / chunk);
}

template <class T>
cudaError_t short_conv_backward(const ConvolutionShape& shape, const T* dy, const T* x, const T* w, const T* halo,
                                const std::int32_t* start, T* dx, T* dhalo, float* partials, cudaStream_t stream) {
  if (shape.segments * shape.length * shape.channels == 0) return cudaSuccess;
  return for_taps<T>(shape, all_aligned(dy, x, halo, dx, dhalo), [&]<int n, int most_taps, bool aligned>() {
    const std::int64_t chunk = backward_chunk(shape);
    backward<T, n, most_taps, aligned>
        <<<blocks_of(shape, n, chunk), threads, 0, stream>>>(shape, chunk, dy, x, w, halo, start, dx, dhalo, partials);
    return cudaGetLastError();
  });
}
template cudaError_t short_conv_backward(const ConvolutionShape&, const Bits*, const Bits*, const Bits*, const Bits*,
                                         const std::int32_t*, Bits*, Bits*, float*, cudaStream_t);
template cudaError_t short_conv_backward(const ConvolutionShape&, const float*, const float*, const float*,
                                         const float*, const std::int32_t*, float*, float*, float*, cudaStream_t);

}  // namespace deltapipe::kernels::cuda
