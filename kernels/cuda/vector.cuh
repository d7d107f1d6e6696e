// What the memory-bound kernels share: packs of neighbouring elements, moved 16 bytes at a time where pointers allow
// it, sums over a block of threads in a fixed order, and the exponential.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace deltapipe::kernels::cuda {

using Bits = std::uint16_t;  // of a bfloat16

/// Elements of the widest type of a call that one 16-byte access holds.
template <class... T>
inline constexpr int pack_width = 16 / static_cast<int>([] {
                                    std::size_t widest = 0;
                                    ((widest = sizeof(T) > widest ? sizeof(T) : widest), ...);
                                    return widest;
                                  }());

/// What a type is computed in.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ float to_compute(Bits x) { return __uint_as_float(static_cast<std::uint32_t>(x) << 16); }
__device__ __forceinline__ float to_compute(float x) { return x; }
__device__ __forceinline__ double to_compute(double x) { return x; }

__device__ __forceinline__ std::uint32_t round_pair(float low, float high) {
  std::uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <class T>
__device__ __forceinline__ T round_to(Compute<T> x) {
  if constexpr (std::is_same_v<T, Bits>) {
    return static_cast<Bits>(round_pair(x, 0.0f));
  } else {
    return x;
  }
}
/// x as it is after a round trip through T.
template <class T>
__device__ __forceinline__ float rounded(float x) {
  return to_compute(round_to<T>(x));
}

/// n neighbouring elements of type T in registers.
template <class T, int n>
struct Pack {
  static constexpr int bytes = n * static_cast<int>(sizeof(T));
  static_assert(bytes % 8 == 0);
  std::uint32_t words[bytes / 4];

  /// `aligned`: all n elements are there and p is a multiple of the access. Else the first `count` are read one by one
  /// and the others are 0.
  template <bool aligned>
  __device__ __forceinline__ void load(const T* p, int count = n) {
    if constexpr (aligned) {
      if constexpr (bytes % 16 == 0) {
#pragma unroll
        for (int i = 0; i < bytes / 16; ++i) {
          const uint4 v = reinterpret_cast<const uint4*>(p)[i];
          words[4 * i] = v.x;
          words[4 * i + 1] = v.y;
          words[4 * i + 2] = v.z;
          words[4 * i + 3] = v.w;
        }
      } else {
        const uint2 v = *reinterpret_cast<const uint2*>(p);
        words[0] = v.x;
        words[1] = v.y;
      }
    } else {
      Compute<T> v[n];
#pragma unroll
      for (int i = 0; i < n; ++i) v[i] = i < count ? to_compute(p[i]) : Compute<T>(0);
      set(v);
    }
  }
  template <bool aligned>
  __device__ __forceinline__ void store(T* p, int count = n) const {
    if constexpr (aligned) {
      if constexpr (bytes % 16 == 0) {
#pragma unroll
        for (int i = 0; i < bytes / 16; ++i) {
          reinterpret_cast<uint4*>(p)[i] =
              make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
        }
      } else {
        *reinterpret_cast<uint2*>(p) = make_uint2(words[0], words[1]);
      }
    } else {
      Compute<T> v[n];
      get(v);
#pragma unroll
      for (int i = 0; i < n; ++i) {
        if (i < count) p[i] = round_to<T>(v[i]);
      }
    }
  }
  __device__ __forceinline__ void get(Compute<T> (&v)[n]) const {
    if constexpr (std::is_same_v<T, Bits>) {
#pragma unroll
      for (int i = 0; i < n / 2; ++i) {
        v[2 * i] = __uint_as_float(words[i] << 16);
        v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
      }
    } else if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int i = 0; i < n; ++i) v[i] = __uint_as_float(words[i]);
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        v[i] = __hiloint2double(static_cast<int>(words[2 * i + 1]), static_cast<int>(words[2 * i]));
      }
    }
  }
  /// Rounds to nearest even.
  __device__ __forceinline__ void set(const Compute<T> (&v)[n]) {
    if constexpr (std::is_same_v<T, Bits>) {
#pragma unroll
      for (int i = 0; i < n / 2; ++i) words[i] = round_pair(v[2 * i], v[2 * i + 1]);
    } else if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int i = 0; i < n; ++i) words[i] = __float_as_uint(v[i]);
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        words[2 * i] = static_cast<std::uint32_t>(__double2loint(v[i]));
        words[2 * i + 1] = static_cast<std::uint32_t>(__double2hiint(v[i]));
      }
    }
  }
};

/// Whether all pointers are multiples of 16 bytes; null counts.
template <class... P>
bool all_aligned(const P*... p) {
  return ((reinterpret_cast<std::uintptr_t>(p) % 16 == 0) && ...);
}

template <class A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

/// Sums of n values over the block, to every thread; the warps' sums are added in order. One barrier a call, so
/// consecutive calls must alternate between two buffers `shared` [32 * n].
template <int n, class A>
__device__ __forceinline__ void block_sum(A (&v)[n], A* shared) {
  const int warp = static_cast<int>(threadIdx.x) / 32, warps = (static_cast<int>(blockDim.x) + 31) / 32;
#pragma unroll
  for (int i = 0; i < n; ++i) v[i] = warp_sum(v[i]);
  if (warps == 1) return;
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int i = 0; i < n; ++i) shared[warp * n + i] = v[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < n; ++i) {
    A sum = shared[i];
    for (int w = 1; w < warps; ++w) sum += shared[w * n + i];
    v[i] = sum;
  }
}

/// e^x as a model of type T deserves it: within 2 ulp of float for float, for bfloat16 the hardware's power of two
/// (relative error below 2^-21 for |x| < 10, far under a bfloat16's 2^-8).
template <class T>
__device__ __forceinline__ float exponential(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return expf(x);
  } else {
    return __expf(x);
  }
}
template <class T>
__device__ __forceinline__ float sigmoid(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return 1.0f / (1.0f + expf(-x));
  } else {
    // A power of two too large is infinite, one too small 0: both end as they should.
    float power, s;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.4426950408889634f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.0f + power));
    return s;
  }
}

}  // namespace deltapipe::kernels::cuda
