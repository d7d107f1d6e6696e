// ModelSpec: everything that fixes a model's parameters and mathematics, independent of any file format. Read from a
// Hugging Face folder by checkpoints/, derived from a teacher by distill/.
#pragma once

#include "core/tensor.h"

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace deltapipe {

/// Token mixer of a layer: full attention with rotary positions, full attention without positions, or KDA.
enum class Mixer : std::uint8_t { rope, nope, kda };
/// down(relu(up x)^2) as in Arcee, or down(silu(gate x) * up x) as in Llama.
enum class Mlp : std::uint8_t { squared_relu, gated_silu };

std::string_view name_of(Mixer mixer);  // "rope", "nope", "kda"
/// Throws ConfigError for any other name.
Mixer mixer_from(std::string_view name);

/// Rotary embedding of the half-split kind. factor == 1: plain RoPE, the other members are unused.
/// YaRN: Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models", 2023.
struct RopeSpec {
  double theta = 10000.0;
  double factor = 1.0;
  std::int64_t original_max_positions = 0;
  double beta_fast = 32.0;
  double beta_slow = 1.0;
  double mscale = 0.0;            // 0: absent
  double mscale_all_dim = 0.0;    // 0: absent
  double attention_factor = 0.0;  // 0: derived from factor and mscale
  bool is_yarn() const { return factor != 1.0; }
  friend bool operator==(const RopeSpec&, const RopeSpec&) = default;
};

/// One KDA layer; projections map hidden to heads * head_dim for q, k and v alike (K = V = head_dim).
struct KdaSpec {
  std::int64_t heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t conv_width = 4;
  std::int64_t gate_rank = 0;     // inner width of f_proj and g_proj; head_dim in published models
  double gate_lower_bound = 0.0;  // 0: g = -exp(A_log) softplus(.); < 0: g = bound * sigmoid(exp(A_log) .)
  std::int64_t width() const { return heads * head_dim; }
  friend bool operator==(const KdaSpec&, const KdaSpec&) = default;
};

struct ModelSpec {
  std::string model_type;  // "arcee", "llama" or "arcee_kda"
  std::int64_t vocabulary = 0;
  std::int64_t hidden = 0;
  std::int64_t intermediate = 0;
  std::int64_t heads = 0;     // query heads of full attention
  std::int64_t kv_heads = 0;  // query head i reads key/value head i / (heads / kv_heads)
  std::int64_t head_dim = 0;
  std::int64_t max_positions = 0;
  double norm_eps = 1e-5;
  bool tied_embeddings = false;  // lm_head.weight is model.embed_tokens.weight
  Mlp mlp = Mlp::squared_relu;
  RopeSpec rope;
  KdaSpec kda;
  std::vector<Mixer> mixers;    // one a layer
  std::int64_t bos_token = -1;  // -1: none
  std::int64_t eos_token = -1;

  std::int64_t layers() const { return static_cast<std::int64_t>(mixers.size()); }
  bool has(Mixer m) const;
  /// Throws ConfigError naming the first impossible or contradictory value.
  void validate() const;
  friend bool operator==(const ModelSpec&, const ModelSpec&) = default;
};

/// A named weight under its Hugging Face name.
struct ParameterSpec {
  std::string name;
  Shape shape;
  std::int64_t layer;         // -1: embedding; layers(): final norm and head
  bool keep_float32 = false;  // A_log and dt_bias stay float32 in every file and on every device
};

/// Layers [first, last) of a model: what one pipeline stage, or one of its chunks, holds. The range that begins at 0
/// has the embedding, the one that ends with the last layer the final norm and the head.
struct LayerRange {
  std::int64_t first = 0;
  std::int64_t last = 0;
  std::int64_t size() const { return last - first; }
  friend bool operator==(const LayerRange&, const LayerRange&) = default;
};
inline LayerRange whole_model(const ModelSpec& spec) { return {0, spec.layers()}; }

/// All parameters in canonical order: embedding, layers 0 .. L-1, final norm, head (absent when tied).
std::vector<ParameterSpec> parameters_of(const ModelSpec& spec);
/// Those of a range; with tied embeddings the embedding belongs to the first and to the last range.
std::vector<ParameterSpec> parameters_of(const ModelSpec& spec, const LayerRange& range);
/// Parameters of one layer's KDA or attention, MLP and norms, in canonical order.
std::vector<ParameterSpec> layer_parameters_of(const ModelSpec& spec, std::int64_t layer);
std::int64_t count_parameters(const ModelSpec& spec);

}  // namespace deltapipe
