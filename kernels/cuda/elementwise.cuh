// One kernel for operations that treat every element alone. An Op has
//   static constexpr int width   elements of a pack, static constexpr int packs  packs in flight a thread,
//   struct Inputs                the packs that one step reads,
//   load<aligned>(i, count, inputs) and store<aligned>(i, count, inputs), for elements [i, i + width).
// A thread reads everything it will write before it writes, so outputs may be inputs.
#pragma once

#include "kernels/cuda/vector.cuh"

namespace deltapipe::kernels::cuda {

inline constexpr int elementwise_threads = 256;

template <class Op>
__global__ void __launch_bounds__(elementwise_threads) apply(Op op, std::int64_t n, bool aligned) {
  constexpr int width = Op::width, packs = Op::packs, step = elementwise_threads * width;
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * (step * packs);
  typename Op::Inputs inputs[packs];
  if (aligned && begin + step * packs <= n) {
#pragma unroll
    for (int u = 0; u < packs; ++u) {
      op.template load<true>(begin + u * step + threadIdx.x * width, width, inputs[u]);
    }
#pragma unroll
    for (int u = 0; u < packs; ++u) {
      op.template store<true>(begin + u * step + threadIdx.x * width, width, inputs[u]);
    }
  } else {
    for (int u = 0; u < packs; ++u) {
      const std::int64_t i = begin + u * step + threadIdx.x * width;
      if (i >= n) continue;
      const int count = n - i < width ? static_cast<int>(n - i) : width;
      op.template load<false>(i, count, inputs[0]);
      op.template store<false>(i, count, inputs[0]);
    }
  }
}

/// `aligned`: every pointer of op is a multiple of 16 bytes.
template <class Op>
cudaError_t apply_to(const Op& op, std::int64_t n, bool aligned, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  constexpr std::int64_t block = static_cast<std::int64_t>(elementwise_threads) * Op::width * Op::packs;
  apply<<<static_cast<unsigned>((n + block - 1) / block), elementwise_threads, 0, stream>>>(op, n, aligned);
  return cudaGetLastError();
}

}  // namespace deltapipe::kernels::cuda
