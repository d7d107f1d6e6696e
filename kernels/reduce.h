// Sums over whole tensors.
#pragma once

#include "core/stream.h"
#include "core/tensor.h"

namespace deltapipe::kernels {

/// out (float64 [1]) += sum of x^2 over all elements, summed in float64 in an order that depends on the size of x
/// alone. NaN and infinities reach the result.
void sum_of_squares(const Stream& stream, const Tensor& x, const Tensor& out);

}  // namespace deltapipe::kernels
