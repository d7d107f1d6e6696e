#include "checkpoints/convert.h"
#include "checkpoints/hf_config.h"
#include "checkpoints/hf_import.h"
#include "tests/checkpoints/tiny_models.h"

#include <fmt/format.h>

#include <cstring>
#include <nlohmann/json.hpp>

namespace deltapipe {
namespace {

using testing::expect_error;
using testing::TemporaryFolder;
using testing::write_text;

// AFM-4.5B-Base in the style of transformers 4 and of transformers 5.
constexpr std::string_view afm_head = R"({
  "architectures": ["ArceeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 128000,
  "eos_token_id": 128001, "head_dim": 128, "hidden_act": "relu2", "hidden_size": 2560, "initializer_range": 0.02,
  "intermediate_size": 18432, "max_position_embeddings": 65536, "mlp_bias": false, "model_type": "arcee",
  "num_attention_heads": 20, "num_hidden_layers": 36, "num_key_value_heads": 4, "rms_norm_eps": 1e-05,
  "tie_word_embeddings": false, "use_cache": true, "vocab_size": 128004)";
constexpr std::string_view afm_old_rope = R"(, "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 20.0,
  "mscale": 1.0, "original_max_position_embeddings": 4096, "rope_type": "yarn", "type": "yarn"}, "rope_theta": 10000.0,
  "torch_dtype": "bfloat16", "transformers_version": "4.53.0"})";
constexpr std::string_view afm_new_rope = R"(, "rope_parameters": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 20.0,
  "mscale": 1.0, "original_max_position_embeddings": 4096, "rope_theta": 10000.0, "rope_type": "yarn"},
  "dtype": "bfloat16", "transformers_version": "5.0.0"})";

std::string joined(std::string_view a, std::string_view b) { return fmt::format("{}{}", a, b); }

/// `text` with the first `from` replaced, which must be there.
std::string edited(std::string text, std::string_view from, std::string_view to) {
  const auto at = text.find(from);
  if (at == std::string::npos) throw std::logic_error(fmt::format("nothing to edit: {}", from));
  return text.replace(at, from.size(), to);
}

class ConfigText {
 public:
  ModelSpec read(std::string_view text, const ShapeLookup& shapes = {}) const {
    write_text(folder_ / "config.json", text);
    return read_huggingface_config(folder_ / "config.json", shapes);
  }

 private:
  TemporaryFolder folder_;
};

ModelSpec afm() {
  ModelSpec s;
  s.model_type = "arcee";
  s.vocabulary = 128004;
  s.hidden = 2560;
  s.intermediate = 18432;
  s.heads = 20;
  s.kv_heads = 4;
  s.head_dim = 128;
  s.max_positions = 65536;
  s.rope = {.theta = 10000, .factor = 20, .original_max_positions = 4096, .mscale = 1.0};
  s.mixers.assign(36, Mixer::rope);
  s.bos_token = 128000;
  s.eos_token = 128001;
  return s;
}

TEST(HuggingFaceConfig, ReadsAfmInBothRopeStyles) {
  const ConfigText config;
  EXPECT_EQ(config.read(joined(afm_head, afm_old_rope)), afm());
  EXPECT_EQ(config.read(joined(afm_head, afm_new_rope)), afm());
  EXPECT_EQ(config.read(edited(joined(afm_head, afm_old_rope), R"("rope_type": "yarn", )", "")), afm());
  EXPECT_EQ(config.read(edited(joined(afm_head, afm_old_rope), R"(, "type": "yarn")", "")), afm());
  // Both styles in one file, agreeing.
  std::string both = edited(joined(afm_head, afm_new_rope), R"("dtype")", joined(afm_old_rope.substr(2), ""));
  both = both.substr(0, both.find("\"torch_dtype\"")) + "\"dtype\": \"bfloat16\"}";
  EXPECT_EQ(config.read(both), afm());
  expect_error<FormatError>([&] { config.read(edited(both, R"("factor": 20.0)", R"("factor": 16.0)")); },
                            {"config.json", "rope_scaling", "contradicts"});
  // YaRN's own defaults.
  EXPECT_EQ(config.read(edited(joined(afm_head, afm_new_rope), R"("beta_fast": 32.0, "beta_slow": 1.0,)",
                               R"("beta_fast": null,)")),
            afm());
}

