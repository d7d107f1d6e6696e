// Sums over whole tensors.
#pragma once

#include "core/arena.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace deltapipe::kernels {

/// out (float64 [1]) += sum of x^2 over all elements, summed in float64 in an order that depends on the size of x
/// alone. NaN and infinities reach the result. Workspace: none on the CPU; on CUDA at most 1,056 float64.
void sum_of_squares(const Stream& stream, const Tensor& x, const Tensor& out, Arena& workspace);

}  // namespace deltapipe::kernels
