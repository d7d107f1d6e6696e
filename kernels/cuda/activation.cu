#include "kernels/cuda/elementwise.cuh"
#include "kernels/cuda/launches.h"

namespace deltapipe::kernels::cuda {
namespace {

/// max(x, 0); NaN stays NaN, so that a broken activation is seen.
__device__ __forceinline__ float relu(float x) { return x < 0.0f ? 0.0f : x; }

template <class T>
struct SquaredRelu {
  static constexpr int width = pack_width<T>, packs = 4;
  const T* x;
  T* y;
  using Inputs = Pack<T, width>;
  template <bool aligned>
  __device__ void load(std::int64_t i, int count, Inputs& in) const {
    in.template load<aligned>(x + i, count);
  }
  template <bool aligned>
  __device__ void store(std::int64_t i, int count, const Inputs& in) const {
    float v[width];
    in.get(v);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const float r = relu(v[j]);
      v[j] = r * r;
    }
    Inputs out;
    out.set(v);
    out.template store<aligned>(y + i, count);
  }
};

template <class T>
struct SquaredReluGradient {
  static constexpr int width = pack_width<T>, packs = 4;
  const T *dy, *x;
  T* dx;
  struct Inputs {
    Pack<T, width> dy, x;
  };
  template <bool aligned>
  __device__ void load(std::int64_t i, int count, Inputs& in) const {
    in.dy.template load<aligned>(dy + i, count);
    in.x.template load<aligned>(x + i, count);
  }
  template <bool aligned>
  __device__ void store(std::int64_t i, int count, const Inputs& in) const {
    float g[width], v[width];
    in.dy.get(g);
    in.x.get(v);
#pragma unroll
    for (int j = 0; j < width; ++j) g[j] *= 2.0f * relu(v[j]);
    Pack<T, width> out;
    out.set(g);
    out.template store<aligned>(dx + i, count);
  }
};

template <class T>
struct GatedSilu {
  static constexpr int width = pack_width<T>, packs = 4;
  const T *gate, *up;
  T* y;
  struct Inputs {
    Pack<T, width> gate, up;
  };
  template <bool aligned>
  __device__ void load(std::int64_t i, int count, Inputs& in) const {
    in.gate.template load<aligned>(gate + i, count);
    in.up.template load<aligned>(up + i, count);
  }
  template <bool aligned>
  __device__ void store(std::int64_t i, int count, const Inputs& in) const {
    float g[width], u[width];
    in.gate.get(g);
    in.up.get(u);
#pragma unroll
    for (int j = 0; j < width; ++j) u[j] *= g[j] * sigmoid<T>(g[j]);
    Pack<T, width> out;
    out.set(u);
    out.template store<aligned>(y + i, count);
  }
};

template <class T>
struct GatedSiluGradient {
  static constexpr int width = pack_width<T>, packs = 2;
  const T *dy, *gate, *up;
  T *dgate, *dup;
  struct Inputs {
    Pack<T, width> dy, gate, up;
  };
  template <bool aligned>
  __device__ void load(std::int64_t i, int count, Inputs& in) const {
    in.dy.template load<aligned>(dy + i, count);
    in.gate.template load<aligned>(gate + i, count);
    in.up.template load<aligned>(up + i, count);
  }
  template <bool aligned>
  __device__ void store(std::int64_t i, int count, const Inputs& in) const {
    float d[width], g[width], u[width];
    in.dy.get(d);
    in.gate.get(g);
    in.up.get(u);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const float s = sigmoid<T>(g[j]);
      u[j] *= d[j] * (s * (1.0f + g[j] * (1.0f - s)));
      d[j] *= g[j] * s;
    }
    Pack<T, width> out;
    out.set(u);
    out.template store<aligned>(dgate + i, count);
    out.set(d);
    out.template store<aligned>(dup + i, count);
  }
};

}  // namespace

template <class T>
cudaError_t squared_relu_forward(const T* x, T* y, std::int64_t n, cudaStream_t stream) {
  return apply_to(SquaredRelu<T>{x, y}, n, all_aligned(x, y), stream);
}
template cudaError_t squared_relu_forward(const Bits*, Bits*, std::int64_t, cudaStream_t);
template cudaError_t squared_relu_forward(const float*, float*, std::int64_t, cudaStream_t);

template <class T>
cudaError_t squared_relu_backward(const T* dy, const T* x, T* dx, std::int64_t n, cudaStream_t stream) {
  return apply_to(SquaredReluGradient<T>{dy, x, dx}, n, all_aligned(dy, x, dx), stream);
}
template cudaError_t squared_relu_backward(const Bits*, const Bits*, Bits*, std::int64_t, cudaStream_t);
template cudaError_t squared_relu_backward(const float*, const float*, float*, std::int64_t, cudaStream_t);

template <class T>
cudaError_t gated_silu_forward(const T* gate, const T* up, T* y, std::int64_t n, cudaStream_t stream) {
  return apply_to(GatedSilu<T>{gate, up, y}, n, all_aligned(gate, up, y), stream);
}
template cudaError_t gated_silu_forward(const Bits*, const Bits*, Bits*, std::int64_t, cudaStream_t);
template cudaError_t gated_silu_forward(const float*, const float*, float*, std::int64_t, cudaStream_t);

template <class T>
cudaError_t gated_silu_backward(const T* dy, const T* gate, const T* up, T* dgate, T* dup, std::int64_t n,
                                cudaStream_t stream) {
  return apply_to(GatedSiluGradient<T>{dy, gate, up, dgate, dup}, n, all_aligned(dy, gate, up, dgate, dup), stream);
}
template cudaError_t gated_silu_backward(const Bits*, const Bits*, const Bits*, Bits*, Bits*, std::int64_t,
                                         cudaStream_t);
template cudaError_t gated_silu_backward(const float*, const float*, const float*, float*, float*, std::int64_t,
                                         cudaStream_t);

}  // namespace deltapipe::kernels::cuda
