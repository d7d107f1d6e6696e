// Short causal depthwise convolution followed by SiLU, as applied to q, k and v before KDA:
//   p[t, d] = sum over j of w[d, j] * x[t - (W - 1) + j, d],  y = p * sigmoid(p).
// Source: Yang et al., "Gated Delta Networks", 2024; Kimi Team, "Kimi Linear", 2025.
// S segments of L tokens, D channels, W taps (1 to 8); w[:, W - 1] multiplies the newest token. A segment is a
// contiguous run of one sequence. halo [S, W - 1, D] holds the W - 1 rows just before it (oldest first, index
// -(W - 1) .. -1); empty means zeros. start [S, L] int32 is the index, relative to the segment's first token, of the
// first token of each token's document, negative when the document began earlier: a tap reaches source row s only when
// s >= start[t], so halo rows may belong to another document.
#pragma once

#include "core/arena.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace deltapipe::kernels {

/// x [S, L, D], w [D, W], halo [S, W - 1, D] or empty -> y [S, L, D], all of one dtype. y aliases nothing.
void short_conv_forward(const Stream& stream, const Tensor& x, const Tensor& w, const Tensor& halo, const Tensor& start,
                        const Tensor& y);

/// dy [S, L, D] and the inputs of forward -> dx [S, L, D] and dhalo [S, W - 1, D] (skipped when empty), overwritten;
/// dw [D, W] (float32, or float64 when x is float64) += gradient, skipped when empty. dhalo[s] is what the owner of the
/// preceding rows adds to its dx. Outputs alias nothing. Workspace: none on the CPU; on CUDA, when dw is wanted, D * W
/// float32 for each of at most S * L / 16 chunks of tokens, as few as fill the device: 104 at D = 2,560.
void short_conv_backward(const Stream& stream, const Tensor& dy, const Tensor& x, const Tensor& w, const Tensor& halo,
                         const Tensor& start, const Tensor& dx, const Tensor& dw, const Tensor& dhalo,
                         Arena& workspace);

}  // namespace deltapipe::kernels
