#include "checkpoints/hf_config.h"

#include "checkpoints/strict_json.h"
#include "core/error.h"
#include "core/file.h"
#include "core/log.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

namespace deltapipe {
namespace {

using nlohmann::json;

// Bounds far over any real model: products of them fit 64 bits.
constexpr std::int64_t max_layers = 10'000;
constexpr std::int64_t max_width = std::int64_t{1} << 22;  // hidden, intermediate, heads * head_dim
constexpr std::int64_t max_vocabulary = std::int64_t{1} << 28;

/// Typed access to one JSON object; every error names the file and the key.
class Reader {
 public:
  Reader(const json& object, std::string file, std::string prefix = "")
      : object_(object), file_(std::move(file)), prefix_(std::move(prefix)) {}

  /// nullptr when absent or null.
  const json* find(const char* key) const {
    const auto it = object_.find(key);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }
  bool has(const char* key) const { return find(key) != nullptr; }
  template <class... Args>
  [[noreturn]] void refuse(const char* key, fmt::format_string<Args...> format, Args&&... args) const {
    fail<FormatError>("{}: key '{}{}' {}", file_, prefix_, key, fmt::format(format, std::forward<Args>(args)...));
  }
  [[noreturn]] void refuse_value(const char* key, const std::string& expected) const {
    refuse(key, "is {}, expected {}", printable(find(key)->dump()), expected);
  }
  std::int64_t integer(const char* key, std::int64_t low, std::int64_t high) const {
    const json& v = required(key);
    const std::string expected = fmt::format("an integer in [{}, {}]", low, high);
    if (!v.is_number_integer()) refuse_value(key, expected);
    const bool huge = v.is_number_unsigned() && v.get<std::uint64_t>() > std::numeric_limits<std::int64_t>::max();
    if (huge || v.get<std::int64_t>() < low || v.get<std::int64_t>() > high) refuse_value(key, expected);
    return v.get<std::int64_t>();
  }
  double number(const char* key, double low, double high) const {
    const json& v = required(key);
    if (!v.is_number() || !(v.get<double>() >= low && v.get<double>() <= high)) {
      refuse_value(key, fmt::format("a number in [{}, {}]", low, high));
    }
    return v.get<double>();
  }
  double number_or(const char* key, double absent, double low, double high) const {
    return has(key) ? number(key, low, high) : absent;
  }
  bool boolean_or(const char* key, bool absent) const {
    if (!has(key)) return absent;
    if (!find(key)->is_boolean()) refuse_value(key, "true or false");
    return find(key)->get<bool>();
  }
  std::string string(const char* key) const {
    if (!required(key).is_string()) refuse_value(key, "a string");
    return find(key)->get<std::string>();
  }
  Reader object(const char* key) const {
    if (!required(key).is_object()) refuse_value(key, "an object");
    return Reader(*find(key), file_, prefix_ + key + ".");
  }
  const json& json_object() const { return object_; }
  const std::string& file() const { return file_; }

 private:
  const json& required(const char* key) const {
    const json* v = find(key);
    if (v == nullptr) refuse(key, "is missing");
    return *v;
  }

