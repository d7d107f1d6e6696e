// RMSNorm over the last dimension: y = w * x * rstd, rstd = 1 / sqrt(mean(x^2) + eps).
// Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019; no (1 + w), as in Llama and Arcee.
// The mean and rstd are in float32 or better; x * rstd is rounded to x's dtype before the weight multiplies it.
#pragma once

#include "core/arena.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace deltapipe::kernels {

/// x [T, D] -> y [T, D] and rstd [T] (accumulation dtype: float32, or float64 when x is float64). w [D]. y may alias x
/// unless backward follows.
void rms_norm_forward(const Stream& stream, const Tensor& x, const Tensor& w, float eps, const Tensor& y,
                      const Tensor& rstd);

/// The residual add before a norm, and the norm, in one pass: sum [T, D] = x + h, rounded to their dtype, then y and
/// rstd are those of sum. sum may alias x or h; y aliases no other.
void add_rms_norm_forward(const Stream& stream, const Tensor& x, const Tensor& h, const Tensor& w, float eps,
                          const Tensor& sum, const Tensor& y, const Tensor& rstd);

/// dx [T, D] = residual + gradient, without the first where residual [T, D] is empty: what reaches x beside the norm
/// comes in the same pass. dw [D] (accumulation dtype) += gradient, skipped when dw is empty. x, w, rstd as in forward
/// (x is sum after add_rms_norm_forward). dx may alias dy or residual, or all three be one. Workspace: none on the CPU;
/// on CUDA, when dw is wanted, at most 396 rows of D float32, so that dw is summed in one order.
void rms_norm_backward(const Stream& stream, const Tensor& dy, const Tensor& x, const Tensor& w, const Tensor& rstd,
                       const Tensor& residual, const Tensor& dx, const Tensor& dw, Arena& workspace);

}  // namespace deltapipe::kernels