// SmolLM2-135M.
constexpr std::string_view smol = R"({
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 0,
  "eos_token_id": [7, 0], "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.04, "intermediate_size": 1536,
  "is_llama_config": true, "max_position_embeddings": 8192, "mlp_bias": false, "model_type": "llama",
  "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1,
  "rms_norm_eps": 1e-05, "rope_interleaved": false, "rope_scaling": null, "rope_theta": 100000,
  "tie_word_embeddings": true, "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 49152})";

TEST(HuggingFaceConfig, ReadsATiedLlama) {
  const ConfigText config;
  const ModelSpec s = config.read(smol);
  EXPECT_EQ(s.model_type, "llama");
  EXPECT_EQ(s.mlp, Mlp::gated_silu);
  EXPECT_TRUE(s.tied_embeddings);
  EXPECT_EQ(s.head_dim, 64);
  EXPECT_EQ(s.rope, RopeSpec{.theta = 100000});
  EXPECT_EQ(s.bos_token, 0);
  EXPECT_EQ(s.eos_token, 7);
  EXPECT_EQ(count_parameters(s), 134'515'008);  // the published number
  EXPECT_FALSE(config.read(edited(std::string(smol), R"("tie_word_embeddings": true,)", "")).tied_embeddings);
  EXPECT_EQ(config.read(edited(std::string(smol), R"("num_key_value_heads": 3,)", "")).kv_heads, 9);
  EXPECT_EQ(config.read(edited(std::string(smol), R"("bos_token_id": 0)", R"("bos_token_id": null)")).bos_token, -1);
  EXPECT_EQ(config.read(edited(std::string(smol), R"("bos_token_id": 0)", R"("bos_token_id": 49152)")).bos_token, -1);
}

