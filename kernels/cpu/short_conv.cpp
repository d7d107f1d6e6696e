#include "kernels/short_conv.h"

#include "kernels/cpu/common.h"
#include "kernels/cpu/vector_math.h"

#include <algorithm>

namespace deltapipe::kernels::cpu {
namespace {

constexpr std::int64_t lanes = 64;        // channels a task holds taps and rows of on its stack
constexpr std::int64_t task_tokens = 64;  // tokens of a forward task

/// Calls f.template operator()<W>() for width = W in 1 .. 8, so that the loops over taps unroll.
template <int W = 8, class F>
void for_width(std::int64_t width, const F& f) {
  if (width == W) {
    f.template operator()<W>();
  } else if constexpr (W > 1) {
    for_width<W - 1>(width, f);
  }
}

/// One segment's rows, halo included.
template <class T>
struct Rows {
  const T* x;     // [L, D]
  const T* halo;  // [W - 1, D] or null
  const std::int32_t* start;
  std::int64_t d;
  std::int64_t width;

  /// Row s as token t may see it, or `zeros` where it may not.
  const T* at(std::int64_t s, std::int64_t t, std::int64_t channel, const T* zeros) const {
    if (s < start[t]) return zeros;
    if (s >= 0) return x + s * d + channel;
    return halo != nullptr ? halo + (s + width - 1) * d + channel : zeros;
  }
};

/// w [D, W] of channels [begin, begin + n) as [W][lanes].
template <class T>
void transpose_taps(const T* w, std::int64_t width, std::int64_t begin, std::int64_t n, T (&out)[8][lanes]) {
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < width; ++j) out[j][i] = w[(begin + i) * width + j];
  }
}

template <class T, int W>
void forward_task(const Rows<T>& rows, const T* w, T* y, std::int64_t channel, std::int64_t n, std::int64_t begin,
                  std::int64_t end) {
  T taps[8][lanes];
  const T zeros[lanes] = {};
  transpose_taps(w, W, channel, n, taps);
  for (std::int64_t t = begin; t < end; ++t) {
    const T* row[W];
    for (int j = 0; j < W; ++j) row[j] = rows.at(t - (W - 1) + j, t, channel, zeros);
    T* out = y + t * rows.d + channel;
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) {
      T p = 0;
      for (int j = 0; j < W; ++j) p += taps[j][i] * row[j][i];
      out[i] = vsilu(p);
    }
  }
}

// With dp[t] = dy[t] * silu'(p[t]): dx[s] = sum of w[:, W - 1 - (t - s)] dp[t] over t in s .. s + W - 1 that may see s.
// A ring holds dp of the newest W tokens, so that every dx row is written once.
template <class T, int W>
void backward_segment(const Rows<T>& rows, const T (&taps)[8][lanes], const T* dy, std::int64_t length,
                      std::int64_t channel, std::int64_t n, T* dx, T* dhalo, T (&dw)[8][lanes]) {
  T ring[W][lanes];
  const T zeros[lanes] = {};
  for (std::int64_t t = 0; t < length + W - 1; ++t) {
    if (t < length) {
      const T* row[W];
      for (int j = 0; j < W; ++j) row[j] = rows.at(t - (W - 1) + j, t, channel, zeros);
      const T* g = dy + t * rows.d + channel;
      T* dp = ring[t % W];
#pragma omp simd
      for (std::int64_t i = 0; i < n; ++i) {
        T p = 0;
        for (int j = 0; j < W; ++j) p += taps[j][i] * row[j][i];
        const T grad = g[i] * vsilu_derivative(p);
        dp[i] = grad;
        for (int j = 0; j < W; ++j) dw[j][i] += grad * row[j][i];
      }
    }
    const std::int64_t s = t - (W - 1);
    T* out = s >= 0 ? dx + s * rows.d : (dhalo != nullptr ? dhalo + (s + W - 1) * rows.d : nullptr);
    if (out == nullptr) continue;
    out += channel;
    const T* dp[W];
    for (int j = 0; j < W; ++j) {
      const std::int64_t reader = s + (W - 1) - j;  // the token that sees s through tap j
      const bool sees = reader >= 0 && reader < length && s >= rows.start[reader];
      dp[j] = sees ? ring[reader % W] : zeros;
    }
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) {
      T sum = 0;
      for (int j = 0; j < W; ++j) sum += taps[j][i] * dp[j][i];
      out[i] = sum;
    }
  }
}

