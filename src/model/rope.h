// Frequencies of rotary positions, plain or YaRN, for kernels/rope.h.
// YaRN: Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models", 2023, with the conventions of
// Hugging Face transformers where the paper leaves room.
#pragma once

#include "model/spec.h"

#include <vector>

namespace deltapipe {

/// head_dim / 2 values, radians a position. Plain: theta^(-2i / head_dim). YaRN divides by `factor` those channels that
/// turn less than beta_slow times over original_max_positions, leaves those that turn more than beta_fast times, and
/// blends linearly between. head_dim must be even.
std::vector<double> rope_inverse_frequencies(const RopeSpec& spec, std::int64_t head_dim);

/// Factor on both sine and cosine at every position. 1 for plain RoPE; for YaRN attention_factor when given, else
/// m(mscale) / m(mscale_all_dim) when both are given, else m(1), where m(s) = 0.1 s ln(factor) + 1.
double rope_attention_factor(const RopeSpec& spec);

}  // namespace deltapipe