TEST(HuggingFaceConfig, RefusesWhatItCannotExpressNamingTheKey) {
  const std::string old_style = joined(afm_head, afm_old_rope), new_style = joined(afm_head, afm_new_rope);
  const std::string llama(smol);
  struct Case {
    std::string text;
    std::string_view key, part;
  };
  std::vector<Case> cases{
      {edited(old_style, R"("arcee")", R"("gpt2")"), "model_type", "gpt2"},
      {edited(old_style, R"("attention_bias": false)", R"("attention_bias": true)"), "attention_bias", "false"},
      {edited(old_style, R"("mlp_bias": false)", R"("mlp_bias": true)"), "mlp_bias", "false"},
      {edited(old_style, R"("mlp_bias": false)", R"("mlp_bias": 0)"), "mlp_bias", "false"},
      {edited(old_style, "relu2", "silu"), "hidden_act", "relu2"},
      {edited(llama, R"("silu")", R"("relu2")"), "hidden_act", "silu"},
      {edited(llama, R"("use_cache": true)", R"("sliding_window": 4096)"), "sliding_window", "4096"},
      {edited(llama, R"("use_cache": true)", R"("layer_types": ["full_attention", "sliding_attention"])"),
       "layer_types", "sliding_attention"},
      {edited(llama, R"("use_cache": true)", R"("quantization_config": {"bits": 4})"), "quantization_config",
       "unquant"},
      {edited(llama, R"("rope_interleaved": false)", R"("rope_interleaved": true)"), "rope_interleaved", "false"},
      {edited(llama, R"("rope_theta": 100000,)", ""), "rope_theta", "missing"},
      {edited(llama, R"("rope_scaling": null)", R"("rope_scaling": {"rope_type": "llama3", "factor": 8.0})"),
       "rope_scaling.rope_type", "llama3"},
      {edited(llama, R"("rope_scaling": null)", R"("rope_scaling": {"type": "linear", "factor": 8.0})"),
       "rope_scaling.type", "linear"},
      {edited(llama, R"("rope_scaling": null)", R"("rope_scaling": {"factor": 8.0})"), "rope_scaling.factor",
       "default"},
      {edited(llama, R"("rope_scaling": null)", R"("rope_scaling": [8.0])"), "rope_scaling", "object"},
      {edited(llama, R"("rope_scaling": null)", R"("rope_parameters": {"rope_theta": 10000.0})"),
       "rope_parameters.rope_theta", "100000"},
      {edited(llama, R"("rope_scaling": null)", R"("partial_rotary_factor": 0.5)"), "partial_rotary_factor", "0.5"},
      {edited(old_style, R"("type": "yarn")", R"("type": "default")"), "rope_scaling.type", "yarn"},
      {edited(new_style, R"("factor": 20.0)", R"("factor": 1.0)"), "rope_parameters.factor", "over 1"},
      {edited(new_style, R"("factor": 20.0,)", ""), "rope_parameters.factor", "missing"},
      {edited(new_style, R"("original_max_position_embeddings": 4096,)", ""),
       "rope_parameters.original_max_position_embeddings", "missing"},
      {edited(new_style, R"("use_cache": true)", R"("original_max_position_embeddings": 8192)"),
       "original_max_position_embeddings", "4096"},
      {edited(new_style, R"("mscale": 1.0)", R"("truncate": false)"), "rope_parameters.truncate", "true"},
      {edited(new_style, R"("mscale": 1.0)", R"("long_factor": [1.0])"), "rope_parameters.long_factor", "not known"},
      {edited(old_style, R"("num_hidden_layers": 36)", R"("num_hidden_layers": 36.0)"), "num_hidden_layers", "36.0"},
      {edited(old_style, R"("num_hidden_layers": 36)", R"("num_hidden_layers": 1000000000000)"), "num_hidden_layers",
       "[1, 10000]"},
      {edited(old_style, R"("hidden_size": 2560)", R"("hidden_size": 18446744073709551615)"), "hidden_size", "integer"},
      {edited(old_style, R"("hidden_size": 2560)", R"("hidden_size": -2560)"), "hidden_size", "-2560"},
      {edited(old_style, R"("hidden_size": 2560)", R"("hidden_size": "2560")"), "hidden_size", "integer"},
      {edited(old_style, R"("rms_norm_eps": 1e-05)", R"("rms_norm_eps": 0)"), "rms_norm_eps", "0"},
      {edited(old_style, R"("num_key_value_heads": 4)", R"("num_key_value_heads": 21)"), "num_key_value_heads", "21"},
      {edited(old_style, R"("head_dim": 128)", R"("head_dim": 4000000)"), "num_attention_heads", "too large"},
      {edited(llama, R"("num_attention_heads": 9)", R"("num_attention_heads": 7)"), "head_dim", "multiple"},
      {edited(old_style, R"("bos_token_id": 128000)", R"("bos_token_id": "<s>")"), "bos_token_id", "<s>"},
      {edited(old_style, R"("bos_token_id": 128000)", R"("bos_token_id": [])"), "bos_token_id", "[]"},
      {edited(old_style, R"("mlp_bias": false)", R"("vocab_size": 5)"), "vocab_size", "duplicate"},
  };
  for (const char* key : {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                          "max_position_embeddings", "rms_norm_eps", "model_type", "hidden_act"}) {
    cases.push_back({edited(old_style, fmt::format("\"{}\"", key), "\"other\""), key, "missing"});
  }
  const ConfigText config;
  for (const Case& c : cases) {
    SCOPED_TRACE(fmt::format("{} {}", c.key, c.part));
    expect_error<FormatError>([&] { config.read(c.text); }, {"config.json", c.key, c.part});
  }
  expect_error<FormatError>(
      [&] { config.read(edited(old_style, R"("num_key_value_heads": 4)", R"("num_key_value_heads": 3)")); },
      {"config.json", "20", "3"});
  expect_error<FormatError>([&] { config.read("[1]"); }, {"config.json", "object"});
  expect_error<FormatError>([&] { config.read(old_style.substr(0, 200)); }, {"config.json", "JSON"});
}

