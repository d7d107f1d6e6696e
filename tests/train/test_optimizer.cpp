// The optimizer against AdamW spelled out in double, one number after another.
#include "train/optimizer.h"

#include "core/random.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace deltapipe {
namespace {

/// Shapes of every kind that models have: matrices, a convolution, vectors.
const std::vector<ParameterSpec> specs{{"model.embed_tokens.weight", {11, 6}, -1, false},
                                       {"model.layers.0.self_attn.q_proj.weight", {6, 6}, 0, false},
                                       {"model.layers.0.self_attn.q_conv1d.weight", {6, 1, 4}, 0, false},
                                       {"model.layers.0.self_attn.A_log", {3}, 0, true},
                                       {"model.layers.0.mlp.up_proj.weight", {9, 6}, 0, false},
                                       {"model.norm.weight", {6}, 1, false}};

double value_at(const Tensor& t, std::int64_t i) {
  if (t.dtype == DType::f64) return t.as<double>()[i];
  if (t.dtype == DType::f32) return static_cast<double>(t.as<float>()[i]);
  return static_cast<double>(to_float(t.as<BFloat16>()[i]));
}

void set(const Tensor& t, std::int64_t i, double x) {
  if (t.dtype == DType::f64) t.as<double>()[i] = x;
  if (t.dtype == DType::f32) t.as<float>()[i] = static_cast<float>(x);
  if (t.dtype == DType::bf16) t.as<BFloat16>()[i] = to_bfloat16(static_cast<float>(x));
}

std::vector<std::byte> bits(const Tensor& t) {
  std::vector<std::byte> copy(t.bytes());
  std::memcpy(copy.data(), t.data, t.bytes());
  return copy;
}

/// Parameters with gradients and an optimizer, all with random values.
class Fixture {
 public:
  explicit Fixture(const OptimizerConfig& config, DType dtype = DType::f64)
      : arena_("test", std::size_t{1} << 20), table(specs, dtype, arena_), config_(config) {
    table.allocate_gradients(arena_, [](const ParameterSpec&) { return true; });
    for (Parameter& p : table.all()) {
      p.trainable = true;
      const RandomStream r(1, "value " + p.spec.name);
      for (std::int64_t i = 0; i < p.value.numel(); ++i) set(p.value, i, r.normal(static_cast<std::uint64_t>(i)));
    }
    optimizer.emplace(config_, table, arena_);
    optimizer->capture_weights(Stream::cpu());
    optimizer->reset(Stream::cpu());
    for (const Parameter& p : table.all()) {
      for (std::int64_t i = 0; i < p.value.numel(); ++i) by_hand[p.spec.name].push_back({value_at(p.value, i), 0, 0});
    }
  }

  void draw_gradients(std::uint64_t seed, double scale) {
    for (Parameter& p : table.all()) {
      const RandomStream r(seed, "gradient " + p.spec.name);
      for (std::int64_t i = 0; i < p.value.numel(); ++i) {
        set(p.gradient_memory, i, scale * r.normal(static_cast<std::uint64_t>(i)));
      }
    }
  }

  Optimizer::Result step(double learning_rate) { return optimizer->step({Stream::cpu(), workspace_}, learning_rate); }

  struct Number {
    double w, m, v;
  };
  /// Loshchilov & Hutter's algorithm 2 over all trainable parameters; `factor` and `decay` by name.
  double step_by_hand(int step, double rate, const std::function<double(const std::string&)>& factor,
                      const std::function<double(const std::string&)>& decay) {
    double squares = 0;
    for (const Parameter& p : table.all()) {
      if (!p.trainable) continue;
      for (std::int64_t i = 0; i < p.value.numel(); ++i) squares += std::pow(value_at(p.gradient_memory, i), 2);
    }
    const double norm = std::sqrt(squares);
    const double scale = config_.clip_norm > 0 && norm > config_.clip_norm ? config_.clip_norm / norm : 1.0;
    for (const Parameter& p : table.all()) {
      if (!p.trainable) continue;
      for (std::int64_t i = 0; i < p.value.numel(); ++i) {
        Number& x = by_hand[p.spec.name][static_cast<std::size_t>(i)];
        const double g = scale * value_at(p.gradient_memory, i);
        x.m = config_.beta1 * x.m + (1 - config_.beta1) * g;
        x.v = config_.beta2 * x.v + (1 - config_.beta2) * g * g;
        const double m_hat = x.m / (1 - std::pow(config_.beta1, step));
        const double v_hat = x.v / (1 - std::pow(config_.beta2, step));
        const double lr = rate * factor(p.spec.name);
        x.w -= lr * decay(p.spec.name) * x.w + lr * m_hat / (std::sqrt(v_hat) + config_.epsilon);
      }
    }
    return norm;
  }

