// config.json of a Hugging Face folder <-> ModelSpec.
//
// Every value is read from the file; the class defaults of transformers are never assumed, as they are wrong for real
// models. An absent or null key is accepted only for:
//   head_dim                     hidden_size / num_attention_heads (must divide)
//   num_key_value_heads          num_attention_heads (files older than grouped-query attention)
//   tie_word_embeddings, attention_bias, mlp_bias    false
//   bos_token_id, eos_token_id   none; of a list the first; ids outside the vocabulary are dropped with a warning
//   rope_scaling, rope_parameters    plain RoPE with the top-level rope_theta
//   beta_fast, beta_slow, mscale, mscale_all_dim, attention_factor of YaRN    32, 1, absent, absent, derived
//   kda_gate_lower_bound         none: the standard gate
// and for the keys of `arcee_kda` that follow, from the shapes of the weights (published models predate our keys):
//   mixers                       kda where a layer has self_attn.A_log, else nope
//   kda_num_heads, kda_head_dim, kda_conv_size, kda_gate_rank    from A_log, o_norm, q_conv1d, f_proj.0
//   num_key_value_heads          without `mixers`, the shape of k_proj decides over this key, with a warning
#pragma once

#include "core/dtype.h"
#include "core/tensor.h"
#include "model/spec.h"

#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <string_view>

namespace deltapipe {

/// Shape of a tensor in the folder's weights, by name; empty when there is none of that name.
using ShapeLookup = std::function<std::optional<Shape>(const std::string& name)>;

/// Reads an `arcee`, `llama` or `arcee_kda` config.json. Without `shape_of`, an `arcee_kda` file must have all of our
/// keys. Refused: biases, another activation than the model type's, sliding windows, quantised weights, RoPE kinds
/// other than "default" and "yarn", contradictions between rope_parameters and rope_theta + rope_scaling. Throws
/// FormatError naming file and key; IoError when the file cannot be read.
ModelSpec read_huggingface_config(const std::filesystem::path& file, const ShapeLookup& shape_of = {});
/// The same for text in memory; `name` is what errors call it.
ModelSpec parse_huggingface_config(std::string_view text, const std::string& name, const ShapeLookup& shape_of = {});

/// The text of config.json for weights of type `dtype` (f32 or bf16). Rotary parameters stand there in the old
/// (rope_theta, rope_scaling) and the new style (rope_parameters). ConfigError when the spec's model type cannot
/// express the spec.
std::string write_huggingface_config(const ModelSpec& spec, DType dtype);

}  // namespace deltapipe
