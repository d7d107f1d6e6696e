// Activations of the two MLP kinds. All tensors of one call have one shape (any rank) and dtype.
#pragma once

#include "core/stream.h"
#include "core/tensor.h"

namespace deltapipe::kernels {

/// y = max(x, 0)^2. So et al., "Primer: Searching for Efficient Transformers for Language Modeling", 2021. y may alias
/// x unless backward follows.
void squared_relu_forward(const Stream& stream, const Tensor& x, const Tensor& y);

/// dx = dy * 2 max(x, 0). dx may alias dy or x.
void squared_relu_backward(const Stream& stream, const Tensor& dy, const Tensor& x, const Tensor& dx);

/// y = silu(gate) * up, silu(g) = g * sigmoid(g). Shazeer, "GLU Variants Improve Transformer", 2020. y may alias gate
/// or up unless backward follows.
void gated_silu_forward(const Stream& stream, const Tensor& gate, const Tensor& up, const Tensor& y);

/// dgate = dy * up * silu'(gate); dup = dy * silu(gate). Each of dgate and dup may alias any one of dy, gate and up,
/// not each other.
void gated_silu_backward(const Stream& stream, const Tensor& dy, const Tensor& gate, const Tensor& up,
                         const Tensor& dgate, const Tensor& dup);

}  // namespace deltapipe::kernels