  const json& object_;
  std::string file_;
  std::string prefix_;
};

constexpr double huge = 1e18;  // upper bound of real-valued keys

/// rope_parameters or rope_scaling; theta inside it or, when absent there, `outer_theta` (0: absent).
RopeSpec read_rope_object(const Reader& r, const Reader& root, double outer_theta) {
  static const std::set<std::string> known{
      "rope_type", "type",      "rope_theta",     "partial_rotary_factor",
      "factor",    "beta_fast", "beta_slow",      "original_max_position_embeddings",
      "mscale",    "truncate",  "mscale_all_dim", "attention_factor"};
  RopeSpec s;
  s.theta = r.number_or("rope_theta", outer_theta, 1e-6, huge);
  if (s.theta == 0) r.refuse("rope_theta", "is missing, and so is the top-level rope_theta");
  if (outer_theta != 0 && s.theta != outer_theta) {
    r.refuse("rope_theta", "is {}, but the top-level rope_theta is {}", s.theta, outer_theta);
  }
  if (r.number_or("partial_rotary_factor", 1, 0, 1) != 1) r.refuse_value("partial_rotary_factor", "1: all channels");
  std::string type = "default";
  if (r.has("rope_type")) type = r.string("rope_type");
  if (r.has("type")) {
    if (r.has("rope_type") && r.string("type") != type)
      r.refuse_value("type", fmt::format("'{}' as in rope_type", printable(type)));
    type = r.string("type");
  }
  const char* type_key = r.has("type") && !r.has("rope_type") ? "type" : "rope_type";
  if (type != "default" && type != "yarn") r.refuse_value(type_key, "\"default\" or \"yarn\"");
  for (const auto& [key, value] : r.json_object().items()) {
    if (value.is_null()) continue;
    const bool plain = key == "rope_type" || key == "type" || key == "rope_theta" || key == "partial_rotary_factor";
    if (!known.contains(key) || (type == "default" && !plain)) {
      r.refuse(printable(key).c_str(), "is not known for rotary embeddings of type '{}'", type);
    }
  }
  if (type == "default") return s;

  s.factor = r.number("factor", 1, huge);
  if (s.factor == 1) r.refuse_value("factor", "over 1 (a factor of 1 is rope_type \"default\")");
  s.original_max_positions = r.integer("original_max_position_embeddings", 1, std::numeric_limits<std::int32_t>::max());
  if (const char* key = "original_max_position_embeddings"; root.has(key)) {
    if (root.integer(key, 1, std::numeric_limits<std::int32_t>::max()) != s.original_max_positions) {
      root.refuse_value(key, fmt::format("{} as in the rotary parameters", s.original_max_positions));
    }
  }
  if (!r.boolean_or("truncate", true)) r.refuse_value("truncate", "true");
  s.beta_fast = r.number_or("beta_fast", 32, 1e-6, huge);
  s.beta_slow = r.number_or("beta_slow", 1, 1e-6, huge);
  s.mscale = r.number_or("mscale", 0, 0, huge);
  s.mscale_all_dim = r.number_or("mscale_all_dim", 0, 0, huge);
  s.attention_factor = r.number_or("attention_factor", 0, 0, huge);
  return s;
}

RopeSpec read_rope(const Reader& r, bool required) {
  const double theta = r.number_or("rope_theta", 0, 1e-6, huge);
  if (r.number_or("partial_rotary_factor", 1, 0, 1) != 1) r.refuse_value("partial_rotary_factor", "1: all channels");
  if (r.boolean_or("rope_interleaved", false)) r.refuse_value("rope_interleaved", "false: rotation of channel halves");
  const bool parameters = r.has("rope_parameters"), scaling = r.has("rope_scaling");
  if (!parameters && !scaling) {
    if (theta == 0 && required) r.refuse("rope_theta", "is missing, and so is rope_parameters");
    return theta == 0 ? RopeSpec{} : RopeSpec{.theta = theta};
  }
  const RopeSpec spec = read_rope_object(r.object(parameters ? "rope_parameters" : "rope_scaling"), r, theta);
  if (parameters && scaling && read_rope_object(r.object("rope_scaling"), r, spec.theta) != spec) {
    r.refuse("rope_scaling", "contradicts rope_parameters; remove one of the two");
  }
  return spec;
}

std::int64_t read_token(const Reader& r, const char* key, std::int64_t vocabulary) {
  const json* v = r.find(key);
  if (v == nullptr) return -1;
  if (v->is_array() && !v->empty()) v = &v->front();
  if (!v->is_number_integer()) r.refuse_value(key, "a token id, a list of them or null");
  const double id = v->get<double>();  // any integer of the file, however large
  if (id >= 0 && id < static_cast<double>(vocabulary)) return v->get<std::int64_t>();
  log::warn("{}: key '{}' is {}, outside the vocabulary of {} tokens; ignored", r.file(), key, v->dump(), vocabulary);
  return -1;
}

/// Everything whose presence changes the mathematics in a way that this program does not have.
void refuse_unsupported(const Reader& r, const std::string& model_type) {
  for (const char* key : {"attention_bias", "mlp_bias"}) {
    if (r.boolean_or(key, false)) r.refuse_value(key, "false");
  }
  if (r.has("quantization_config")) r.refuse("quantization_config", "is set; only unquantised weights can be read");
  if (r.has("sliding_window") && r.boolean_or("use_sliding_window", true)) {
    r.refuse_value("sliding_window", "null: full attention");
  }
  if (const json* types = r.find("layer_types")) {
    for (const json& t : types->is_array() ? *types : json::array({*types})) {
      const std::string name = t.is_string() ? t.get<std::string>() : t.dump();
      const bool windowed = name.find("sliding") != std::string::npos || name.find("chunked") != std::string::npos;
      if (windowed || (model_type != "arcee_kda" && name != "full_attention")) {
        r.refuse("layer_types", "contains '{}', expected only 'full_attention'", printable(name));
      }
    }
  }
}

Mlp read_mlp(const Reader& r, const std::string& model_type) {
  const std::string act = r.string("hidden_act");
  if (act == "relu2" && model_type != "llama") return Mlp::squared_relu;
  if (act == "silu" && model_type != "arcee") return Mlp::gated_silu;
  r.refuse_value("hidden_act", model_type == "arcee"   ? "\"relu2\""
                               : model_type == "llama" ? "\"silu\""
                                                       : "\"relu2\" or \"silu\"");
}

/// Dimension i of the tensor `name`, which must exist with `rank` dimensions: the value of an absent key.
std::int64_t derive_from(const ShapeLookup& shape_of, const Reader& r, const char* key, const std::string& name,
                         int rank, int i) {
  const std::optional<Shape> shape = shape_of ? shape_of(name) : std::nullopt;
  if (!shape) r.refuse(key, "would follow from the shape of tensor '{}', which is missing", name);
  if (shape->rank() != rank || (*shape)[i] < 1 || (*shape)[i] > max_width) {
    r.refuse(key, "does not follow from tensor '{}': shape {}, expected {} dimensions in [1, {}]", name, shape->str(),
             rank, max_width);
  }
  return (*shape)[i];
}

std::vector<Mixer> read_mixers(const Reader& r, std::int64_t layers, const ShapeLookup& shape_of) {
  std::vector<Mixer> mixers;
  if (const json* list = r.find("mixers")) {
    if (!list->is_array() || list->size() != static_cast<std::size_t>(layers)) {
      r.refuse("mixers", "is {}, expected a list of num_hidden_layers = {} words", printable(list->dump()), layers);
    }
    for (const json& m : *list) {
      const std::string word = m.is_string() ? m.get<std::string>() : m.dump();
      if (word != "kda" && word != "nope" && word != "rope") {
        r.refuse("mixers", "contains {}, expected \"kda\", \"nope\" or \"rope\"", printable(m.dump()));
      }
      mixers.push_back(mixer_from(word));
    }
    return mixers;
  }
  if (!shape_of) r.refuse("mixers", "is missing, and there are no weights to derive it from");
  for (std::int64_t l = 0; l < layers; ++l) {
    mixers.push_back(shape_of(fmt::format("model.layers.{}.self_attn.A_log", l)) ? Mixer::kda : Mixer::nope);
  }
  return mixers;
}

KdaSpec read_kda(const Reader& r, const ModelSpec& s, const ShapeLookup& shape_of) {
  KdaSpec k;
  const auto first = std::find(s.mixers.begin(), s.mixers.end(), Mixer::kda);
  const bool used = first != s.mixers.end();
  const std::string prefix = fmt::format("model.layers.{}.self_attn.", first - s.mixers.begin());
  const auto read = [&](const char* key, const char* tensor, int rank, int dimension, std::int64_t absent) {
    if (r.has(key)) return r.integer(key, used ? 1 : 0, max_width);
    return used ? derive_from(shape_of, r, key, prefix + tensor, rank, dimension) : absent;
  };
  k.heads = read("kda_num_heads", "A_log", 1, 0, 0);
  k.head_dim = read("kda_head_dim", "o_norm.weight", 1, 0, 0);
  // A convolution may be stored with or without its middle dimension of 1.
  const auto conv = shape_of ? shape_of(prefix + "q_conv1d.weight") : std::nullopt;
  k.conv_width = read("kda_conv_size", "q_conv1d.weight", conv && conv->rank() == 2 ? 2 : 3, -1, k.conv_width);
  k.gate_rank = read("kda_gate_rank", "f_proj.0.weight", 2, 0, 0);
  k.gate_lower_bound = r.number_or("kda_gate_lower_bound", 0, -5, 0);
  if (k.head_dim != 0 && k.heads > max_width / k.head_dim) r.refuse("kda_num_heads", "times kda_head_dim is too large");
  return k;
}

}  // namespace

ModelSpec read_huggingface_config(const std::filesystem::path& file, const ShapeLookup& shape_of) {
  return parse_huggingface_config(read_file(file), file.string(), shape_of);
}

ModelSpec parse_huggingface_config(std::string_view text, const std::string& name, const ShapeLookup& shape_of) {
  const json root = parse_json(text, name);
  if (!root.is_object()) fail<FormatError>("{}: is not a JSON object", name);
  const Reader r(root, name);
  ModelSpec s;
  s.model_type = r.string("model_type");
  if (s.model_type != "arcee" && s.model_type != "llama" && s.model_type != "arcee_kda") {
    r.refuse_value("model_type", "\"arcee\", \"llama\" or \"arcee_kda\"");
  }
  refuse_unsupported(r, s.model_type);
  s.mlp = read_mlp(r, s.model_type);
  s.vocabulary = r.integer("vocab_size", 1, max_vocabulary);
  s.hidden = r.integer("hidden_size", 1, max_width);
  s.intermediate = r.integer("intermediate_size", 1, max_width);
  const std::int64_t layers = r.integer("num_hidden_layers", 1, max_layers);
  s.max_positions = r.integer("max_position_embeddings", 1, std::numeric_limits<std::int32_t>::max());
  s.norm_eps = r.number("rms_norm_eps", 1e-30, 1);
  s.tied_embeddings = r.boolean_or("tie_word_embeddings", false);
  if (s.model_type == "arcee_kda") {
    s.mixers = read_mixers(r, layers, shape_of);
    s.kda = read_kda(r, s, shape_of);
  } else {
    s.mixers.assign(static_cast<std::size_t>(layers), Mixer::rope);
  }
  const bool attends = s.has(Mixer::rope) || s.has(Mixer::nope);
  s.heads = r.integer("num_attention_heads", attends ? 1 : 0, max_width);
  if (r.has("head_dim")) {
    s.head_dim = r.integer("head_dim", attends ? 1 : 0, max_width);
  } else if (s.heads != 0) {
    if (s.hidden % s.heads != 0) {
      r.refuse("head_dim", "is missing, and hidden_size {} is not a multiple of num_attention_heads {}", s.hidden,
               s.heads);
    }
    s.head_dim = s.hidden / s.heads;
  }
  if (s.head_dim != 0 && s.heads > max_width / s.head_dim) {
    r.refuse("num_attention_heads", "times head_dim {} is too large: {}", s.head_dim, s.heads);
  }
  s.kv_heads = r.has("num_key_value_heads") ? r.integer("num_key_value_heads", attends ? 1 : 0, s.heads) : s.heads;
  if (s.model_type == "arcee_kda" && !r.has("mixers") && s.has(Mixer::nope)) {
    const auto layer = std::find(s.mixers.begin(), s.mixers.end(), Mixer::nope) - s.mixers.begin();
    const std::string k_proj = fmt::format("model.layers.{}.self_attn.k_proj.weight", layer);
    const std::int64_t rows = derive_from(shape_of, r, "num_key_value_heads", k_proj, 2, 0);
    if (rows % s.head_dim != 0) {
      fail<FormatError>("{}: tensor '{}' has {} rows, not a multiple of head_dim {}", name, k_proj, rows, s.head_dim);
    }
    if (r.has("num_key_value_heads") && s.kv_heads != rows / s.head_dim) {
      log::warn("{}: key 'num_key_value_heads' is {}, but the weights have {}; the weights are followed", name,
                s.kv_heads, rows / s.head_dim);
    }
    s.kv_heads = rows / s.head_dim;
  }
  s.rope = read_rope(r, s.has(Mixer::rope));
  s.bos_token = read_token(r, "bos_token_id", s.vocabulary);
  s.eos_token = read_token(r, "eos_token_id", s.vocabulary);
  try {
    s.validate();
  } catch (const ConfigError& e) {
    fail<FormatError>("{}: {}", name, e.what());
  }
  return s;
}

std::string write_huggingface_config(const ModelSpec& s, DType dtype) {
  using nlohmann::ordered_json;
  s.validate();
  const bool kda = s.model_type == "arcee_kda";
  if (!kda) {
    const bool arcee = s.model_type == "arcee";
    if (!arcee && s.model_type != "llama") {
      fail<ConfigError>("model type '{}' cannot be exported; accepted: arcee, llama, arcee_kda", s.model_type);
    }
    if (s.has(Mixer::nope) || s.has(Mixer::kda) || (s.mlp == Mlp::squared_relu) != arcee) {
      fail<ConfigError>("model type '{}' has rotary attention in every layer and a {} MLP; this model is an arcee_kda",
                        s.model_type, arcee ? "squared-ReLU" : "gated SiLU");
    }
  }
  ordered_json j;
  j["model_type"] = s.model_type;
  if (kda) {
    j["architectures"] = {"ArceeKdaForCausalLM"};
    j["auto_map"] = {{"AutoConfig", "configuration_arcee_kda.ArceeKdaConfig"},
                     {"AutoModelForCausalLM", "modeling_arcee_kda.ArceeKdaForCausalLM"}};
  } else {
    j["architectures"] = {s.model_type == "arcee" ? "ArceeForCausalLM" : "LlamaForCausalLM"};
  }
  j["vocab_size"] = s.vocabulary;
  j["hidden_size"] = s.hidden;
  j["intermediate_size"] = s.intermediate;
  j["num_hidden_layers"] = s.layers();
  j["num_attention_heads"] = s.heads;
  j["num_key_value_heads"] = s.kv_heads;
  j["head_dim"] = s.head_dim;
  j["hidden_act"] = s.mlp == Mlp::squared_relu ? "relu2" : "silu";
  j["max_position_embeddings"] = s.max_positions;
  j["rms_norm_eps"] = s.norm_eps;
  j["tie_word_embeddings"] = s.tied_embeddings;
  if (kda) {
    j["mixers"] = ordered_json::array();
    for (const Mixer m : s.mixers) j["mixers"].push_back(name_of(m));
    j["kda_num_heads"] = s.kda.heads;
    j["kda_head_dim"] = s.kda.head_dim;
    j["kda_conv_size"] = s.kda.conv_width;
    j["kda_gate_rank"] = s.kda.gate_rank;
    j["kda_gate_lower_bound"] = s.kda.gate_lower_bound == 0 ? ordered_json() : ordered_json(s.kda.gate_lower_bound);
  } else {
    j["attention_bias"] = false;
    j["attention_dropout"] = 0.0;
    j["mlp_bias"] = false;
  }
  // A model without rotary layers may still carry the parameters of its teacher; defaults are left out there.
  if (s.has(Mixer::rope) || s.rope != RopeSpec{}) {
    ordered_json rope;
    rope["rope_type"] = s.rope.is_yarn() ? "yarn" : "default";
    if (s.rope.is_yarn()) {
      rope["factor"] = s.rope.factor;
      rope["original_max_position_embeddings"] = s.rope.original_max_positions;
      rope["beta_fast"] = s.rope.beta_fast;
      rope["beta_slow"] = s.rope.beta_slow;
      if (s.rope.mscale != 0) rope["mscale"] = s.rope.mscale;
      if (s.rope.mscale_all_dim != 0) rope["mscale_all_dim"] = s.rope.mscale_all_dim;
      if (s.rope.attention_factor != 0) rope["attention_factor"] = s.rope.attention_factor;
    }
    j["rope_theta"] = s.rope.theta;
    j["rope_scaling"] = s.rope.is_yarn() ? rope : ordered_json();
    rope["rope_theta"] = s.rope.theta;
    j["rope_parameters"] = rope;
  }
  const auto token = [](std::int64_t id) { return id < 0 ? ordered_json() : ordered_json(id); };
  j["bos_token_id"] = token(s.bos_token);
  j["eos_token_id"] = token(s.eos_token);
  j["initializer_range"] = 0.02;
  j["use_cache"] = true;
  j["dtype"] = name_of(dtype);
  j["torch_dtype"] = name_of(dtype);
  return j.dump(2) + "\n";
}

}  // namespace deltapipe