  /// Every weight and moment against those by hand.
  void expect_as_by_hand(double tolerance) {
    for (const Optimizer::State& s : optimizer->state()) {
      const auto& wanted = by_hand[s.parameter->spec.name];
      for (std::int64_t i = 0; i < s.master.numel(); ++i) {
        const Number& x = wanted[static_cast<std::size_t>(i)];
        EXPECT_NEAR(value_at(s.master, i), x.w, tolerance * (1 + std::abs(x.w))) << s.parameter->spec.name << " " << i;
        EXPECT_NEAR(value_at(s.exp_avg, i), x.m, tolerance * (1 + std::abs(x.m))) << s.parameter->spec.name;
        EXPECT_NEAR(value_at(s.exp_avg_sq, i), x.v, tolerance * (1 + std::abs(x.v))) << s.parameter->spec.name;
      }
    }
  }

  std::map<std::string, std::vector<std::byte>> all_bits() {
    std::map<std::string, std::vector<std::byte>> all;
    for (const Optimizer::State& s : optimizer->state()) {
      all[s.parameter->spec.name + " value"] = bits(s.parameter->value);
      all[s.parameter->spec.name + " master"] = bits(s.master);
      all[s.parameter->spec.name + " exp_avg"] = bits(s.exp_avg);
      all[s.parameter->spec.name + " exp_avg_sq"] = bits(s.exp_avg_sq);
    }
    return all;
  }

 private:
  Arena arena_;
  Arena workspace_{"workspace", std::size_t{1} << 16};

 public:
  ParameterTable table;
  std::optional<Optimizer> optimizer;
  std::map<std::string, std::vector<Number>> by_hand;

 private:
  OptimizerConfig config_;
};

constexpr auto one = [](const std::string&) { return 1.0; };

bool is_matrix(const std::string& name) {
  return name.find("norm") == std::string::npos && name.find("A_log") == std::string::npos;
}

TEST(Optimizer, DecaysMatricesAndClipsAtTheGlobalNorm) {
  OptimizerConfig config;
  config.weight_decay = 0.1;
  config.clip_norm = 0.5;
  Fixture f(config);
  const auto decay = [](const std::string& name) { return is_matrix(name) ? 0.1 : 0.0; };
  for (int step = 1; step <= 5; ++step) {
    // Norms on either side of the bound: about 12 sqrt(200) and 0.001 sqrt(200).
    f.draw_gradients(static_cast<std::uint64_t>(step), step % 2 == 0 ? 1e-3 : 12.0);
    const double norm = f.step_by_hand(step, 0.01 * step, one, decay);
    ASSERT_EQ(norm > config.clip_norm, step % 2 == 1);
    const Optimizer::Result result = f.step(0.01 * step);
    EXPECT_TRUE(result.applied);
    EXPECT_NEAR(result.gradient_norm, norm, 1e-12 * norm);
    EXPECT_EQ(f.optimizer->updates(), step);
  }
  f.expect_as_by_hand(1e-13);  // a few roundings of doubles a step
}

TEST(Optimizer, NoClippingWhenTheBoundIsZero) {
  OptimizerConfig config;
  config.clip_norm = 0;
  Fixture f(config);
  f.draw_gradients(1, 100);
  const double norm = f.step_by_hand(1, 0.01, one, [](const std::string&) { return 0.0; });
  EXPECT_NEAR(f.step(0.01).gradient_norm, norm, 1e-12 * norm);
  f.expect_as_by_hand(1e-12);  // moments are of size 1e4
}

TEST(Optimizer, FirstMatchingGroupHoldsAParameter) {
  OptimizerConfig config;
  config.weight_decay = 0.2;
  config.groups = {{"embed|A_log$", 0.5, true}, {"self_attn", 3.0, false}, {".", 0.25, true}};
  Fixture f(config);
  const auto factor = [](const std::string& name) {
    if (name.find("embed") != std::string::npos || name.ends_with("A_log")) return 0.5;
    return name.find("self_attn") != std::string::npos ? 3.0 : 0.25;
  };
  const auto decay = [](const std::string& name) {
    const bool off = name.find("self_attn") != std::string::npos;  // A_log: on in its group, but a vector
    return is_matrix(name) && !off ? 0.2 : 0.0;
  };
  for (int step = 1; step <= 3; ++step) {
    f.draw_gradients(static_cast<std::uint64_t>(step), 1.0);
    f.step_by_hand(step, 0.01, factor, decay);
    f.step(0.01);
  }
  f.expect_as_by_hand(1e-13);
}

TEST(Optimizer, FrozenParametersAreLeftAloneAndDoNotCountInTheNorm) {
  OptimizerConfig config;
  config.weight_decay = 0.2;
  config.clip_norm = 0.1;
  Fixture f(config);
  Parameter& frozen = f.table.at("model.layers.0.mlp.up_proj.weight");
  frozen.trainable = false;
  const auto before = bits(frozen.value);
  for (int step = 1; step <= 2; ++step) {
    f.draw_gradients(static_cast<std::uint64_t>(step), 1.0);
    set(frozen.gradient_memory, 3, std::numeric_limits<double>::quiet_NaN());
    const double norm =
        f.step_by_hand(step, 0.01, one, [](const std::string& name) { return is_matrix(name) ? 0.2 : 0.0; });
    const Optimizer::Result result = f.step(0.01);
    EXPECT_TRUE(result.applied);
    EXPECT_NEAR(result.gradient_norm, norm, 1e-12 * norm);
  }
  EXPECT_EQ(bits(frozen.value), before);
  f.expect_as_by_hand(1e-13);
}

TEST(Optimizer, ANonFiniteGradientChangesNothing) {
  for (const double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(),
                           -std::numeric_limits<double>::infinity()}) {
    Fixture f(OptimizerConfig{});
    f.draw_gradients(1, 1.0);
    f.step(0.01);
    const auto before = f.all_bits();
    f.draw_gradients(2, 1.0);
    const Parameter& last = f.table.all().back();
    set(last.gradient_memory, last.value.numel() - 1, bad);
    const Optimizer::Result result = f.step(0.01);
    EXPECT_FALSE(result.applied);
    EXPECT_FALSE(std::isfinite(result.gradient_norm));
    EXPECT_EQ(f.all_bits(), before);
    EXPECT_EQ(f.optimizer->updates(), 1);
  }
}