// Every key with every kind of value: a valid spec or a FormatError, never another exception.
TEST(HuggingFaceConfig, SurvivesAnyValueOfAnyKey) {
  const ConfigText config;
  std::vector<nlohmann::json> values{nullptr, true, -1, 0, 1, 3, 1e300, -0.5, "", "yarn", "x\ny"};
  for (const char* text :
       {"[]", "{}", "[1]", "[[\"kda\"]]", "{\"rope_type\":7}", "99999999999999999999", "9223372036854775807"}) {
    values.push_back(nlohmann::json::parse(text));
  }
  int accepted = 0, refused = 0;
  const auto try_one = [&](const nlohmann::json& j) {
    try {
      config.read(j.dump()).validate();
      ++accepted;
    } catch (const FormatError& e) {
      EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos) << e.what();
      ++refused;
    }
  };
  for (const std::string& text : {joined(afm_head, afm_old_rope), joined(afm_head, afm_new_rope), std::string(smol),
                                  write_huggingface_config(testing::tiny_hybrid(), DType::f32)}) {
    const nlohmann::json good = nlohmann::json::parse(text);
    config.read(good.dump());
    std::vector<std::string> keys{"sliding_window", "layer_types", "quantization_config", "partial_rotary_factor"};
    for (const auto& [key, value] : good.items()) keys.push_back(key);
    for (const std::string& key : keys) {
      for (const auto& value : values) {
        nlohmann::json j = good;
        j[key] = value;
        try_one(j);
        if (!good.contains(key) || !good[key].is_object()) continue;
        for (const auto& [inner, unused] : good[key].items()) {
          j = good;
          j[key][inner] = value;
          try_one(j);
        }
      }
    }
  }
  EXPECT_GT(accepted, 500);
  EXPECT_GT(refused, 500);
}

// A published hybrid without our keys: the weights decide.
TEST(HuggingFaceConfig, DerivesKdaSizesFromTheWeights) {
  const ConfigText config;
  const std::string text = edited(joined(afm_head, afm_old_rope), R"("arcee")", R"("arcee_kda")");
  for (const std::int64_t kv_heads : {4, 20}) {
    ModelSpec expected = afm();
    expected.model_type = "arcee_kda";
    expected.kv_heads = kv_heads;
    expected.kda = {.heads = 20, .head_dim = 128, .conv_width = 4, .gate_rank = 128};
    for (std::size_t l = 0; l < 36; ++l) expected.mixers[l] = l % 4 == 3 ? Mixer::nope : Mixer::kda;
    std::map<std::string, Shape> shapes;
    for (const ParameterSpec& p : parameters_of(expected)) shapes[p.name] = p.shape;
    const ShapeLookup lookup = [&](const std::string& name) -> std::optional<Shape> {
      return shapes.contains(name) ? std::optional(shapes[name]) : std::nullopt;
    };
    EXPECT_EQ(config.read(text, lookup), expected);
    shapes["model.layers.0.self_attn.q_conv1d.weight"] = {2560, 4};
    EXPECT_EQ(config.read(text, lookup), expected);
    shapes["model.layers.0.self_attn.f_proj.0.weight"] = {std::int64_t{1} << 60, 0};
    expect_error<FormatError>([&] { config.read(text, lookup); }, {"kda_gate_rank", "f_proj.0.weight"});
    shapes.erase("model.layers.0.self_attn.f_proj.0.weight");
    expect_error<FormatError>([&] { config.read(text, lookup); }, {"kda_gate_rank", "f_proj.0.weight"});
    shapes["model.layers.3.self_attn.k_proj.weight"] = {500, 2560};
    const std::string with_rank = edited(text, R"("use_cache": true)", R"("kda_gate_rank": 128)");
    expect_error<FormatError>([&] { config.read(with_rank, lookup); }, {"k_proj.weight", "500", "128"});
  }
  expect_error<FormatError>([&] { config.read(text); }, {"config.json", "mixers", "weights"});
}

TEST(HuggingFaceConfig, RefusesWrongKdaKeys) {
  const ConfigText config;
  const std::string good = write_huggingface_config(testing::tiny_hybrid(), DType::f32);
  EXPECT_EQ(config.read(good), testing::tiny_hybrid());
  const auto refuses = [&](std::string_view from, std::string_view to, std::string_view key) {
    expect_error<FormatError>([&] { config.read(edited(good, from, to)); }, {"config.json", key});
  };
  refuses("\"nope\"", "\"mamba\"", "mixers");
  refuses("\"nope\",", "", "mixers");
  refuses("\"nope\"", "1", "mixers");
  refuses("\"kda_num_heads\": 3", "\"kda_num_heads\": 0", "kda_num_heads");
  refuses("\"kda_head_dim\": 4", "\"kda_head_dim\": \"4\"", "kda_head_dim");
  refuses("\"kda_conv_size\": 4", "\"kda_conv_size\": -4", "kda_conv_size");
  refuses("\"kda_gate_rank\": 5", "\"kda_gate_rank\": null", "kda_gate_rank");
  refuses("\"kda_gate_lower_bound\": -4.5", "\"kda_gate_lower_bound\": 1", "kda_gate_lower_bound");
  refuses("\"kda_gate_lower_bound\": -4.5", "\"kda_gate_lower_bound\": -6", "kda_gate_lower_bound");
}

