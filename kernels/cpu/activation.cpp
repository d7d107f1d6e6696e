#include "kernels/activation.h"

#include "kernels/cpu/common.h"
#include "kernels/cpu/vector_math.h"

// The loops are marked simd because outputs may be inputs: each element is read before it is written and no other
// element is touched.
namespace deltapipe::kernels::cpu {
namespace {

constexpr std::int64_t block = 1 << 14;  // elements a task

/// max(x, 0); NaN stays NaN, so that a broken activation is seen.
template <class T>
T relu(T x) {
  return x < 0 ? T(0) : x;
}

}  // namespace

void squared_relu_forward(const Stream&, const Tensor& x, const Tensor& y) {
  for_real(x.dtype, "squared_relu_forward", [&]<class T>() {
    const T* px = x.as<T>();
    T* py = y.as<T>();
    parallel_blocks(x.numel(), block, [=](std::int64_t begin, std::int64_t end) {
#pragma omp simd
      for (std::int64_t i = begin; i < end; ++i) {
        const T r = relu(px[i]);
        py[i] = r * r;
      }
    });
  });
}

void squared_relu_backward(const Stream&, const Tensor& dy, const Tensor& x, const Tensor& dx) {
  for_real(x.dtype, "squared_relu_backward", [&]<class T>() {
    const T *pdy = dy.as<T>(), *px = x.as<T>();
    T* pdx = dx.as<T>();
    parallel_blocks(x.numel(), block, [=](std::int64_t begin, std::int64_t end) {
#pragma omp simd
      for (std::int64_t i = begin; i < end; ++i) pdx[i] = pdy[i] * T(2) * relu(px[i]);
    });
  });
}

void gated_silu_forward(const Stream&, const Tensor& gate, const Tensor& up, const Tensor& y) {
  for_real(gate.dtype, "gated_silu_forward", [&]<class T>() {
    const T *pg = gate.as<T>(), *pu = up.as<T>();
    T* py = y.as<T>();
    parallel_blocks(gate.numel(), block, [=](std::int64_t begin, std::int64_t end) {
#pragma omp simd
      for (std::int64_t i = begin; i < end; ++i) py[i] = vsilu(pg[i]) * pu[i];
    });
  });
}

void gated_silu_backward(const Stream&, const Tensor& dy, const Tensor& gate, const Tensor& up, const Tensor& dgate,
                         const Tensor& dup) {
  for_real(gate.dtype, "gated_silu_backward", [&]<class T>() {
    const T *pdy = dy.as<T>(), *pg = gate.as<T>(), *pu = up.as<T>();
    T *pdg = dgate.as<T>(), *pdu = dup.as<T>();
    parallel_blocks(gate.numel(), block, [=](std::int64_t begin, std::int64_t end) {
#pragma omp simd
      for (std::int64_t i = begin; i < end; ++i) {
        const T d = pdy[i], g = pg[i], u = pu[i];
        const T s = vsigmoid(g);
        pdg[i] = d * u * (s * (T(1) + g * (T(1) - s)));
        pdu[i] = d * (g * s);
      }
    });
  });
}

}  // namespace deltapipe::kernels::cpu
