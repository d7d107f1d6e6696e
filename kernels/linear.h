// Linear layer y = x W^T + b and its gradients. W is stored [O, I], as in PyTorch and Hugging Face files.
// On the CPU all dtypes are real (float32, float64); on CUDA bfloat16 or float32, summed in float32. CUDA's products
// need memory that no arena holds: matmul_workspace_bytes of kernels/cuda/matmul.h a stream, taken at its first
// product.
// Rows of y and dy may be longer than O: what is beyond is neither read nor written. linear_row() says how long they
// should be where they are the caller's to lay out.
#pragma once

#include "core/arena.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace deltapipe::kernels {

/// Elements of a row of y and dy, at least `outputs`, with which products are fast: on CUDA every row then begins at a
/// multiple of 128 bytes.
std::int64_t linear_row(const Stream& stream, DType dtype, std::int64_t outputs);

/// x [M, I], w [O, I] -> y [M, O or more], all of one dtype; bias [O] of that dtype or empty. y aliases nothing.
void linear_forward(const Stream& stream, const Tensor& x, const Tensor& w, const Tensor& bias, const Tensor& y);

/// dx [M, I] = (accumulate ? dx : 0) + dy [M, O or more] w [O, I]. dx aliases nothing.
/// Workspace: none on the CPU; on CUDA M * I float32 where O elements are no multiple of 16 bytes and rows of dy and w
/// are.
void linear_backward_input(const Stream& stream, const Tensor& dy, const Tensor& w, const Tensor& dx, bool accumulate,
                           Arena& workspace);

/// dw [O, I] += dy [M, O or more]^T x [M, I] and dbias [O] += column sums of dy; each is skipped when empty. dw and
/// dbias are float32, or float64 when x is float64.
void linear_backward_weight(const Stream& stream, const Tensor& dy, const Tensor& x, const Tensor& dw,
                            const Tensor& dbias);

}  // namespace deltapipe::kernels