// Weights of every dtype, in one file and in shards.
TEST(HuggingFaceFolder, LoadsEveryDtype) {
  for (const DType file_type : {DType::f32, DType::f16, DType::bf16, DType::f64}) {
    for (const bool sharded : {false, true}) {
      const TemporaryFolder folder;
      const ModelSpec spec = testing::tiny_hybrid();
      const testing::Weights weights(spec, file_type);
      weights.write_folder(folder.path(), sharded);
      const HuggingFaceFolder model(folder.path());
      EXPECT_EQ(model.spec(), spec);
      model.verify();
      for (const ParameterSpec& p : parameters_of(spec)) {
        const Tensor values = weights.at(p.name);
        std::vector<double> expected(static_cast<std::size_t>(p.shape.numel())), found(expected.size());
        convert_floats({static_cast<const std::byte*>(values.data), values.bytes()}, file_type,
                       Tensor(expected.data(), DType::f64, p.shape));
        model.load(p, Tensor(found.data(), DType::f64, p.shape));
        EXPECT_EQ(found, expected) << p.name;
        std::vector<float> narrow(expected.size());
        model.load(p, Tensor(narrow.data(), DType::f32, p.shape));
        for (std::size_t i = 0; i < narrow.size(); ++i) EXPECT_EQ(narrow[i], static_cast<float>(expected[i]));
        std::vector<BFloat16> brain(expected.size());
        model.load(p, Tensor(brain.data(), DType::bf16, p.shape));
        for (std::size_t i = 0; i < brain.size(); ++i) EXPECT_EQ(brain[i].bits, to_bfloat16(expected[i]).bits);
      }
    }
  }
}

TEST(HuggingFaceFolder, NamesTheTensorThatDoesNotFit) {
  const ModelSpec spec = testing::tiny_hybrid();
  const auto with = [&](const std::function<void(testing::Weights&)>& change,
                        std::initializer_list<std::string_view> parts) {
    const TemporaryFolder folder;
    testing::Weights weights(spec, DType::f32);
    change(weights);
    weights.write_folder(folder.path(), false);
    expect_error<FormatError>([&] { HuggingFaceFolder(folder.path()).verify(); }, parts);
  };
  const std::string q = "model.layers.1.self_attn.q_proj.weight";
  with([&](auto& w) { w.erase(q); }, {"model.safetensors", q, "missing", "[8, 8]"});
  with([&](auto& w) { w.add(q, DType::f32, {8, 9}); }, {"model.safetensors", q, "[8, 9]", "[8, 8]"});
  with([&](auto& w) { w.add(q, DType::i32, {8, 8}); }, {"model.safetensors", q, "I32", "BF16"});
  with([&](auto& w) { w.add("model.layers.0.self_attn.A_log", DType::f32, {2}); }, {"A_log", "[2]", "[3]"});
  with(
      [&](auto& w) {
        w.add("model.layers.0.self_attn.q_conv1d.weight", DType::f32, {12, 1, 3});
      },
      {"q_conv1d.weight", "[12, 1, 3]", "[12, 1, 4] or [12, 4]"});
  with(
      [&](auto& w) {
        for (int i = 0; i < 7; ++i) w.add(fmt::format("extra.{}", i), DType::f32, {1});
      },
      {"7 tensors", "'extra.0'", "'extra.4'", "..."});
  with([&](auto& w) { w.add("model.layers.0.self_attn.q_proj.bias", DType::f32, {12}); }, {"q_proj.bias"});
  with([&](auto& w) { w.add("lm_head.bias", DType::f32, {12}); }, {"lm_head.bias"});

  const TemporaryFolder folder;
  testing::Weights weights(spec, DType::f32);
  weights.add(q, DType::f32, {8, 9});
  weights.write_folder(folder.path(), false);
  const HuggingFaceFolder model(folder.path());
  std::vector<float> out(72);
  expect_error<FormatError>([&] { model.load({q, {8, 8}, 1}, Tensor(out.data(), DType::f32, {8, 8})); }, {q, "[8, 9]"});
  expect_error<InternalError>([&] { model.load({q, {8, 8}, 1}, Tensor(out.data(), DType::f32, {8, 9})); }, {q});
}