void forward(const ShortConv& c, const Tensor& start) {
  const Tensor &x = c.x, &w = c.w, &halo = c.halo, &y = c.y;
  for_real(x.dtype, "short_conv_forward", [&]<class T>() {
    const std::int64_t segments = x.dim(0), length = x.dim(1), d = x.dim(2), width = w.dim(1);
    const std::int64_t channel_blocks = (d + lanes - 1) / lanes;
    const std::int64_t token_blocks = (length + task_tokens - 1) / task_tokens;
    for_width(width, [&]<int W>() {
      parallel_for(segments * token_blocks * channel_blocks, [&](std::int64_t task) {
        const std::int64_t channel = task % channel_blocks * lanes;
        const std::int64_t begin = task / channel_blocks % token_blocks * task_tokens;
        const std::int64_t s = task / channel_blocks / token_blocks;
        const Rows<T> rows{x.as<T>() + s * length * d, halo ? halo.as<T>() + s * (W - 1) * d : nullptr,
                           start.as<std::int32_t>() + s * length, d, W};
        forward_task<T, W>(rows, w.as<T>(), y.as<T>() + s * length * d, channel, std::min(lanes, d - channel), begin,
                           std::min(begin + task_tokens, length));
      });
    });
  });
}

// Tasks own channels, not tokens: each sum of dw has one owner and one order.
void backward(const ShortConvGradient& c, const Tensor& start) {
  const Tensor &dy = c.dy, &x = c.x, &w = c.w, &halo = c.halo, &dx = c.dx, &dw = c.dw, &dhalo = c.dhalo;
  for_real(x.dtype, "short_conv_backward", [&]<class T>() {
    const std::int64_t segments = x.dim(0), length = x.dim(1), d = x.dim(2), width = w.dim(1);
    T* pdw = dw ? dw.as<T>() : nullptr;
    for_width(width, [&]<int W>() {
      parallel_blocks(d, lanes / 2, [&](std::int64_t channel, std::int64_t channel_end) {
        const std::int64_t n = channel_end - channel;
        T taps[8][lanes];
        transpose_taps(w.as<T>(), W, channel, n, taps);
        for (std::int64_t s = 0; s < segments; ++s) {
          const Rows<T> rows{x.as<T>() + s * length * d, halo ? halo.as<T>() + s * (W - 1) * d : nullptr,
                             start.as<std::int32_t>() + s * length, d, W};
          T sums[8][lanes] = {};  // one segment at a time: short sums stay accurate
          backward_segment<T, W>(rows, taps, dy.as<T>() + s * length * d, length, channel, n,
                                 dx.as<T>() + s * length * d, dhalo ? dhalo.as<T>() + s * (W - 1) * d : nullptr, sums);
          if (pdw == nullptr) continue;
          for (std::int64_t i = 0; i < n; ++i) {
            for (int j = 0; j < W; ++j) pdw[(channel + i) * W + j] += sums[j][i];
          }
        }
      });
    });
  });
}

}  // namespace

void short_conv_forward(const Stream&, std::span<const ShortConv> convolutions, const Tensor& start) {
  for (const ShortConv& c : convolutions) forward(c, start);
}

void short_conv_backward(const Stream& stream, std::span<const ShortConvGradient> convolutions, const Tensor& start,
                         Arena&) {
  if (stream.is_dry()) return;
  for (const ShortConvGradient& c : convolutions) backward(c, start);
}

}  // namespace deltapipe::kernels::cpu
