#include "kernels/cuda/launches.h"
#include "kernels/cuda/vector.cuh"

#include <algorithm>

namespace deltapipe::kernels::cuda {
namespace {

constexpr int threads = 64;
/// Blocks that a multiprocessor holds with the registers of at most four taps; those of eight take twice as many.
template <int most_taps>
inline constexpr int blocks_resident = most_taps <= 4 ? 8 : 4;
constexpr std::int64_t most_blocks = 132 * blocks_resident<4>;
constexpr std::int64_t fewest_tokens = 16;

/// Blocks of threads side by side over the channels, n a thread; the grid counts them fastest, then chunks of tokens,
/// then convolutions.
__host__ __device__ std::int64_t tiles_of(const ConvolutionShape& shape, int n) {
  return (shape.channels + threads * n - 1) / (threads * n);
}

/// Tokens that a thread walks through: so many that all blocks run at once, as long walks read few rows twice.
std::int64_t chunk_of(const ConvolutionShape& shape, int n) {
  const std::int64_t chunks =
      std::max<std::int64_t>(1, most_blocks / (tiles_of(shape, n) * shape.segments * shape.count));
  const std::int64_t even = (shape.length + chunks - 1) / chunks;
  return std::max(fewest_tokens, (even + 7) / 8 * 8);  // whole turns of up to eight taps
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
__device__ __forceinline__ int reach_of(int t, int start, int taps) { return min(t - start, taps - 1); }

/// The work of a thread: channels [channel, channel + count) of the tokens [begin, end) of a segment.
struct Place {
  std::int64_t chunk, segment, channel;
  int begin, end, count;
  bool idle;  // beyond the last channel
};
template <int n>
__device__ __forceinline__ Place place_of(const ConvolutionShape& shape, std::int64_t chunk) {
  const std::int64_t tiles = tiles_of(shape, n), chunks = (shape.length + chunk - 1) / chunk;
  Place p;
  p.chunk = blockIdx.x / tiles;
  p.segment = p.chunk / chunks;
  p.channel = ((blockIdx.x - p.chunk * tiles) * threads + threadIdx.x) * n;
  const std::int64_t begin = (p.chunk - p.segment * chunks) * chunk;
  p.begin = static_cast<int>(begin);
  p.end = static_cast<int>(begin + chunk < shape.length ? begin + chunk : shape.length);
  p.count = shape.channels - p.channel < n ? static_cast<int>(shape.channels - p.channel) : n;
  p.idle = p.channel >= shape.channels;
  return p;
}

// Both directions walk in turns of most_taps tokens. Token number u of a turn keeps what later ones need of it in entry
// u of its windows, so that entry (u - k) mod most_taps is that of the token k before. The rows of a turn are on their
// way while the one before is computed.
template <int most_taps>
__device__ __forceinline__ constexpr int entry_of(int u, int back) {
  return (u - back + most_taps) % most_taps;
}

/// The rows of the most_taps - 1 tokens before `begin`, as a turn before would have left them.
template <class T, bool aligned, int n, int most_taps>
__device__ __forceinline__ void load_past(const Rows<T>& source, const Place& place, float (&rows)[most_taps][n]) {
#pragma unroll
  for (int back = 1; back < most_taps; ++back) {
    Pack<T, n> row;
    source.template load<aligned, n>(place.begin - back, place.channel, place.count, row);
    row.get(rows[most_taps - back]);
  }
}

/// p = taps . rows; `whole`: all most_taps rows are seen, else `reach` of them and the newest.
template <bool whole, int n, int most_taps>
__device__ __forceinline__ void convolve(const float (&taps)[most_taps][n], const float (&rows)[most_taps][n], int u,
                                         int reach, float (&p)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) p[i] = 0;
#pragma unroll
  for (int back = most_taps - 1; back >= 0; --back) {
    if (!whole && back > reach) continue;
#pragma unroll
    for (int i = 0; i < n; ++i) p[i] += taps[most_taps - 1 - back][i] * rows[entry_of<most_taps>(u, back)][i];
  }
}

template <class T, int n, int most_taps, bool aligned>
__global__ void __launch_bounds__(threads, blocks_resident<most_taps>)
    forward(ConvolutionShape shape, std::int64_t chunk, const __grid_constant__ Convolutions<Convolution<T>> all,
            const std::int32_t* start) {
  constexpr int past = most_taps - 1;
  const Convolution<T>& its = all.each[blockIdx.y];
  const T *x = its.x, *w = its.w, *halo = its.halo;
  T* y = its.y;
  const Place place = place_of<n>(shape, chunk);
  if (place.idle) return;
  const std::int64_t first_row = place.segment * shape.length, d = shape.channels;
  const Rows<T> source{x + first_row * d, halo == nullptr ? nullptr : halo + place.segment * (shape.taps - 1) * d,
                       shape.length, d, shape.taps};
  float taps[most_taps][n], rows[most_taps][n];
  load_taps<T, n, most_taps>(w, place.channel, place.count, shape.taps, taps);
  load_past<T, aligned>(source, place, rows);
  const std::int64_t from = (first_row + place.begin) * d + place.channel;
  const T* in = x + from;
  T* out = y + from;
  start += first_row;
  Pack<T, n> next[most_taps];
  int next_start[most_taps] = {};
  const auto fetch = [&](int first) {
#pragma unroll
    for (int u = 0; u < most_taps; ++u) {
      if (first + u < place.end) {
        next[u].template load<aligned>(in, place.count);
        next_start[u] = start[first + u];
      }
      in += d;
    }
  };
  fetch(place.begin);
  for (int first = place.begin; first < place.end; first += most_taps) {
    Pack<T, n> now[most_taps];
    int now_start[most_taps];
#pragma unroll
    for (int u = 0; u < most_taps; ++u) {
      now[u] = next[u];
      now_start[u] = next_start[u];
    }
    fetch(first + most_taps);
#pragma unroll
    for (int u = 0; u < most_taps; ++u) {
      if (first + u >= place.end) break;
      now[u].get(rows[u]);
      const int reach = reach_of(first + u, now_start[u], shape.taps);
      float p[n];
      if (reach == past) {
        convolve<true>(taps, rows, u, reach, p);
      } else {
        convolve<false>(taps, rows, u, reach, p);
      }
#pragma unroll
      for (int i = 0; i < n; ++i) p[i] *= sigmoid<T>(p[i]);
      Pack<T, n> result;
      result.set(p);
      result.template store<aligned>(out, place.count);
      out += d;
    }
  }
}

// With dp[t] = dy[t] silu'(p[t]): dx[s] = sum of w[:, taps - 1 - (t - s)] dp[t] over t in s .. s + taps - 1 that may
// see s. A thread owns the dx rows and the share of dw of the tokens of its chunk; the taps - 1 tokens after the chunk
// are gone through once more for their dp. The first chunk of a segment also owns dhalo. A token that sees most_taps -
// 1 tokens back says so for those between, as documents follow each other: then nothing is asked.
template <class T, int n, int most_taps, bool aligned>
__global__ void __launch_bounds__(threads, blocks_resident<most_taps>)
    backward(ConvolutionShape shape, std::int64_t chunk,
             const __grid_constant__ Convolutions<ConvolutionGradient<T>> all, const std::int32_t* start) {
  constexpr int past = most_taps - 1;
  const ConvolutionGradient<T>& its = all.each[blockIdx.y];
  const T *dy = its.dy, *x = its.x, *w = its.w, *halo = its.halo;
  T *dx = its.dx, *dhalo = its.dhalo;
  float* partials = its.partials;
  const Place place = place_of<n>(shape, chunk);
  if (place.idle) return;
  const std::int64_t first_row = place.segment * shape.length, d = shape.channels;
  const std::int64_t halo_offset = place.segment * (shape.taps - 1) * d;
  const int last = static_cast<int>(place.end + past < shape.length ? place.end + past : shape.length);
  const Rows<T> source{x + first_row * d, halo == nullptr ? nullptr : halo + halo_offset, shape.length, d, shape.taps};
  float taps[most_taps][n], dw[most_taps][n] = {}, rows[most_taps][n], dp[most_taps][n] = {};
  int reach[most_taps];
  load_taps<T, n, most_taps>(w, place.channel, place.count, shape.taps, taps);
  load_past<T, aligned>(source, place, rows);
#pragma unroll
  for (int& r : reach) r = -1;  // sees nothing
  const std::int64_t from = (first_row + place.begin) * d + place.channel;
  const T *in_x = x + from, *in_dy = dy + from;
  T* out = dx + from;
  start += first_row;
  Pack<T, n> next_x[most_taps], next_dy[most_taps];
  int next_start[most_taps] = {};
  const auto fetch = [&](int first) {
#pragma unroll
    for (int u = 0; u < most_taps; ++u) {
      if (first + u < last) {
        next_x[u].template load<aligned>(in_x, place.count);
        next_dy[u].template load<aligned>(in_dy, place.count);
        next_start[u] = start[first + u];
      }
      in_x += d;
      in_dy += d;
    }
  };
  const auto go_through = [&]<bool whole>(int t, int u) {
    float p[n];
    convolve<whole>(taps, rows, u, reach[u], p);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float s = sigmoid<T>(p[i]);
      dp[u][i] *= s * (1.0f + p[i] * (1.0f - s));
    }
    if (t < place.end) {
#pragma unroll
      for (int back = 0; back < most_taps; ++back) {
        if (!whole && back > reach[u]) continue;
#pragma unroll
        for (int i = 0; i < n; ++i) dw[past - back][i] += dp[u][i] * rows[entry_of<most_taps>(u, back)][i];
      }
    }
    const int s = t - past;
    const bool own = s >= place.begin && s < place.end;
    if (!own && (s >= 0 || place.begin != 0 || dhalo == nullptr || s + shape.taps - 1 < 0)) return;
    float sum[n] = {};
#pragma unroll
    for (int ahead = 0; ahead < most_taps; ++ahead) {  // token s + ahead sees s through tap past - ahead
      const int entry = entry_of<most_taps>(u, past - ahead);
      if (!whole && ahead > reach[entry]) continue;
#pragma unroll
      for (int i = 0; i < n; ++i) sum[i] += taps[past - ahead][i] * dp[entry][i];
    }
    Pack<T, n> result;
    result.set(sum);
    if (own) {
      result.template store<aligned>(out, place.count);
      out += d;
    } else {
      result.template store<aligned>(dhalo + halo_offset + (s + shape.taps - 1) * d + place.channel, place.count);
    }
  };
  fetch(place.begin);
  for (int first = place.begin; first < place.end + past; first += most_taps) {
    Pack<T, n> now_x[most_taps], now_dy[most_taps];
    int now_start[most_taps];
#pragma unroll
    for (int u = 0; u < most_taps; ++u) {
      now_x[u] = next_x[u];
      now_dy[u] = next_dy[u];
      now_start[u] = next_start[u];
    }
    fetch(first + most_taps);
#pragma unroll
    for (int u = 0; u < most_taps; ++u) {
      const int t = first + u;
      now_x[u].get(rows[u]);
      now_dy[u].get(dp[u]);
      reach[u] = t < last ? reach_of(t, now_start[u], shape.taps) : -1;
      if (reach[u] == past) {
        go_through.template operator()<true>(t, u);
      } else {
        go_through.template operator()<false>(t, u);
      }
    }
  }
  if (partials == nullptr) return;
  float* sums = partials + (place.chunk * d + place.channel) * shape.taps;
#pragma unroll
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int j = 0; j < most_taps; ++j) {
      const int tap = j - (most_taps - shape.taps);
      if (i < place.count && tap >= 0) sums[i * shape.taps + tap] = dw[j][i];
    }
  }
}

