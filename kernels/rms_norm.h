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

/// dx [T, D] = (accumulate ? dx : 0) + gradient; dw [D] (accumulation dtype) += gradient, skipped when dw is empty.
/// x, w, rstd as in forward. dx may alias dy. Workspace: none on the CPU; on CUDA, when dw is wanted, at most 396 rows
/// of D float32, so that dw is summed in one order.
void rms_norm_backward(const Stream& stream, const Tensor& dy, const Tensor& x, const Tensor& w, const Tensor& rstd,
                       const Tensor& dx, bool accumulate, const Tensor& dw, Arena& workspace);

}  // namespace deltapipe::kernels
