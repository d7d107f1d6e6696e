// What kernels/linear.h needs on CUDA beside matrix products.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace deltapipe::kernels::cuda {

/// sums [columns] += sums over the rows of x [rows, columns], in fp32 and in an order that depends on the shape alone.
cudaError_t add_column_sums(const std::uint16_t* x_bf16, int rows, int columns, float* sums, cudaStream_t stream);
cudaError_t add_column_sums(const float* x, int rows, int columns, float* sums, cudaStream_t stream);

}  // namespace deltapipe::kernels::cuda