constexpr int narrow = 4;  // channels of a thread where a wider pack fills its registers

/// f.template operator()<n, most_taps, aligned>(): n is `wide` for at most four taps.
template <int wide, class F>
cudaError_t for_taps(const ConvolutionShape& shape, bool aligned, const F& f) {
  if (shape.taps <= 4) {
    return aligned && shape.channels % wide == 0 ? f.template operator()<wide, 4, true>()
                                                 : f.template operator()<wide, 4, false>();
  }
  return aligned && shape.channels % narrow == 0 ? f.template operator()<narrow, 8, true>()
                                                 : f.template operator()<narrow, 8, false>();
}

dim3 blocks_of(const ConvolutionShape& shape, int n, std::int64_t chunk) {
  const std::int64_t blocks = tiles_of(shape, n) * shape.segments * ((shape.length + chunk - 1) / chunk);
  return {static_cast<unsigned>(blocks), static_cast<unsigned>(shape.count)};
}

}  // namespace

template <class T>
cudaError_t short_conv_forward(const ConvolutionShape& shape, const Convolutions<Convolution<T>>& convolutions,
                               const std::int32_t* start, cudaStream_t stream) {
  if (shape.segments * shape.length * shape.channels == 0) return cudaSuccess;
  bool are_aligned = true;
  for (int i = 0; i < shape.count; ++i) {
    const Convolution<T>& c = convolutions.each[i];
    are_aligned = are_aligned && all_aligned(c.x, c.halo, c.y);
  }
  return for_taps<pack_width<T>>(shape, are_aligned, [&]<int n, int most_taps, bool aligned>() {
    const std::int64_t chunk = chunk_of(shape, n);
    forward<T, n, most_taps, aligned>
        <<<blocks_of(shape, n, chunk), threads, 0, stream>>>(shape, chunk, convolutions, start);
    return cudaGetLastError();
  });
}
template cudaError_t short_conv_forward(const ConvolutionShape&, const Convolutions<Convolution<Bits>>&,
                                        const std::int32_t*, cudaStream_t);