TEST(Optimizer, ResetForgetsMomentsAndUpdatesButNoWeights) {
  Fixture f(OptimizerConfig{});
  f.draw_gradients(1, 1.0);
  f.step(0.01);
  auto wanted = f.all_bits();
  for (auto& [name, content] : wanted) {
    if (name.find("exp_avg") != std::string::npos) content.assign(content.size(), std::byte{0});
  }
  f.optimizer->reset(Stream::cpu());
  EXPECT_EQ(f.optimizer->updates(), 0);
  EXPECT_EQ(f.all_bits(), wanted);
}

TEST(Optimizer, Bfloat16WeightsFollowFloat32Masters) {
  OptimizerConfig config;
  Fixture f(config, DType::bf16);
  for (int step = 1; step <= 20; ++step) {
    f.draw_gradients(static_cast<std::uint64_t>(step), 1.0);
    f.step_by_hand(step, 1e-4, one, [](const std::string&) { return 0.0; });
    f.step(1e-4);  // far below bfloat16's resolution of 2^-8: only the masters can add it up
  }
  // Twenty steps of float32, each rounding weights of size 4 to within 2^-22.
  f.expect_as_by_hand(20 * 0x1p-22);
  for (const Optimizer::State& s : f.optimizer->state()) {
    const bool kept = s.parameter->spec.keep_float32;
    EXPECT_EQ(s.parameter->value.dtype, kept ? DType::f32 : DType::bf16);
    EXPECT_EQ(s.master.data == s.parameter->value.data, kept);
    for (std::int64_t i = 0; i < s.master.numel(); ++i) {
      const float master = s.master.as<float>()[i];
      const double wanted = static_cast<double>(kept ? master : to_float(to_bfloat16(master)));
      EXPECT_EQ(value_at(s.parameter->value, i), wanted);
    }
  }
}

