#include "kernels/cuda/launches.h"
#include "kernels/cuda/rows.cuh"

namespace deltapipe::kernels::cuda {
namespace {

/// `add`: of x + h, which goes to `sum`.
template <class T, int packs, bool aligned, bool add>
__global__ void __launch_bounds__(most_row_threads) forward(const T* x, const T* h, const T* w, float eps, T* sum, T* y,
                                                            float* rstd, std::int64_t rows, std::int64_t d) {
  constexpr int width = pack_width<T>, at_once = rows_at_once<packs>;
  __shared__ float shared[32 * at_once];
  const RowPlace<T, packs> place(d);
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * at_once;
  Pack<T, width> row[at_once][packs], weight[packs], other[at_once][packs];
#pragma unroll
  for (int r = 0; r < at_once; ++r) {
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      if (first + r < rows && place.count(k) > 0) {
        const std::int64_t at = (first + r) * d + place.at(k);
        row[r][k].template load<aligned>(x + at, place.count(k));
        if constexpr (add) other[r][k].template load<aligned>(h + at, place.count(k));
      }
    }
  }
#pragma unroll
  for (int k = 0; k < packs; ++k) {
    if (place.count(k) > 0) weight[k].template load<aligned>(w + place.at(k), place.count(k));
  }
  float sums[at_once] = {};
#pragma unroll
  for (int r = 0; r < at_once; ++r) {
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      if (first + r >= rows || place.count(k) <= 0) continue;
      float v[width];
      row[r][k].get(v);
      if constexpr (add) {
        float b[width];
        other[r][k].get(b);
#pragma unroll
        for (int j = 0; j < width; ++j) v[j] += b[j];
        row[r][k].set(v);
        row[r][k].get(v);  // what is normalised is what is kept
        row[r][k].template store<aligned>(sum + (first + r) * d + place.at(k), place.count(k));
      }
#pragma unroll
      for (int j = 0; j < width; ++j) sums[r] += v[j] * v[j];
    }
  }
  block_sum(sums, shared);
#pragma unroll
  for (int r = 0; r < at_once; ++r) {
    if (first + r >= rows) break;
    const float inverse = 1.0f / sqrtf(sums[r] / static_cast<float>(d) + eps);
    if (threadIdx.x == 0) rstd[first + r] = inverse;
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      if (place.count(k) <= 0) continue;
      float v[width], g[width];
      row[r][k].get(v);
      weight[k].get(g);
#pragma unroll
      for (int j = 0; j < width; ++j) v[j] = rounded<T>(v[j] * inverse) * g[j];
      row[r][k].set(v);
      row[r][k].template store<aligned>(y + (first + r) * d + place.at(k), place.count(k));
    }
  }
}