template cudaError_t short_conv_forward(const ConvolutionShape&, const Convolutions<Convolution<float>>&,
                                        const std::int32_t*, cudaStream_t);

std::int64_t short_conv_partial_rows(const ConvolutionShape& shape) {
  const std::int64_t chunk = chunk_of(shape, narrow);
  return shape.segments * ((shape.length + chunk - 1) / chunk);
}

template <class T>
cudaError_t short_conv_backward(const ConvolutionShape& shape, const Convolutions<ConvolutionGradient<T>>& convolutions,
                                const std::int32_t* start, cudaStream_t stream) {
  if (shape.segments * shape.length * shape.channels == 0) return cudaSuccess;
  bool are_aligned = true;
  for (int i = 0; i < shape.count; ++i) {
    const ConvolutionGradient<T>& c = convolutions.each[i];
    are_aligned = are_aligned && all_aligned(c.dy, c.x, c.halo, c.dx, c.dhalo);
  }
  return for_taps<narrow>(shape, are_aligned, [&]<int n, int most_taps, bool aligned>() {
    const std::int64_t chunk = chunk_of(shape, n);
    backward<T, n, most_taps, aligned>
        <<<blocks_of(shape, n, chunk), threads, 0, stream>>>(shape, chunk, convolutions, start);
    return cudaGetLastError();
  });
}
template cudaError_t short_conv_backward(const ConvolutionShape&, const Convolutions<ConvolutionGradient<Bits>>&,
                                         const std::int32_t*, cudaStream_t);
template cudaError_t short_conv_backward(const ConvolutionShape&, const Convolutions<ConvolutionGradient<float>>&,
                                         const std::int32_t*, cudaStream_t);

}  // namespace deltapipe::kernels::cuda
