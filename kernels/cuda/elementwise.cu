#include "kernels/cuda/elementwise.cuh"
#include "kernels/cuda/launches.h"

namespace deltapipe::kernels::cuda {
namespace {

template <class T>
struct Add {
  static constexpr int width = pack_width<T>, packs = 4;
  const T *a, *b;
  T* out;
  struct Inputs {
    Pack<T, width> a, b;
  };
  template <bool aligned>
  __device__ void load(std::int64_t i, int count, Inputs& in) const {
    in.a.template load<aligned>(a + i, count);
    in.b.template load<aligned>(b + i, count);
  }
  template <bool aligned>
  __device__ void store(std::int64_t i, int count, const Inputs& in) const {
    Compute<T> x[width], y[width];
    in.a.get(x);
    in.b.get(y);
#pragma unroll
    for (int j = 0; j < width; ++j) x[j] += y[j];
    Pack<T, width> sum;
    sum.set(x);
    sum.template store<aligned>(out + i, count);
  }
};

template <class T>
struct Scale {
  static constexpr int width = pack_width<T>, packs = 4;
  Compute<T> factor;
  T* x;
  using Inputs = Pack<T, width>;
  template <bool aligned>
  __device__ void load(std::int64_t i, int count, Inputs& in) const {
    in.template load<aligned>(x + i, count);
  }
  template <bool aligned>
  __device__ void store(std::int64_t i, int count, const Inputs& in) const {
    Compute<T> v[width];
    in.get(v);
#pragma unroll
    for (int j = 0; j < width; ++j) v[j] *= factor;
    Inputs out;
    out.set(v);
    out.template store<aligned>(x + i, count);
  }
};

template <class From, class To>
struct Cast {
  static constexpr int width = pack_width<From, To> < 4 ? 4 : pack_width<From, To>, packs = 4;
  const From* src;
  To* dst;
  using Inputs = Pack<From, width>;
  template <bool aligned>
  __device__ void load(std::int64_t i, int count, Inputs& in) const {
    in.template load<aligned>(src + i, count);
  }
  template <bool aligned>
  __device__ void store(std::int64_t i, int count, const Inputs& in) const {
    Compute<From> x[width];
    Compute<To> y[width];
    in.get(x);
#pragma unroll
    for (int j = 0; j < width; ++j) y[j] = static_cast<Compute<To>>(x[j]);  // float64 to bfloat16 by way of float32
    Pack<To, width> out;
    out.set(y);
    out.template store<aligned>(dst + i, count);
  }
};

}  // namespace

template <class T>
cudaError_t add(const T* a, const T* b, T* out, std::int64_t n, cudaStream_t stream) {
  return apply_to(Add<T>{a, b, out}, n, all_aligned(a, b, out), stream);
}
template cudaError_t add(const Bits*, const Bits*, Bits*, std::int64_t, cudaStream_t);
template cudaError_t add(const float*, const float*, float*, std::int64_t, cudaStream_t);
template cudaError_t add(const double*, const double*, double*, std::int64_t, cudaStream_t);

template <class T>
cudaError_t scale_in_place(double factor, T* x, std::int64_t n, cudaStream_t stream) {
  auto f = static_cast<Compute<T>>(factor);
  if constexpr (std::is_same_v<T, Bits>) f = __bfloat162float(__float2bfloat16_rn(f));  // rounded to x's type first
  return apply_to(Scale<T>{f, x}, n, all_aligned(x), stream);
}
template cudaError_t scale_in_place(double, Bits*, std::int64_t, cudaStream_t);
template cudaError_t scale_in_place(double, float*, std::int64_t, cudaStream_t);
template cudaError_t scale_in_place(double, double*, std::int64_t, cudaStream_t);

template <class From, class To>
cudaError_t cast(const From* src, To* dst, std::int64_t n, cudaStream_t stream) {
  return apply_to(Cast<From, To>{src, dst}, n, all_aligned(src, dst), stream);
}
template cudaError_t cast(const Bits*, float*, std::int64_t, cudaStream_t);
template cudaError_t cast(const Bits*, double*, std::int64_t, cudaStream_t);
template cudaError_t cast(const float*, Bits*, std::int64_t, cudaStream_t);
template cudaError_t cast(const float*, double*, std::int64_t, cudaStream_t);
template cudaError_t cast(const double*, Bits*, std::int64_t, cudaStream_t);
template cudaError_t cast(const double*, float*, std::int64_t, cudaStream_t);

}  // namespace deltapipe::kernels::cuda
