// Linear layer y = x W^T + b and its gradients. W is stored [O, I], as in PyTorch and Hugging Face files.
// On the CPU all dtypes are real (float32, float64); on CUDA bfloat16 or float32, summed in float32. CUDA's products
// need memory that no arena holds: matmul_workspace_bytes of kernels/cuda/matmul.h a stream, taken at its first
// product.
#pragma once

#include "core/stream.h"
#include "core/tensor.h"

namespace deltapipe::kernels {

/// x [M, I], w [O, I] -> y [M, O], all of one dtype; bias [O] of that dtype or empty. y aliases nothing.
void linear_forward(const Stream& stream, const Tensor& x, const Tensor& w, const Tensor& bias, const Tensor& y);

/// dx [M, I] = (accumulate ? dx : 0) + dy [M, O] w [O, I]. dx aliases nothing.
void linear_backward_input(const Stream& stream, const Tensor& dy, const Tensor& w, const Tensor& dx, bool accumulate);

/// dw [O, I] += dy [M, O]^T x [M, I] and dbias [O] += column sums of dy; each is skipped when empty. dw and dbias are
/// float32, or float64 when x is float64.
void linear_backward_weight(const Stream& stream, const Tensor& dy, const Tensor& x, const Tensor& dw,
                            const Tensor& dbias);

}  // namespace deltapipe::kernels
