#include "kernels/cuda/launches.h"
#include "kernels/cuda/rows.cuh"

#include <algorithm>

namespace deltapipe::kernels::cuda {
namespace {

constexpr double smallest_norm = 1e-8;  // as in torch

/// What a row's threads add up.
enum RowSum : int { ss, tt, st, difference, growth, row_sums };  // difference = |s - t|^2, growth = (s - t) . (s + t)

__device__ __forceinline__ void add_products(float s, float t, float* sum) {
  const float apart = s - t;
  sum[ss] += s * s;
  sum[tt] += t * t;
  sum[st] += s * t;
  sum[difference] += apart * apart;
  sum[growth] += apart * (s + t);
}

struct RowFactors {
  float difference, student, teacher;  // ds += difference * (s - t) + student * s + teacher * t
};

/// Adds a row's losses to `total`; from float sums, without cancellation where s is close to t:
///   |s| |t| - s.t = (|s - t|^2 - (|s| - |t|)^2) / 2,  |s| - |t| = growth / (|s| + |t|).
__device__ RowFactors finish_row(const float (&v)[row_sums], double d, double cosine_scale, double mse_scale,
                                 double (&total)[2]) {
  const double norm_s = sqrt(static_cast<double>(v[ss])), norm_t = sqrt(static_cast<double>(v[tt]));
  const double n_s = fmax(norm_s, smallest_norm), n_t = fmax(norm_t, smallest_norm);
  const double across = 1 / (n_s * n_t);
  const double longer = static_cast<double>(v[growth]) / (norm_s + norm_t);  // |s| - |t|; unused when both are 0
  const bool clamped = !(norm_s > smallest_norm && norm_t > smallest_norm);
  const double distance = clamped ? 1 - static_cast<double>(v[st]) * across
                                  : (static_cast<double>(v[difference]) - longer * longer) * 0.5 * across;
  total[0] += distance;
  total[1] += static_cast<double>(v[difference]) / d;
  const double mse = 2 * mse_scale / d;
  if (clamped) {
    // d(1 - cos) / ds = cos / |s|^2 s - across t, without the first term where |s| is clamped.
    const double along = norm_s > smallest_norm ? (1 - distance) / static_cast<double>(v[ss]) : 0.0;
    return {static_cast<float>(mse), static_cast<float>(cosine_scale * along),
            static_cast<float>(-cosine_scale * across)};
  }
  // The same as across (s - t) + (cos / |s|^2 - across) s; cos / |s|^2 = across (|t| / |s|) cos, so the bracket is
  // across ((1 - longer / |s|) (1 - distance) - 1).
  const double shorter = -longer / norm_s, along = across * (shorter - distance - shorter * distance);
  return {static_cast<float>(cosine_scale * across + mse), static_cast<float>(cosine_scale * along), 0.0f};
}

template <class T, class G, int packs, bool aligned>
__global__ void __launch_bounds__(most_row_threads, row_blocks_resident<packs>)
    rows_loss(const T* student, const T* teacher, const std::int32_t* labels, double cosine_scale, double mse_scale,
              G* d_student, double* partials, std::int64_t rows, std::int64_t d, std::int64_t rows_each) {
  constexpr int width = pack_width<T>, at_once = rows_at_once<packs>, n = row_sums * at_once;
  __shared__ float shared[2][32 * n];
  __shared__ RowFactors factors[2][at_once];
  const RowPlace<T, packs> place(d);
  const std::int64_t begin = blockIdx.x * rows_each, end = begin + rows_each < rows ? begin + rows_each : rows;
  double total[2] = {0, 0};  // of row r of every step, in thread r
  int buffer = 0;
  for (std::int64_t first = begin; first < end; first += at_once, buffer ^= 1) {
    Pack<T, width> s[at_once][packs], t[at_once][packs];
    Pack<G, width> old[at_once][packs];
    bool wanted[at_once];
#pragma unroll
    for (int r = 0; r < at_once; ++r) wanted[r] = first + r < end && labels[first + r] >= 0;
#pragma unroll
    for (int r = 0; r < at_once; ++r) {
#pragma unroll
      for (int k = 0; k < packs; ++k) {
        if (!wanted[r] || place.count(k) <= 0) continue;
        const std::int64_t at = (first + r) * d + place.at(k);
        s[r][k].template load<aligned>(student + at, place.count(k));
        t[r][k].template load<aligned>(teacher + at, place.count(k));
        old[r][k].template load<aligned>(d_student + at, place.count(k));
      }
    }
    float sums[n] = {};
#pragma unroll
    for (int r = 0; r < at_once; ++r) {
#pragma unroll
      for (int k = 0; k < packs; ++k) {
        if (!wanted[r] || place.count(k) <= 0) continue;
        float a[width], b[width];
        s[r][k].get(a);
        t[r][k].get(b);
#pragma unroll
        for (int j = 0; j < width; ++j) add_products(a[j], b[j], sums + r * row_sums);
      }
    }
    block_sum(sums, shared[buffer]);
#pragma unroll
    for (int r = 0; r < at_once; ++r) {
      if (threadIdx.x == r && wanted[r]) {
        float row[row_sums];
#pragma unroll
        for (int i = 0; i < row_sums; ++i) row[i] = sums[r * row_sums + i];
        factors[buffer][r] = finish_row(row, static_cast<double>(d), cosine_scale, mse_scale, total);
      }
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < at_once; ++r) {
      if (!wanted[r]) continue;
      const RowFactors f = factors[buffer][r];
#pragma unroll
      for (int k = 0; k < packs; ++k) {
        if (place.count(k) <= 0) continue;
        float a[width], b[width], c[width];
        s[r][k].get(a);
        t[r][k].get(b);
        old[r][k].get(c);
#pragma unroll
        for (int j = 0; j < width; ++j) c[j] += f.difference * (a[j] - b[j]) + f.student * a[j] + f.teacher * b[j];
        old[r][k].set(c);
        old[r][k].template store<aligned>(d_student + (first + r) * d + place.at(k), place.count(k));
      }
    }
  }
  if (threadIdx.x < at_once) {
    double* out = partials + 2 * (static_cast<std::int64_t>(blockIdx.x) * at_once + threadIdx.x);
    out[0] = total[0];
    out[1] = total[1];
  }
}

// The sums alone need nothing of a row once it is added up: a warp a row, no barriers. The lanes of a warp keep the
// sums of 32 of its rows, one each, and finish them together in double.
constexpr int sum_warps = 8;
constexpr int sum_packs = 5;            // of each tensor that a thread has in flight: a row of 2,560 takes two turns
constexpr int sum_blocks_resident = 3;  // blocks of a multiprocessor: 80 registers a thread
constexpr std::int64_t most_sum_blocks = 132 * sum_blocks_resident;

std::int64_t rows_per_sum_warp(std::int64_t rows) {
  return (rows + most_sum_blocks * sum_warps - 1) / (most_sum_blocks * sum_warps);
}
std::int64_t sum_blocks(std::int64_t rows) {
  const std::int64_t each = rows_per_sum_warp(rows) * sum_warps;
  return rows == 0 ? 0 : (rows + each - 1) / each;
}

template <class T, bool aligned>
__global__ void __launch_bounds__(32 * sum_warps, sum_blocks_resident)
    rows_distance(const T* student, const T* teacher, const std::int32_t* labels, double* partials, std::int64_t rows,
                  std::int64_t d, std::int64_t rows_each) {
  constexpr int width = pack_width<T>;
  __shared__ double shared[2 * 32];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t begin = (static_cast<std::int64_t>(blockIdx.x) * sum_warps + warp) * rows_each;
  const std::int64_t end = begin + rows_each < rows ? begin + rows_each : rows;
  double total[2] = {0, 0};
  for (std::int64_t first = begin; first < end; first += 32) {
    const std::int64_t last = first + 32 < end ? first + 32 : end;
    float own[row_sums] = {};
    bool wanted = false;
    for (std::int64_t r = first; r < last; ++r) {
      if (labels[r] < 0) continue;
      float sum[row_sums] = {};
      for (std::int64_t from = lane * width; from < d; from += sum_packs * 32 * width) {
        Pack<T, width> s[sum_packs], t[sum_packs];
#pragma unroll
        for (int u = 0; u < sum_packs; ++u) {
          const std::int64_t at = from + u * 32 * width;
          if (at >= d) continue;
          const int count = d - at < width ? static_cast<int>(d - at) : width;
          s[u].template load<aligned>(student + r * d + at, count);
          t[u].template load<aligned>(teacher + r * d + at, count);
        }
#pragma unroll
        for (int u = 0; u < sum_packs; ++u) {
          if (from + u * 32 * width >= d) continue;
          float a[width], b[width];
          s[u].get(a);
          t[u].get(b);
#pragma unroll
          for (int j = 0; j < width; ++j) add_products(a[j], b[j], sum);
        }
      }
#pragma unroll
      for (float& x : sum) x = warp_sum(x);
      if (lane == r - first) {
#pragma unroll
        for (int i = 0; i < row_sums; ++i) own[i] = sum[i];
        wanted = true;
      }
    }
    if (wanted) finish_row(own, static_cast<double>(d), 0, 0, total);
  }
  block_sum(total, shared);
  if (threadIdx.x != 0) return;
  partials[2 * blockIdx.x] = total[0];
  partials[2 * blockIdx.x + 1] = total[1];
}

template <class T>
cudaError_t distances(const T* student, const T* teacher, const std::int32_t* labels, double* partials, double* sums,
                      std::int64_t rows, std::int64_t d, cudaStream_t stream) {
  const std::int64_t blocks = sum_blocks(rows);
  const auto launch = [&]<bool aligned>() {
    rows_distance<T, aligned><<<static_cast<unsigned>(blocks), 32 * sum_warps, 0, stream>>>(
        student, teacher, labels, partials, rows, d, rows_per_sum_warp(rows));
    const cudaError_t status = cudaGetLastError();
    return status != cudaSuccess ? status : add_column_sums(partials, blocks, 2, sums, stream);
  };
  return for_alignment<T>(d, launch, student, teacher);
}

}  // namespace

std::int64_t hidden_loss_partials(std::int64_t rows) {
  return std::max(row_blocks(rows) * rows_at_once<1>, sum_blocks(rows));
}

template <class T, class G>
cudaError_t hidden_loss(const T* student, const T* teacher, const std::int32_t* labels, double cosine_scale,
                        double mse_scale, G* d_student, double* partials, double* sums, std::int64_t rows,
                        std::int64_t d, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  if (d_student == nullptr) return distances(student, teacher, labels, partials, sums, rows, d, stream);
  return for_row_packs<T>(d, [&]<int packs>(int threads) {
    const auto launch = [&]<bool aligned>() {
      rows_loss<T, G, packs, aligned><<<static_cast<unsigned>(row_blocks(rows)), threads, 0, stream>>>(
          student, teacher, labels, cosine_scale, mse_scale, d_student, partials, rows, d, rows_per_block(rows));
      const cudaError_t status = cudaGetLastError();
      return status != cudaSuccess ? status
                                   : add_column_sums(partials, row_blocks(rows) * rows_at_once<packs>, 2, sums, stream);
    };
    return for_alignment<T>(d, launch, student, teacher, d_student);
  });
}
template cudaError_t hidden_loss(const Bits*, const Bits*, const std::int32_t*, double, double, Bits*, double*, double*,
                                 std::int64_t, std::int64_t, cudaStream_t);
template cudaError_t hidden_loss(const Bits*, const Bits*, const std::int32_t*, double, double, float*, double*,
                                 double*, std::int64_t, std::int64_t, cudaStream_t);
template cudaError_t hidden_loss(const float*, const float*, const std::int32_t*, double, double, float*, double*,
                                 double*, std::int64_t, std::int64_t, cudaStream_t);

}  // namespace deltapipe::kernels::cuda
