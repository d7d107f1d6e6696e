// Token embedding: rows of a table.
#pragma once

#include "core/stream.h"
#include "core/tensor.h"

namespace deltapipe::kernels {

/// out [T, D] = table [N, D] at rows tokens (int32 [T]); out and table of one dtype. Tokens lie in [0, N); the CPU
/// throws InternalError for one that does not.
void embedding_forward(const Stream& stream, const Tensor& tokens, const Tensor& table, const Tensor& out);

/// dtable [N, D] += rows of dout [T, D]; dtable is float32, or float64 when dout is float64. Rows of a repeated token
/// are added in token order on the CPU, whatever the number of threads.
void embedding_backward(const Stream& stream, const Tensor& dout, const Tensor& tokens, const Tensor& dtable);

}  // namespace deltapipe::kernels