TEST(HuggingFaceFolder, AcceptsKnownExtrasAndFlatConvolutions) {
  const TemporaryFolder folder;
  ModelSpec spec = testing::tiny_hybrid();
  spec.tied_embeddings = true;
  testing::Weights weights(spec, DType::f32);
  weights.add("lm_head.weight", DType::f32, {spec.vocabulary, spec.hidden});
  weights.add("model.layers.1.self_attn.rotary_emb.inv_freq", DType::f32, {2});
  const std::string conv = "model.layers.0.self_attn.q_conv1d.weight";
  weights.add(conv, DType::f32, {12, 4});
  weights.write_folder(folder.path(), false);
  const HuggingFaceFolder model(folder.path());
  model.verify();
  std::vector<float> out(48);
  model.load({conv, {12, 1, 4}, 0}, Tensor(out.data(), DType::f32, {12, 1, 4}));
  EXPECT_EQ(std::memcmp(out.data(), weights.at(conv).data, 48 * 4), 0);
}

TEST(HuggingFaceFolder, ReadsAHybridWithoutOurKeys) {
  const TemporaryFolder folder;
  ModelSpec spec = testing::tiny_hybrid();
  spec.kda.gate_lower_bound = 0;
  std::replace(spec.mixers.begin(), spec.mixers.end(), Mixer::rope, Mixer::nope);
  spec.rope = {};
  testing::Weights(spec, DType::f32).write_folder(folder.path(), false);
  const std::string text = read_file(folder / "config.json");
  const auto begin = text.find("\"mixers\""), end = text.find("\"bos_token_id\"");
  write_text(folder / "config.json", text.substr(0, begin) + text.substr(end));
  const HuggingFaceFolder model(folder.path());
  model.verify();
  EXPECT_EQ(model.spec(), spec);
}

TEST(HuggingFaceFolder, RefusesBrokenIndexes) {
  const ModelSpec spec = testing::tiny_hybrid();
  const auto with = [&](std::string_view from, std::string_view to, std::initializer_list<std::string_view> parts) {
    const TemporaryFolder folder;
    testing::Weights(spec, DType::f32).write_folder(folder.path(), true);
    const auto index = folder / "model.safetensors.index.json";
    write_text(index, edited(read_file(index), from, to));
    expect_error<FormatError>([&] { HuggingFaceFolder{folder.path()}; }, parts);
  };
  const std::string_view norm = R"("model.norm.weight":"model-00002-of-00002.safetensors")";
  with("weight_map", "weights", {"index.json", "weight_map"});
  with(norm, R"("model.norm.weight":"model-00001-of-00002.safetensors")", {"model.norm.weight", "model-00001"});
  with(norm, R"("model.norm.weight":"model-00003-of-00003.safetensors")", {"model-00003", "missing"});
  with(norm, R"("model.norm.weight":"../model-00002-of-00002.safetensors")", {"model.norm.weight", "not a file name"});
  with(norm, R"("model.norm.weight":"/etc/passwd")", {"model.norm.weight", "not a file name"});
  with(norm, R"("model.norm.weight":"..")", {"model.norm.weight", "not a file name"});
  with(norm, R"("model.norm.weight":"a\u0000b")", {"model.norm.weight", "not a file name"});
  with(norm, R"("model.norm.weight":7)", {"model.norm.weight", "not a file name"});
  with(norm, fmt::format(R"("model.norm.weight":"{}")", std::string(3000, 'x')), {"index.json", "missing"});
  with("\"model.norm.weight\"", "\"model.norm.other\"", {"model.norm.other", "not in the shard"});
  with(fmt::format(",{}", norm), "", {"model.norm.weight", "not in the index"});
}

TEST(HuggingFaceFolder, RefusesIncompleteFolders) {
  const TemporaryFolder folder;
  expect_error<IoError>([&] { HuggingFaceFolder{folder / "none"}; }, {"none", "config.json"});
  write_text(folder / "config.json", smol);
  expect_error<IoError>([&] { HuggingFaceFolder{folder.path()}; }, {"model.safetensors"});
  write_text(folder / "pytorch_model.bin", "x");
  expect_error<IoError>([&] { HuggingFaceFolder{folder.path()}; }, {"pytorch_model.bin", "convert"});
}

}  // namespace
}  // namespace deltapipe
