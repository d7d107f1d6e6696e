// What kernels/linear.h needs on CUDA beside matrix products.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace deltapipe::kernels::cuda {

/// sums [columns] += sums over the rows of x [rows, columns], which begin every `pitch` elements, in fp32 and in an
/// order that depends on the shape alone.
cudaError_t add_column_sums(const std::uint16_t* x_bf16, int rows, int columns, std::int64_t pitch, float* sums,
                            cudaStream_t stream);
cudaError_t add_column_sums(const float* x, int rows, int columns, std::int64_t pitch, float* sums,
                            cudaStream_t stream);

/// A product's last few terms: dy [rows, terms], whose rows begin every `pitch` elements, times w [terms, columns].
struct LastProducts {
  std::int64_t rows;
  int columns, terms;  // columns a multiple of 4, at most 7 terms
  std::int64_t pitch;
  std::int64_t accumulate;  // 0 or 1; wide, so that the struct has no padding
};
/// dx [rows, columns] = sums [rows, columns] + dy w (+ dx), in fp32, rounded once. All but dy at multiples of 16 bytes.
cudaError_t add_last_products(const LastProducts& shape, const float* sums, const std::uint16_t* dy_bf16,
                              const std::uint16_t* w_bf16, std::uint16_t* dx_bf16, cudaStream_t stream);
cudaError_t add_last_products(const LastProducts& shape, const float* sums, const float* dy, const float* w, float* dx,
                              cudaStream_t stream);

}  // namespace deltapipe::kernels::cuda