/// Weights and moments in bfloat16 after `steps`, from shards of `count`; gradients from the same stream.
std::map<std::string, std::vector<std::byte>> lean_bits(int count, int steps) {
  OptimizerConfig config;
  config.state = StateDType::bfloat16;
  config.weight_decay = 0.1;
  Arena arena("test", std::size_t{1} << 20), workspace("workspace", std::size_t{1} << 16);
  ParameterTable table(specs, DType::bf16, arena);
  table.allocate_gradients(
      arena, [](const ParameterSpec&) { return true; }, count);
  std::vector<std::unique_ptr<Optimizer>> shards;
  for (Parameter& p : table.all()) {
    p.trainable = true;
    const RandomStream r(1, "value " + p.spec.name);
    for (std::int64_t i = 0; i < p.value.numel(); ++i) set(p.value, i, r.normal(static_cast<std::uint64_t>(i)));
  }
  for (int i = 0; i < count; ++i) {
    const Optimizer::Settings settings{{i, count}, 7, nullptr};
    shards.push_back(std::make_unique<Optimizer>(config, table, arena, settings));
    shards.back()->capture_weights(Stream::cpu());
    shards.back()->reset(Stream::cpu());
  }
  for (int step = 0; step < steps; ++step) {
    for (Parameter& p : table.all()) {
      const RandomStream r(static_cast<std::uint64_t>(step), "gradient " + p.spec.name);
      for (std::int64_t i = 0; i < p.value.numel(); ++i) {
        set(p.gradient_memory, i, r.normal(static_cast<std::uint64_t>(i)));
      }
    }
    for (auto& shard : shards) shard->apply({Stream::cpu(), workspace}, 1.0, 1e-3);
  }
  std::map<std::string, std::vector<std::byte>> all;
  for (const auto& shard : shards) {
    for (const Optimizer::State& s : shard->state()) {
      const bool is_float = s.parameter->spec.keep_float32;
      EXPECT_EQ(s.exp_avg.dtype, is_float ? DType::f32 : DType::bf16) << s.parameter->spec.name;
      EXPECT_FALSE(s.has_master()) << s.parameter->spec.name;
      for (const auto& [name, t] : {std::pair(" m", s.exp_avg), std::pair(" v", s.exp_avg_sq)}) {
        const auto part = bits(t);
        auto& whole = all[s.parameter->spec.name + name];
        whole.insert(whole.end(), part.begin(), part.end());
      }
    }
  }
  for (const Parameter& p : table.all()) all[p.spec.name + " value"] = bits(p.value);
  return all;
}

TEST(OptimizerInBfloat16, ShardsChangeNoBit) {
  const auto whole = lean_bits(1, 5);
  for (const int count : {2, 3, 5}) EXPECT_TRUE(lean_bits(count, 5) == whole) << count << " shards";
}

// A step of 1e-3 is far below half of what separates bfloat16 numbers near 1, 2^-8: rounded to nearest, such weights
// would never move. Rounded stochastically they follow AdamW in float64 in the mean.
TEST(OptimizerInBfloat16, SmallStepsAddUp) {
  OptimizerConfig config;
  config.state = StateDType::bfloat16;
  config.clip_norm = 0;
  const std::vector<ParameterSpec> matrix{{"model.layers.0.mlp.up_proj.weight", {64, 64}, 0, false}};
  Arena arena("test", std::size_t{1} << 20), workspace("workspace", std::size_t{1} << 16);
  ParameterTable table(matrix, DType::bf16, arena);
  table.allocate_gradients(arena, [](const ParameterSpec&) { return true; });
  Parameter& p = table.all().front();
  p.trainable = true;
  const std::int64_t n = p.value.numel();
  for (std::int64_t i = 0; i < n; ++i) {
    set(p.value, i, 1.5);
    set(p.gradient_memory, i, 1.0);
  }
  Optimizer optimizer(config, table, arena);
  optimizer.reset(Stream::cpu());
  constexpr int steps = 20;
  constexpr double rate = 1e-4;  // of a constant gradient: what every step subtracts
  for (int step = 0; step < steps; ++step) optimizer.apply({Stream::cpu(), workspace}, 1.0, rate);
  double mean = 0;
  for (std::int64_t i = 0; i < n; ++i) mean += value_at(p.value, i) / static_cast<double>(n);
  // Each of n x steps roundings has a variance of at most spacing^2 / 4 (spacing 2^-7); five standard deviations. The
  // moments' own roundings change a step by 2^-8 of itself or so.
  const double spread = 5 * 0x1p-7 / 2 * std::sqrt(static_cast<double>(steps) / static_cast<double>(n));
  EXPECT_NEAR(mean, 1.5 - steps * rate, spread + 0.02 * steps * rate);
  EXPECT_LT(spread, 1.5 * steps * rate);  // what moves is more than noise
}

}  // namespace
}  // namespace deltapipe
