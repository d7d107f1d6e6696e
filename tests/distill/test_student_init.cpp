// First weights of a student: what is copied from the teacher, what is repeated, what is fresh.
#include "distill/student_init.h"

#include "core/random.h"
#include "tests/distill/tiny.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace deltapipe {
namespace {

using Values = std::map<std::string, std::vector<float>>;

ModelSpec teacher_of(std::int64_t heads, std::int64_t kv_heads, bool tied = false) {
  ModelSpec s = testing::tiny_teacher(Mlp::squared_relu, tied);
  s.heads = heads;
  s.kv_heads = kv_heads;
  return s;
}

StudentConfig config_of(std::vector<std::string> mixers) {
  StudentConfig c;
  c.mixers = std::move(mixers);
  return c;
}

/// The teacher's weights: random, a function of the name.
std::vector<float> teacher_values(const ParameterSpec& p) {
  const RandomStream r(99, p.name);
  std::vector<float> values;
  for (std::int64_t i = 0; i < p.shape.numel(); ++i) {
    values.push_back(static_cast<float>(r.normal(static_cast<std::uint64_t>(i))));
  }
  return values;
}

/// Weights of `student` as init makes them. `specs` may name its parameters in any order.
Values init(const StudentConfig& config, const ModelSpec& teacher, const ModelSpec& student,
            const std::vector<ParameterSpec>& specs, std::uint64_t seed = 1) {
  Arena arena("weights", std::size_t{8} << 20);
  ParameterTable table(specs, DType::f32, arena);
  for (Parameter& p : table.all()) std::fill_n(p.value.as<float>(), p.value.numel(), std::nanf(""));
  const LoadWeight load = [](const ParameterSpec& p, const Tensor& out) {
    const auto values = teacher_values(p);
    ASSERT_EQ(out.numel(), static_cast<std::int64_t>(values.size()));
    std::memcpy(out.as<float>(), values.data(), out.bytes());
  };
  init_student_from_teacher(config, seed, teacher, load, student, table);
  Values all;
  for (const Parameter& p : table.all()) {
    all[p.spec.name].assign(p.value.as<float>(), p.value.as<float>() + p.value.numel());
  }
  return all;
}

Values init(const StudentConfig& config, const ModelSpec& teacher, std::uint64_t seed = 1) {
  const ModelSpec student = make_student_spec(config, &teacher, 0);
  return init(config, teacher, student, parameters_of(student), seed);
}

/// Teacher's weights by name.
Values teacher_weights(const ModelSpec& teacher) {
  Values all;
  for (const ParameterSpec& p : parameters_of(teacher)) all[p.name] = teacher_values(p);
  return all;
}

std::string layer(int l, const std::string& name) { return "model.layers." + std::to_string(l) + "." + name; }

bool is_key_or_value(const std::string& name) {
  return name.ends_with("k_proj.weight") || name.ends_with("v_proj.weight");
}

/// Mean and standard deviation; with n values of N(0, s) the first is within 5 s / sqrt(n) of 0 and the second within
/// 5 s / sqrt(2 n) of s, but for one case in a million.
void expect_normal(const std::vector<float>& x, double std, const std::string& name) {
  double sum = 0, squares = 0;
  for (const float v : x) {
    sum += static_cast<double>(v);
    squares += static_cast<double>(v) * static_cast<double>(v);
  }
  const auto n = static_cast<double>(x.size());
  EXPECT_NEAR(sum / n, 0, 5 * std / std::sqrt(n)) << name;
  EXPECT_NEAR(std::sqrt(squares / n), std, 5 * std / std::sqrt(2 * n)) << name;
}

TEST(StudentInit, CopiesWhatBothHaveBitByBit) {
  const ModelSpec teacher = teacher_of(10, 2);
  const Values ours = init(config_of({"kda", "kda", "kda", "nope"}), teacher);
  int copied = 0;
  for (const auto& [name, values] : teacher_weights(teacher)) {
    const bool in_kda_layer = name.find("layers.3.") == std::string::npos;
    if (is_key_or_value(name) && in_kda_layer) continue;
    EXPECT_EQ(ours.at(name), values) << name;
    ++copied;
  }
  EXPECT_EQ(copied, 3 + 4 * 6 + 2);  // embedding, norm, head; 2 norms, 2 MLPs, q, o a layer; k, v of the full layer
}

TEST(StudentInit, RepeatsKeyValueHeadsForKda) {
  constexpr std::int64_t heads = 10, kv_heads = 2, group = heads / kv_heads;
  const ModelSpec teacher = teacher_of(heads, kv_heads);
  const Values ours = init(config_of({"kda", "kda", "kda", "nope"}), teacher);
  const std::int64_t head = teacher.head_dim * teacher.hidden;
  for (const char* name : {"self_attn.k_proj.weight", "self_attn.v_proj.weight"}) {
    for (int l = 0; l < 3; ++l) {
      const auto& mine = ours.at(layer(l, name));
      const auto theirs = teacher_weights(teacher).at(layer(l, name));
      ASSERT_EQ(mine.size(), static_cast<std::size_t>(heads * head));
      for (std::int64_t h = 0; h < heads; ++h) {  // teacher's key/value head j becomes heads 5 j .. 5 j + 4
        EXPECT_TRUE(std::equal(theirs.begin() + h / group * head, theirs.begin() + (h / group + 1) * head,
                               mine.begin() + h * head))
            << name << " layer " << l << " head " << h;
      }
    }
  }
}

TEST(StudentInit, FullLayersTakeMoreKeyValueHeadsWhenAsked) {
  const ModelSpec teacher = teacher_of(12, 2);
  StudentConfig config = config_of({"nope"});
  config.attention.kv_heads = 4;
  const ModelSpec student = make_student_spec(config, &teacher, 0);
  EXPECT_EQ(student.kv_heads, 4);
  const Values ours = init(config, teacher);
  const std::int64_t head = teacher.head_dim * teacher.hidden;
  const auto& mine = ours.at(layer(1, "self_attn.k_proj.weight"));
  const auto theirs = teacher_weights(teacher).at(layer(1, "self_attn.k_proj.weight"));
  ASSERT_EQ(mine.size(), static_cast<std::size_t>(4 * head));
  for (std::int64_t h = 0; h < 4; ++h) {
    EXPECT_TRUE(std::equal(mine.begin() + h * head, mine.begin() + (h + 1) * head, theirs.begin() + h / 2 * head));
  }
  // The heads that queries read are the same as before: query i reads i / 3 of four, which holds i / 6 of two.
  for (const std::int64_t wrong : {3, 5, 8, 24}) {  // no multiple of 2, or no divisor of 12
    config.attention.kv_heads = wrong;
    EXPECT_THROW(make_student_spec(config, &teacher, 0), ConfigError) << wrong;
  }
}

TEST(StudentInit, FreshValuesHaveTheirDistributions) {
  const ModelSpec teacher = teacher_of(10, 2);
  const StudentConfig config = config_of({"kda", "kda", "kda", "nope"});
  const ModelSpec student = make_student_spec(config, &teacher, 0);
  const Values ours = init(config, teacher);
  std::set<float> decays;
  for (int l = 0; l < 3; ++l) {
    for (const float x : ours.at(layer(l, "self_attn.A_log"))) {
      EXPECT_GE(x, 0.0f);  // log of [1, 16)
      EXPECT_LT(x, std::log(16.0f));
      decays.insert(x);
    }
    double least = 1, most = 0;
    for (const float x : ours.at(layer(l, "self_attn.dt_bias"))) {
      const double dt = std::log1p(std::exp(static_cast<double>(x)));  // softplus
      EXPECT_GE(dt, 0.001 * (1 - 1e-6));
      EXPECT_LE(dt, 0.1 * (1 + 1e-6));
      least = std::min(least, dt);
      most = std::max(most, dt);
    }
    // 60 log-uniform values over two decades: all in the upper or lower half once in 2^60.
    EXPECT_LT(least, 0.01);
    EXPECT_GT(most, 0.01);
    for (const char* name : {"q_conv1d", "k_conv1d", "v_conv1d"}) {
      const auto& w = ours.at(layer(l, std::string("self_attn.") + name + ".weight"));
      ASSERT_EQ(w.size(), static_cast<std::size_t>(student.kda.width() * 4));
      for (std::size_t i = 0; i < w.size(); ++i) EXPECT_EQ(w[i], i % 4 == 3 ? 1.0f : 0.0f) << name << " " << i;
    }
    for (const float x : ours.at(layer(l, "self_attn.o_norm.weight"))) EXPECT_EQ(x, 1.0f);
    for (const char* name : {"f_proj.0", "f_proj.1", "g_proj.0", "g_proj.1", "b_proj"}) {
      const std::string full = layer(l, std::string("self_attn.") + name + ".weight");
      expect_normal(ours.at(full), 0.02, full);
    }
    for (const float x : ours.at(layer(l, "self_attn.g_proj.1.bias"))) EXPECT_EQ(x, 0.0f);
  }
  EXPECT_EQ(decays.size(), 30u) << "layers and heads differ from each other";
  for (const ParameterSpec& p : parameters_of(student)) {
    for (const float x : ours.at(p.name)) ASSERT_TRUE(std::isfinite(x)) << p.name;
  }
}

TEST(StudentInit, ConvolutionsMayBeRandom) {
  const ModelSpec teacher = teacher_of(10, 2);
  StudentConfig config = config_of({"kda"});
  config.kda.conv_init = ConvInit::normal;
  const Values ours = init(config, teacher);
  expect_normal(ours.at(layer(2, "self_attn.k_conv1d.weight")), 0.02, "k_conv1d");
}

TEST(StudentInit, DependsOnSeedAndNameAlone) {
  const ModelSpec teacher = teacher_of(10, 2);
  const StudentConfig config = config_of({"kda", "nope"});
  const ModelSpec student = make_student_spec(config, &teacher, 0);
  std::vector<ParameterSpec> specs = parameters_of(student);
  const Values forward = init(config, teacher, student, specs);
  std::reverse(specs.begin(), specs.end());
  EXPECT_EQ(init(config, teacher, student, specs), forward);
  specs.resize(specs.size() / 2);  // as on a rank that holds a part of the layers
  for (const auto& [name, values] : init(config, teacher, student, specs)) EXPECT_EQ(values, forward.at(name)) << name;

  const Values other = init(config, teacher, student, parameters_of(student), 2);
  for (const char* name : {"self_attn.A_log", "self_attn.dt_bias", "self_attn.f_proj.0.weight"}) {
    EXPECT_NE(other.at(layer(0, name)), forward.at(layer(0, name))) << name;
  }
  EXPECT_EQ(other.at("lm_head.weight"), forward.at("lm_head.weight"));
}

TEST(StudentInit, ProjectionsOfOtherHeadsAreFresh) {
  const ModelSpec teacher = teacher_of(4, 2);
  for (const auto& [heads, head_dim] : std::vector<std::pair<int, int>>{{3, 6}, {4, 8}, {6, 4}}) {  // 6 * 4 = 4 * 6
    StudentConfig config = config_of({"kda", "nope"});
    config.kda.heads = heads;
    config.kda.head_dim = head_dim;
    const Values ours = init(config, teacher);
    const Values theirs = teacher_weights(teacher);
    for (const char* name : {"q_proj", "k_proj", "v_proj", "o_proj"}) {
      const std::string projection = std::string("self_attn.") + name + ".weight";
      expect_normal(ours.at(layer(0, projection)), 0.02, projection);
      EXPECT_EQ(ours.at(layer(1, projection)), theirs.at(layer(1, projection)));
    }
    EXPECT_EQ(ours.at(layer(0, "mlp.up_proj.weight")), theirs.at(layer(0, "mlp.up_proj.weight")));
  }
}

TEST(StudentInit, KdaEverywhereAndTiedEmbeddings) {
  const ModelSpec teacher = teacher_of(4, 2, true);
  const StudentConfig config = config_of({"kda"});
  const ModelSpec student = make_student_spec(config, &teacher, 0);
  EXPECT_TRUE(student.tied_embeddings);
  EXPECT_FALSE(student.has(Mixer::nope) || student.has(Mixer::rope));
  const Values ours = init(config, teacher);
  EXPECT_FALSE(ours.contains("lm_head.weight"));
  const Values theirs = teacher_weights(teacher);
  EXPECT_EQ(ours.at("model.embed_tokens.weight"), theirs.at("model.embed_tokens.weight"));
  for (int l = 0; l < 4; ++l) EXPECT_TRUE(ours.contains(layer(l, "self_attn.A_log")));
}

TEST(StudentInit, RotaryStudentIsTheTeacher) {
  const ModelSpec teacher = teacher_of(4, 2);
  EXPECT_EQ(init(config_of({"rope"}), teacher), teacher_weights(teacher));
}

TEST(StudentInit, MixersRepeatOverTheLayers) {
  const ModelSpec teacher = testing::tiny_teacher(Mlp::squared_relu, false, 7);
  const ModelSpec student = make_student_spec(config_of({"kda", "kda", "nope"}), &teacher, 0);
  EXPECT_EQ(student.mixers,
            (std::vector<Mixer>{Mixer::kda, Mixer::kda, Mixer::nope, Mixer::kda, Mixer::kda, Mixer::nope, Mixer::kda}));
  EXPECT_EQ(student.model_type, "arcee_kda");
}

TEST(StudentInit, RandomModelsTakeSizesFromTheSettings) {
  StudentConfig config;
  config.init = StudentInit::random;
  config.model.hidden = 32;
  config.model.layers = 2;
  config.model.intermediate = 64;
  config.model.heads = 4;
  config.model.kv_heads = 2;
  config.model.head_dim = 8;
  config.model.max_positions = 512;
  config.model.init_std = 0.3;
  const ModelSpec spec = make_student_spec(config, nullptr, 258);
  EXPECT_EQ(spec.model_type, "arcee");
  EXPECT_EQ(spec.vocabulary, 258);
  EXPECT_EQ(spec.mixers, (std::vector<Mixer>{Mixer::rope, Mixer::rope}));
  Arena arena("weights", std::size_t{8} << 20);
  ParameterTable table(parameters_of(spec), DType::f32, arena);
  init_student_randomly(config, 1, table);
  for (const Parameter& p : table.all()) {
    const std::vector<float> values(p.value.as<float>(), p.value.as<float>() + p.value.numel());
    if (p.spec.shape.rank() == 1) {
      EXPECT_EQ(values, std::vector<float>(values.size(), 1.0f)) << p.spec.name;
    } else {
      expect_normal(values, 0.3, p.spec.name);
    }
  }
  config.model.vocabulary = 300;
  config.model.type = ModelType::arcee_kda;
  const ModelSpec hybrid = make_student_spec(config, nullptr, 258);
  EXPECT_EQ(hybrid.vocabulary, 300);
  EXPECT_EQ(hybrid.mixers, (std::vector<Mixer>{Mixer::kda, Mixer::kda}));
}

}  // namespace
}  // namespace deltapipe
