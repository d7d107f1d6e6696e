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

#include <span>

namespace deltapipe::kernels {

/// Convolutions that a call does in one pass, as of q, k and v: all of the same shapes.
inline constexpr std::size_t most_convolutions = 3;

/// x [S, L, D], w [D, W], halo [S, W - 1, D] or empty -> y [S, L, D], all of one dtype. y aliases nothing.
struct ShortConv {
  Tensor x, w, halo, y;
};

/// dy [S, L, D] and the inputs of forward -> dx [S, L, D] and dhalo [S, W - 1, D] (skipped when empty), overwritten;
/// dw [D, W] (float32, or float64 when x is float64) += gradient, skipped when empty. dhalo[s] is what the owner of the
/// preceding rows adds to its dx. Outputs alias nothing.
struct ShortConvGradient {
  Tensor dy, x, w, halo;
  Tensor dx, dw, dhalo;
};

void short_conv_forward(const Stream& stream, std::span<const ShortConv> convolutions, const Tensor& start);

/// Workspace: none on the CPU; on CUDA, for every dw that is wanted, D * W float32 for each of at most S * L / 16
/// chunks of tokens, as few as fill the device: 104 at D = 2,560, 35 where there are three.
void short_conv_backward(const Stream& stream, std::span<const ShortConvGradient> convolutions, const Tensor& start,
                         Arena& workspace);

}  // namespace deltapipe::kernels
