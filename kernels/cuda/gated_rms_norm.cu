#include "kernels/cuda/launches.h"
#include "kernels/cuda/vector.cuh"

#include <algorithm>

namespace deltapipe::kernels::cuda {
namespace {

constexpr int threads = 256;
constexpr std::int64_t most_blocks = 396;  // backward: three on each of an H100's 132 multiprocessors
/// Rows that a thread has in flight.
template <int packs>
constexpr int rows_at_once = packs == 1 ? 2 : 1;

// A row of `channels` lies in `lanes` neighbouring threads (a power of two, at most a warp), `packs` packs each.
template <class T, int packs>
struct Place {
  static constexpr int width = pack_width<T>;
  int lanes, lane, group, groups, channels;
  __device__ Place(int lanes_, int channels_)
      : lanes(lanes_),
        lane(static_cast<int>(threadIdx.x) % lanes_),
        group(static_cast<int>(threadIdx.x) / lanes_),
        groups(threads / lanes_),
        channels(channels_) {}
  __device__ __forceinline__ int at(int k) const { return (lane + k * lanes) * width; }
  __device__ __forceinline__ int count(int k) const { return min(width, channels - at(k)); }
  __device__ __forceinline__ float sum(float x) const {
    for (int offset = lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
  }
};

template <class T, int packs, bool aligned>
__global__ void __launch_bounds__(threads) forward(const T* x, const T* gate, const T* w, float eps, T* y, float* rstd,
                                                   std::int64_t rows, int channels, int lanes) {
  constexpr int width = pack_width<T>, at_once = rows_at_once<packs>;
  const Place<T, packs> place(lanes, channels);
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * (place.groups * at_once) + place.group;
  Pack<T, width> v[at_once][packs], z[at_once][packs], weight[packs];
#pragma unroll
  for (int r = 0; r < at_once; ++r) {
    const std::int64_t row = first + r * place.groups;
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      if (row >= rows || place.count(k) <= 0) continue;
      v[r][k].template load<aligned>(x + row * channels + place.at(k), place.count(k));
      z[r][k].template load<aligned>(gate + row * channels + place.at(k), place.count(k));
    }
  }
#pragma unroll
  for (int k = 0; k < packs; ++k) {
    if (place.count(k) > 0) weight[k].template load<aligned>(w + place.at(k), place.count(k));
  }
#pragma unroll
  for (int r = 0; r < at_once; ++r) {
    const std::int64_t row = first + r * place.groups;
    float sum = 0;
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      if (row >= rows || place.count(k) <= 0) continue;
      float a[width];
      v[r][k].get(a);
#pragma unroll
      for (int j = 0; j < width; ++j) sum += a[j] * a[j];
    }
    sum = place.sum(sum);
    if (row >= rows) continue;
    const float inverse = 1.0f / sqrtf(sum / static_cast<float>(channels) + eps);
    if (place.lane == 0) rstd[row] = inverse;
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      if (place.count(k) <= 0) continue;
      float a[width], b[width], c[width];
      v[r][k].get(a);
      z[r][k].get(b);
      weight[k].get(c);
#pragma unroll
      for (int j = 0; j < width; ++j) a[j] *= inverse * c[j] * sigmoid<T>(b[j]);
      v[r][k].set(a);
      v[r][k].template store<aligned>(y + row * channels + place.at(k), place.count(k));
    }
  }
}

