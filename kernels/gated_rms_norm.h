// Gated RMSNorm a head, KDA's output norm: y = x * rstd * w * sigmoid(gate), rstd = 1 / sqrt(mean(x^2) + eps) over the
// head's V channels. Source: Kimi Team, "Kimi Linear", 2025; the norm is that of kernels/rms_norm.h.
// T tokens, H heads, V value channels (at most 512). acc: float32, or float64 when x is float64.
#pragma once

#include "core/arena.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace deltapipe::kernels {

/// x, gate [T, H, V], w [V] -> y [T, H, V], all of one dtype, and rstd [T, H] (acc). y may alias x or gate unless
/// backward follows.
void gated_rms_norm_forward(const Stream& stream, const Tensor& x, const Tensor& gate, const Tensor& w, float eps,
                            const Tensor& y, const Tensor& rstd);

/// dx, dgate [T, H, V] are overwritten; dw [V] (acc) += gradient, skipped when empty. x, gate, w, rstd as in forward.
/// dx may alias dy or x; dgate may alias gate. Workspace: none on the CPU; on CUDA, when dw is wanted, at most 396 rows
/// of V float32.
void gated_rms_norm_backward(const Stream& stream, const Tensor& dy, const Tensor& x, const Tensor& gate,
                             const Tensor& w, const Tensor& rstd, const Tensor& dx, const Tensor& dgate,
                             const Tensor& dw, Arena& workspace);

}  // namespace deltapipe::kernels
