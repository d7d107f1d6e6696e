// Rotary position embedding of the half-split kind (Su et al., "RoFormer", 2021, in the layout of Llama's Hugging Face
// weights): channel i of the first half of a head is paired with channel i of the second half. With
// angle = positions[t] * inverse_frequencies[i], c = attention_factor cos(angle), s = attention_factor sin(angle):
//   out1 = x1 c - x2 s,  out2 = x2 c + x1 s.
// Frequencies and attention factor come from model/rope.h.
#pragma once

#include "core/stream.h"
#include "core/tensor.h"

namespace deltapipe::kernels {

/// x [T, H, d] -> out [T, H, d], of one dtype, d even; out may alias x. positions int32 [T]. inverse_frequencies
/// [d / 2] is float32, or float64 when x is; the angle and its sine and cosine are computed in that type.
void rope_forward(const Stream& stream, const Tensor& x, const Tensor& positions, const Tensor& inverse_frequencies,
                  float attention_factor, const Tensor& out);

/// dx = the transposed rotation of dout times the same factor: dx1 = dout1 c + dout2 s, dx2 = dout2 c - dout1 s.
/// dx may alias dout.
void rope_backward(const Stream& stream, const Tensor& dout, const Tensor& positions, const Tensor& inverse_frequencies,
                   float attention_factor, const Tensor& dx);

}  // namespace deltapipe::kernels