// With n = x * rstd: dx = rstd * (dy * w - n * mean(dy * w * n)); dw = sum over tokens of dy * n. A block owns
// consecutive rows, and one row of partial sums of dw. residual may be null.
template <class T, int packs, bool aligned>
__global__ void __launch_bounds__(most_row_threads, row_blocks_resident<packs>)
    backward(const T* dy, const T* x, const T* w, const float* rstd, const T* residual, T* dx, float* partials,
             std::int64_t rows, std::int64_t d, std::int64_t rows_each) {
  constexpr int width = pack_width<T>, at_once = rows_at_once<packs>;
  __shared__ float shared[2][32 * at_once];
  const RowPlace<T, packs> place(d);
  const std::int64_t begin = blockIdx.x * rows_each, end = begin + rows_each < rows ? begin + rows_each : rows;
  Pack<T, width> weight[packs];
  float dw[packs][width] = {};
#pragma unroll
  for (int k = 0; k < packs; ++k) {
    if (place.count(k) > 0) weight[k].template load<aligned>(w + place.at(k), place.count(k));
  }
  int buffer = 0;
  for (std::int64_t first = begin; first < end; first += at_once, buffer ^= 1) {
    Pack<T, width> g[at_once][packs], v[at_once][packs], old[at_once][packs];
    float r_std[at_once], sums[at_once] = {};
#pragma unroll
    for (int r = 0; r < at_once; ++r) {
      if (first + r >= end) break;
      r_std[r] = rstd[first + r];
#pragma unroll
      for (int k = 0; k < packs; ++k) {
        if (place.count(k) <= 0) continue;
        const std::int64_t at = (first + r) * d + place.at(k);
        g[r][k].template load<aligned>(dy + at, place.count(k));
        v[r][k].template load<aligned>(x + at, place.count(k));
        if (residual != nullptr) old[r][k].template load<aligned>(residual + at, place.count(k));
      }
    }
#pragma unroll
    for (int r = 0; r < at_once; ++r) {
      if (first + r >= end) break;
#pragma unroll
      for (int k = 0; k < packs; ++k) {
        if (place.count(k) <= 0) continue;
        float a[width], b[width], c[width];
        g[r][k].get(a);
        v[r][k].get(b);
        weight[k].get(c);
#pragma unroll
        for (int j = 0; j < width; ++j) {
          const float product = a[j] * b[j];
          dw[k][j] += product * r_std[r];
          sums[r] += product * c[j];
        }
      }
    }
    block_sum(sums, shared[buffer]);
#pragma unroll
    for (int r = 0; r < at_once; ++r) {
      if (first + r >= end) break;
      const float mean = sums[r] * r_std[r] * r_std[r] / static_cast<float>(d);
#pragma unroll
      for (int k = 0; k < packs; ++k) {
        if (place.count(k) <= 0) continue;
        float a[width], b[width], c[width];
        g[r][k].get(a);
        v[r][k].get(b);
        weight[k].get(c);
#pragma unroll
        for (int j = 0; j < width; ++j) a[j] = r_std[r] * (a[j] * c[j] - b[j] * mean);
        if (residual != nullptr) {
          old[r][k].get(b);
#pragma unroll
          for (int j = 0; j < width; ++j) a[j] += b[j];
        }
        g[r][k].set(a);
        g[r][k].template store<aligned>(dx + (first + r) * d + place.at(k), place.count(k));
      }
    }
  }
  if (partials == nullptr) return;
#pragma unroll
  for (int k = 0; k < packs; ++k) {
    if (place.count(k) <= 0) continue;
    Pack<float, width> out;
    out.set(dw[k]);
    out.template store<aligned>(partials + blockIdx.x * d + place.at(k), place.count(k));
  }
}

}  // namespace

template <class T>
cudaError_t rms_norm_forward(const T* x, const T* h, const T* w, float eps, T* sum, T* y, float* rstd,
                             std::int64_t rows, std::int64_t d, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return for_row_packs<T>(d, [&]<int packs>(int threads) {
    const auto launch = [&]<bool aligned>() {
      constexpr int at_once = rows_at_once<packs>;
      const auto kernel = h == nullptr ? forward<T, packs, aligned, false> : forward<T, packs, aligned, true>;
      kernel<<<static_cast<unsigned>((rows + at_once - 1) / at_once), threads, 0, stream>>>(x, h, w, eps, sum, y, rstd,
                                                                                            rows, d);
      return cudaGetLastError();
    };
    return for_alignment<T>(d, launch, x, h, w, sum, y);
  });
}
template cudaError_t rms_norm_forward(const Bits*, const Bits*, const Bits*, float, Bits*, Bits*, float*, std::int64_t,
                                      std::int64_t, cudaStream_t);
template cudaError_t rms_norm_forward(const float*, const float*, const float*, float, float*, float*, float*,
                                      std::int64_t, std::int64_t, cudaStream_t);

std::int64_t rms_norm_partial_rows(std::int64_t rows) { return row_blocks(rows); }

template <class T>
cudaError_t rms_norm_backward(const T* dy, const T* x, const T* w, const float* rstd, const T* residual, T* dx,
                              float* partials, std::int64_t rows, std::int64_t d, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return for_row_packs<T>(d, [&]<int packs>(int threads) {
    const auto launch = [&]<bool aligned>() {
      backward<T, packs, aligned><<<static_cast<unsigned>(row_blocks(rows)), threads, 0, stream>>>(
          dy, x, w, rstd, residual, dx, partials, rows, d, rows_per_block(rows));
      return cudaGetLastError();
    };
    return for_alignment<T>(d, launch, dy, x, w, residual, dx, partials);
  });
}
template cudaError_t rms_norm_backward(const Bits*, const Bits*, const Bits*, const float*, const Bits*, Bits*, float*,
                                       std::int64_t, std::int64_t, cudaStream_t);
template cudaError_t rms_norm_backward(const float*, const float*, const float*, const float*, const float*, float*,
                                       float*, std::int64_t, std::int64_t, cudaStream_t);

}  // namespace deltapipe::kernels::cuda
