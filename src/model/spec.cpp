#include "model/spec.h"

#include "core/error.h"

#include <fmt/format.h>

#include <algorithm>

namespace deltapipe {

std::string_view name_of(Mixer mixer) {
  switch (mixer) {
    case Mixer::rope: return "rope";
    case Mixer::nope: return "nope";
    case Mixer::kda: return "kda";
  }
  return "?";
}

Mixer mixer_from(std::string_view name) {
  for (const Mixer m : {Mixer::rope, Mixer::nope, Mixer::kda}) {
    if (name == name_of(m)) return m;
  }
  fail<ConfigError>("unknown mixer '{}'; accepted: rope, nope, kda", name);
}

bool ModelSpec::has(Mixer m) const { return std::find(mixers.begin(), mixers.end(), m) != mixers.end(); }

void ModelSpec::validate() const {
  const auto positive = [](std::int64_t value, const char* what) {
    if (value <= 0) fail<ConfigError>("model: {} is {}, must be positive", what, value);
  };
  positive(vocabulary, "vocabulary size");
  positive(hidden, "hidden size");
  positive(intermediate, "intermediate size");
  positive(layers(), "number of layers");
  if (!(norm_eps > 0)) fail<ConfigError>("model: norm epsilon is {}, must be positive", norm_eps);
  if (has(Mixer::rope) || has(Mixer::nope)) {
    positive(heads, "number of attention heads");
    positive(kv_heads, "number of key/value heads");
    positive(head_dim, "head size");
    if (heads % kv_heads != 0) {
      fail<ConfigError>("model: {} attention heads are not a multiple of {} key/value heads", heads, kv_heads);
    }
  }
  if (has(Mixer::rope)) {
    if (head_dim % 2 != 0) fail<ConfigError>("model: rotary positions need an even head size, not {}", head_dim);
    if (!(rope.theta > 0)) fail<ConfigError>("model: rope theta is {}, must be positive", rope.theta);
    if (rope.is_yarn()) {
      if (!(rope.factor > 1)) fail<ConfigError>("model: YaRN factor is {}, must be over 1", rope.factor);
      positive(rope.original_max_positions, "YaRN original_max_position_embeddings");
    }
  }
  if (has(Mixer::kda)) {
    positive(kda.heads, "number of KDA heads");
    positive(kda.head_dim, "KDA head size");
    positive(kda.conv_width, "KDA convolution width");
    positive(kda.gate_rank, "KDA gate rank");
    if (kda.gate_lower_bound > 0 || kda.gate_lower_bound < -5) {
      fail<ConfigError>("model: KDA gate bound is {}, must be 0 (standard gate) or in [-5, 0)", kda.gate_lower_bound);
    }
  }
}

std::vector<ParameterSpec> layer_parameters_of(const ModelSpec& s, std::int64_t layer) {
  std::vector<ParameterSpec> list;
  const std::string prefix = fmt::format("model.layers.{}.", layer);
  const auto add = [&](const char* name, Shape shape, bool keep_float32 = false) {
    list.push_back({prefix + name, shape, layer, keep_float32});
  };
  add("input_layernorm.weight", {s.hidden});
  if (s.mixers[static_cast<std::size_t>(layer)] == Mixer::kda) {
    const std::int64_t width = s.kda.width(), rank = s.kda.gate_rank;
    for (const char* p : {"q", "k", "v"}) add(fmt::format("self_attn.{}_proj.weight", p).c_str(), {width, s.hidden});
    for (const char* p : {"q", "k", "v"}) {
      add(fmt::format("self_attn.{}_conv1d.weight", p).c_str(), {width, 1, s.kda.conv_width});
    }
    add("self_attn.f_proj.0.weight", {rank, s.hidden});
    add("self_attn.f_proj.1.weight", {width, rank});
    add("self_attn.g_proj.0.weight", {rank, s.hidden});
    add("self_attn.g_proj.1.weight", {width, rank});
    add("self_attn.g_proj.1.bias", {width});
    add("self_attn.b_proj.weight", {s.kda.heads, s.hidden});
    add("self_attn.A_log", {s.kda.heads}, true);
    add("self_attn.dt_bias", {width}, true);
    add("self_attn.o_norm.weight", {s.kda.head_dim});
    add("self_attn.o_proj.weight", {s.hidden, width});
  } else {
    add("self_attn.q_proj.weight", {s.heads * s.head_dim, s.hidden});
    add("self_attn.k_proj.weight", {s.kv_heads * s.head_dim, s.hidden});
    add("self_attn.v_proj.weight", {s.kv_heads * s.head_dim, s.hidden});
    add("self_attn.o_proj.weight", {s.hidden, s.heads * s.head_dim});
  }
  add("post_attention_layernorm.weight", {s.hidden});
  if (s.mlp == Mlp::gated_silu) add("mlp.gate_proj.weight", {s.intermediate, s.hidden});
  add("mlp.up_proj.weight", {s.intermediate, s.hidden});
  add("mlp.down_proj.weight", {s.hidden, s.intermediate});
  return list;
}

std::vector<ParameterSpec> parameters_of(const ModelSpec& s, const LayerRange& range) {
  std::vector<ParameterSpec> list;
  const bool is_first = range.first == 0, is_last = range.last == s.layers();
  if (is_first || (is_last && s.tied_embeddings)) {
    list.push_back({"model.embed_tokens.weight", {s.vocabulary, s.hidden}, -1});
  }
  for (std::int64_t l = range.first; l < range.last; ++l) {
    auto layer = layer_parameters_of(s, l);
    list.insert(list.end(), layer.begin(), layer.end());
  }
  if (is_last) {
    list.push_back({"model.norm.weight", {s.hidden}, s.layers()});
    if (!s.tied_embeddings) list.push_back({"lm_head.weight", {s.vocabulary, s.hidden}, s.layers()});
  }
  return list;
}

std::vector<ParameterSpec> parameters_of(const ModelSpec& s) { return parameters_of(s, whole_model(s)); }

std::int64_t count_parameters(const ModelSpec& spec) {
  std::int64_t n = 0;
  for (const ParameterSpec& p : parameters_of(spec)) n += p.shape.numel();
  return n;
}

}  // namespace deltapipe