// With n = x * rstd and s = sigmoid(gate): dn = dy * w * s, dx = rstd * (dn - n * mean(dn * n)),
// dgate = dn * n * (1 - s), dw = sum over rows of dy * n * s. A block owns consecutive rows and one row of partial
// sums.
template <class T, int packs, bool aligned>
__global__ void __launch_bounds__(threads, packs == 1   ? 3
                                           : packs == 2 ? 2
                                                        : 1)
    backward(const T* dy, const T* x, const T* gate, const T* w, const float* rstd, T* dx, T* dgate, float* partials,
             std::int64_t rows, int channels, int lanes, std::int64_t rows_each) {
  constexpr int width = pack_width<T>, at_once = rows_at_once<packs>;
  __shared__ float shared[threads * width * packs];  // [groups, lanes * packs * width]
  const Place<T, packs> place(lanes, channels);
  const std::int64_t begin = blockIdx.x * rows_each, end = begin + rows_each < rows ? begin + rows_each : rows;
  Pack<T, width> weight[packs];
  float dw[packs][width] = {};
#pragma unroll
  for (int k = 0; k < packs; ++k) {
    if (place.count(k) > 0) weight[k].template load<aligned>(w + place.at(k), place.count(k));
  }
  for (std::int64_t step = begin; step < end; step += place.groups * at_once) {
    Pack<T, width> g[at_once][packs], v[at_once][packs], z[at_once][packs];
    float r_std[at_once];
#pragma unroll
    for (int r = 0; r < at_once; ++r) {
      const std::int64_t row = step + place.group + r * place.groups;
      r_std[r] = row < end ? rstd[row] : 0.0f;
#pragma unroll
      for (int k = 0; k < packs; ++k) {
        if (row >= end || place.count(k) <= 0) continue;
        const std::int64_t at = row * channels + place.at(k);
        g[r][k].template load<aligned>(dy + at, place.count(k));
        v[r][k].template load<aligned>(x + at, place.count(k));
        z[r][k].template load<aligned>(gate + at, place.count(k));
      }
    }
#pragma unroll
    for (int r = 0; r < at_once; ++r) {
      const std::int64_t row = step + place.group + r * place.groups;
      float dn[packs][width], n[packs][width], mean = 0;
#pragma unroll
      for (int k = 0; k < packs; ++k) {
        if (row >= end || place.count(k) <= 0) continue;
        float a[width], b[width], c[width];
        g[r][k].get(a);
        v[r][k].get(n[k]);
        z[r][k].get(b);
        weight[k].get(c);
        float d_gate[width];
#pragma unroll
        for (int j = 0; j < width; ++j) {
          const float s = sigmoid<T>(b[j]);
          n[k][j] *= r_std[r];
          const float gated = a[j] * s;
          dw[k][j] += gated * n[k][j];
          dn[k][j] = gated * c[j];
          mean += dn[k][j] * n[k][j];
          d_gate[j] = dn[k][j] * n[k][j] * (1.0f - s);
        }
        z[r][k].set(d_gate);
      }
      mean = place.sum(mean) / static_cast<float>(channels);
#pragma unroll
      for (int k = 0; k < packs; ++k) {
        if (row >= end || place.count(k) <= 0) continue;
        float out[width];
#pragma unroll
        for (int j = 0; j < width; ++j) out[j] = r_std[r] * (dn[k][j] - n[k][j] * mean);
        g[r][k].set(out);
        const std::int64_t at = row * channels + place.at(k);
        g[r][k].template store<aligned>(dx + at, place.count(k));
        z[r][k].template store<aligned>(dgate + at, place.count(k));
      }
    }
  }
  if (partials == nullptr) return;
  const int padded = lanes * packs * width;
#pragma unroll
  for (int k = 0; k < packs; ++k) {
#pragma unroll
    for (int j = 0; j < width; ++j) shared[place.group * padded + place.at(k) + j] = dw[k][j];
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < channels; i += threads) {
    float sum = 0;
    for (int q = 0; q < place.groups; ++q) sum += shared[q * padded + i];
    partials[static_cast<std::int64_t>(blockIdx.x) * channels + i] = sum;
  }
}

std::int64_t rows_each_block(std::int64_t rows) { return (rows + most_blocks - 1) / most_blocks; }

/// f.template operator()<packs, aligned>(lanes)
template <class T, class F>
cudaError_t for_channels(int channels, bool aligned, const F& f) {
  const int all = (channels + pack_width<T> - 1) / pack_width<T>;
  int lanes = 1;
  while (lanes < 32 && lanes < all) lanes *= 2;
  const auto with = [&]<int packs>() {
    return aligned && channels % pack_width<T> == 0 ? f.template operator()<packs, true>(lanes)
                                                    : f.template operator()<packs, false>(lanes);
  };
  if (all <= 32) return with.template operator()<1>();
  if (all <= 64) return with.template operator()<2>();
  return with.template operator()<4>();
}

}  // namespace

template <class T>
cudaError_t gated_rms_norm_forward(const T* x, const T* gate, const T* w, float eps, T* y, float* rstd,
                                   std::int64_t rows, int channels, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return for_channels<T>(channels, all_aligned(x, gate, w, y), [&]<int packs, bool aligned>(int lanes) {
    const std::int64_t each = threads / lanes * rows_at_once<packs>;
    forward<T, packs, aligned><<<static_cast<unsigned>((rows + each - 1) / each), threads, 0, stream>>>(
        x, gate, w, eps, y, rstd, rows, channels, lanes);
    return cudaGetLastError();
  });
}
template cudaError_t gated_rms_norm_forward(const Bits*, const Bits*, const Bits*, float, Bits*, float*, std::int64_t,
                                            int, cudaStream_t);
template cudaError_t gated_rms_norm_forward(const float*, const float*, const float*, float, float*, float*,
                                            std::int64_t, int, cudaStream_t);

std::int64_t gated_rms_norm_partial_rows(std::int64_t rows) {
  if (rows == 0) return 0;
  const std::int64_t each = rows_each_block(rows);
  return (rows + each - 1) / each;
}

template <class T>
cudaError_t gated_rms_norm_backward(const T* dy, const T* x, const T* gate, const T* w, const float* rstd, T* dx,
                                    T* dgate, float* partials, std::int64_t rows, int channels, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return for_channels<T>(channels, all_aligned(dy, x, gate, w, dx, dgate), [&]<int packs, bool aligned>(int lanes) {
    const auto blocks = static_cast<unsigned>(gated_rms_norm_partial_rows(rows));
    backward<T, packs, aligned><<<blocks, threads, 0, stream>>>(dy, x, gate, w, rstd, dx, dgate, partials, rows,
                                                                channels, lanes, rows_each_block(rows));
    return cudaGetLastError();
  });
}
template cudaError_t gated_rms_norm_backward(const Bits*, const Bits*, const Bits*, const Bits*, const float*, Bits*,
                                             Bits*, float*, std::int64_t, int, cudaStream_t);
template cudaError_t gated_rms_norm_backward(const float*, const float*, const float*, const float*, const float*,
                                             float*, float*, float*, std::int64_t, int, cudaStream_t);

}  // namespace deltapipe::kernels::cuda
