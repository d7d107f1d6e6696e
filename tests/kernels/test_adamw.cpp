#include "kernels/adamw.h"

#include "core/parallel.h"
#include "tests/kernels/testing.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

namespace deltapipe {
namespace {

using kernels::AdamWStep;
using kernels::StochasticRounding;
using testing::Owned;

/// The tensors of one optimizer; moments begin at 0.
template <class T>
struct State {
  explicit State(std::int64_t n) : master({n}), gradient({n}), exp_avg({n}), exp_avg_sq({n}) {
    exp_avg.fill(0);
    exp_avg_sq.fill(0);
  }
  void step(const AdamWStep& s, const Tensor& param) {
    kernels::adamw(Stream::cpu(), s, master, gradient, exp_avg, exp_avg_sq, param);
  }
  Owned<T> master, gradient, exp_avg, exp_avg_sq;
};

/// The update written a scalar at a time, in the order of torch.optim.AdamW's documentation.
void reference_step(const AdamWStep& s, double& w, double gradient, double& m, double& v) {
  const double g = s.gradient_scale * gradient;
  w -= s.learning_rate * s.weight_decay * w;
  m = s.beta1 * m + (1 - s.beta1) * g;
  v = s.beta2 * v + (1 - s.beta2) * g * g;
  const double m_hat = m / (1 - std::pow(s.beta1, static_cast<double>(s.step)));
  const double v_hat = v / (1 - std::pow(s.beta2, static_cast<double>(s.step)));
  w -= s.learning_rate * m_hat / (std::sqrt(v_hat) + s.epsilon);
}

const AdamWStep typical = {.learning_rate = 0.01, .beta1 = 0.9, .beta2 = 0.95, .epsilon = 1e-8, .weight_decay = 0.1};

TEST(AdamW, ValuesOfTheDocumentedFormula) {
  // torch.optim.AdamW's documented update in 40 decimal digits: three parameters, three steps.
  const double gradients[3][3] = {{0.1, -2, 0}, {-0.3, 0.5, 0}, {0.2, 1e-6, 0.04}};
  const double expected[3][3] = {{0.98900000099999990, -0.48950000005000000, 1.998},
                                 {0.99290395845786241, -0.48426284078586545, 1.996002},
                                 {0.99172414356850538, -0.48006117440455242, 1.9877737697259013}};
  State<double> s(3);
  s.master[0] = 1;
  s.master[1] = -0.5;
  s.master[2] = 2;
  for (int t = 0; t < 3; ++t) {
    std::copy_n(gradients[t], 3, s.gradient.begin());
    AdamWStep step = typical;
    step.step = t + 1;
    s.step(step, s.master);
    for (int i = 0; i < 3; ++i) EXPECT_NEAR(s.master[i], expected[t][i], 1e-15 * 4) << "step " << t + 1;
  }
}

template <class T>
void expect_reference(double tolerance) {
  RandomStream r(testing::test_seed(), "data");
  for (const std::int64_t n : {std::int64_t{1}, std::int64_t{7}, std::int64_t{16384}, std::int64_t{40001}}) {
    State<T> s(n);
    s.master.normal(r);
    Owned<double> w = s.master.template cast<double>(), m({n}), v({n});
    m.fill(0);
    v.fill(0);
    for (int t = 1; t <= 6; ++t) {
      AdamWStep step = typical;
      step.step = t;
      step.learning_rate = 0.01 / t;
      step.gradient_scale = 0.3;
      s.gradient.normal(r);
      const Owned<T> gradient = s.gradient;
      Owned<T> param({n});
      s.step(step, param);
      for (std::int64_t i = 0; i < n; ++i) {
        reference_step(step, w[i], static_cast<double>(gradient[i]), m[i], v[i]);
        ASSERT_EQ(param[i], s.master[i]);
        ASSERT_EQ(s.gradient[i], gradient[i]);
      }
      for (std::int64_t i = 0; i < n; ++i) {
        ASSERT_NEAR(static_cast<double>(s.master[i]), w[i], tolerance);
        ASSERT_NEAR(static_cast<double>(s.exp_avg[i]), m[i], tolerance);
        ASSERT_NEAR(static_cast<double>(s.exp_avg_sq[i]), v[i], tolerance);
      }
    }
  }
}

// Six steps of two or three roundings each, of values up to 4: half an ulp of 4 is 2.4e-7 in float, 4.4e-16 in double.
TEST(AdamW, MatchesAScalarLoopInDouble) { expect_reference<double>(5e-15); }
TEST(AdamW, MatchesAScalarLoopInFloat) { expect_reference<float>(2e-6); }

TEST(AdamW, DecayIsDecoupled) {
  // Without a gradient only the decay moves a weight, and the moments stay 0.
  State<double> s(5);
  s.master.fill(3);
  s.gradient.fill(0);
  s.step(typical, s.master);
  for (int i = 0; i < 5; ++i) {
    EXPECT_DOUBLE_EQ(s.master[i], 3 * (1 - 0.01 * 0.1));
    EXPECT_EQ(s.exp_avg[i], 0);
    EXPECT_EQ(s.exp_avg_sq[i], 0);
  }
}

TEST(AdamW, EpsilonIsOutsideTheSquareRoot) {
  // First step: m_hat / (sqrt(v_hat) + epsilon) = g / (|g| + epsilon); inside the root it would be g / sqrt(g^2 + eps).
  State<double> s(1);
  s.master[0] = 0;
  s.gradient[0] = 1e-3;
  AdamWStep step = typical;
  step.epsilon = 1e-3;
  s.step(step, s.master);
  EXPECT_NEAR(s.master[0], -0.01 * 0.5, 1e-16);
}

template <class T>
void expect_rounded_copies() {
  RandomStream r(testing::test_seed(), "data");
  const std::int64_t n = 1003;
  State<T> plain(n);
  plain.master.normal(r);
  plain.gradient.normal(r);
  State<T> to_bf16 = plain, to_f32 = plain, to_f64 = plain;
  plain.step(typical, plain.master);  // in place

  Owned<BFloat16> b({n});
  Owned<float> f({n});
  Owned<double> d({n});
  to_bf16.step(typical, b);
  to_f32.step(typical, f);
  to_f64.step(typical, d);
  for (std::int64_t i = 0; i < n; ++i) {
    for (const State<T>* s : {&to_bf16, &to_f32, &to_f64}) ASSERT_EQ(s->master[i], plain.master[i]);
    ASSERT_EQ(b[i].bits, to_bfloat16(static_cast<float>(plain.master[i])).bits);
    ASSERT_EQ(f[i], static_cast<float>(plain.master[i]));
    ASSERT_EQ(d[i], static_cast<double>(plain.master[i]));
  }
}

TEST(AdamW, ParamIsTheRoundedMaster) {
  expect_rounded_copies<float>();
  expect_rounded_copies<double>();
}

TEST(AdamW, BitsDoNotDependOnThreads) {
  const std::int64_t n = 100'003;
  RandomStream r(testing::test_seed(), "data");
  State<float> start(n);
  start.master.normal(r);
  start.gradient.normal(r);
  const int before = num_threads();
  std::vector<State<float>> results;
  for (const int threads : {1, 2}) {
    set_num_threads(threads);
    State<float> s = start;
    for (int t = 1; t <= 2; ++t) {
      AdamWStep step = typical;
      step.step = t;
      s.step(step, s.master);
    }
    results.push_back(s);
  }
  set_num_threads(before);
  EXPECT_EQ(std::memcmp(results[0].master.begin(), results[1].master.begin(), sizeof(float) * n), 0);
  EXPECT_EQ(std::memcmp(results[0].exp_avg.begin(), results[1].exp_avg.begin(), sizeof(float) * n), 0);
  EXPECT_EQ(std::memcmp(results[0].exp_avg_sq.begin(), results[1].exp_avg_sq.begin(), sizeof(float) * n), 0);
  EXPECT_NE(std::memcmp(results[0].master.begin(), start.master.begin(), sizeof(float) * n), 0);
}

/// State of adamw_bfloat16; weights and moments are kept as bits.
struct BitState {
  explicit BitState(std::int64_t n) : weights({n}), exp_avg({n}), exp_avg_sq({n}), gradient({n}) {}
  void fill(float w, float m, float v, float g) {
    weights.fill(to_bfloat16(w));
    exp_avg.fill(to_bfloat16(m));
    exp_avg_sq.fill(to_bfloat16(v));
    gradient.fill(g);
  }
  void step(const AdamWStep& s, const StochasticRounding& rounding) { step(s, rounding, 0, weights.size()); }
  /// Elements [begin, end), as the shard that holds them does it.
  void step(const AdamWStep& s, StochasticRounding rounding, std::int64_t begin, std::int64_t end) {
    rounding.offset += begin;
    const auto part = [&](const Tensor& t) { return t.rows(begin, end); };
    kernels::adamw_bfloat16(Stream::cpu(), s, rounding, part(weights), part(gradient), part(exp_avg), part(exp_avg_sq));
  }
  std::vector<std::uint16_t> bits() const {
    std::vector<std::uint16_t> all;
    for (const auto* t : {&weights, &exp_avg, &exp_avg_sq}) {
      for (const BFloat16 x : std::vector<BFloat16>(t->begin(), t->begin() + t->size())) all.push_back(x.bits);
    }
    return all;
  }
  Owned<BFloat16> weights, exp_avg, exp_avg_sq;
  Owned<float> gradient;
};

double mean_of(const Owned<BFloat16>& x) {
  double sum = 0;
  for (std::int64_t i = 0; i < x.size(); ++i) sum += static_cast<double>(to_float(x[i]));
  return sum / static_cast<double>(x.size());
}

BitState random_bits(std::int64_t n) {
  RandomStream r(testing::test_seed(), "data");
  BitState s(n);
  for (std::int64_t i = 0; i < n; ++i) {
    const auto normal = [&] { return static_cast<float>(r.next_normal()); };
    s.weights[i] = to_bfloat16(normal());
    s.exp_avg[i] = to_bfloat16(0.1f * normal());
    const float root = normal();
    s.exp_avg_sq[i] = to_bfloat16(root * root);
    s.gradient[i] = normal();
  }
  return s;
}

TEST(AdamWBFloat16, RoundsToNeighboursWithTheRightMean) {
  const std::int64_t n = 1 << 18;
  RandomStream r(testing::test_seed(), "data");
  for (int trial = 0; trial < 4; ++trial) {
    BitState s(n);
    const auto number = [&](double scale) {
      return to_float(to_bfloat16(static_cast<float>(scale * r.next_normal())));
    };
    const float w = number(1), m = number(0.1), v = std::abs(number(0.3)), g = number(0.5);
    s.fill(w, m, v, g);
    AdamWStep step = typical;
    step.step = 3 + trial;
    s.step(step, {.seed = 5, .stream = stream_of("weight")});

    State<float> single(1);
    single.master[0] = w;
    single.exp_avg[0] = m;
    single.exp_avg_sq[0] = v;
    single.gradient[0] = g;
    single.step(step, single.master);
    const auto check = [&](const Owned<BFloat16>& rounded, float exact, const char* what) {
      const auto low = std::bit_cast<float>(std::bit_cast<std::uint32_t>(exact) & 0xffff0000u);
      const auto high = std::bit_cast<float>((std::bit_cast<std::uint32_t>(exact) & 0xffff0000u) + 0x10000u);
      const double spacing = std::abs(static_cast<double>(high) - static_cast<double>(low));
      for (std::int64_t i = 0; i < n; ++i) {
        const float x = to_float(rounded[i]);
        ASSERT_TRUE(x == low || x == high) << what << ": " << x << " for " << exact;
      }
      const double p = (static_cast<double>(exact) - static_cast<double>(low)) /
                       (static_cast<double>(high) - static_cast<double>(low));
      // Five standard deviations of a mean of n, and the last bits of a float in which one fused product may differ.
      EXPECT_NEAR(mean_of(rounded), static_cast<double>(exact),
                  spacing * (5 * std::sqrt(p * (1 - p) / static_cast<double>(n)) + 0x1p-13))
          << what;
    };
    check(s.weights, single.master[0], "weights");
    check(s.exp_avg, single.exp_avg[0], "exp_avg");
    check(s.exp_avg_sq, single.exp_avg_sq[0], "exp_avg_sq");
  }
}

TEST(AdamWBFloat16, StepsBelowHalfASpacingMoveTheMean) {
  // A step of learning rate 1e-4 at weight 1, below which bfloat16 are 2^-8 apart: nearest would never move.
  const std::int64_t n = 1 << 14;
  BitState s(n);
  s.fill(1, 0, 0, 0.25f);
  AdamWStep step = typical;
  step.learning_rate = 1e-4;
  step.weight_decay = 0;
  ASSERT_EQ(to_bfloat16(1 - 1e-4f).bits, to_bfloat16(1).bits);
  const int steps = 200;
  for (int t = 1; t <= steps; ++t) {
    step.step = t;
    s.step(step, {.seed = 11, .stream = stream_of("weight")});
  }
  // A constant gradient moves a weight by the learning rate a step. The mean of n walks of `steps` steps, each with a
  // variance below 1e-4 2^-8 = (6.3e-4)^2, strays by 7e-5 (one standard deviation); moments that are rounded too change
  // the ratio of mean and root by some 2^-8.
  EXPECT_NEAR(mean_of(s.weights), 1 - 1e-4 * steps, 5 * 6.3e-4 * std::sqrt(steps / static_cast<double>(n)) + 1e-4);
}

TEST(AdamWBFloat16, BitsDoNotDependOnShardsOrThreads) {
  const std::int64_t n = 40'003;
  const BitState start = random_bits(n);
  const StochasticRounding rounding{.seed = 3, .stream = stream_of("weight"), .offset = 7};
  BitState whole = start;
  whole.step(typical, rounding);
  EXPECT_NE(whole.bits(), start.bits());
  BitState shards = start;
  for (const auto& [begin, end] : {std::pair{0, 1}, {1, 4}, {4, 20'001}, {20'001, 20'001}, {20'001, 40'003}}) {
    shards.step(typical, rounding, begin, end);
  }
  EXPECT_EQ(shards.bits(), whole.bits());
  const int before = num_threads();
  for (const int threads : {1, 2}) {
    set_num_threads(threads);
    BitState s = start;
    s.step(typical, rounding);
    EXPECT_EQ(s.bits(), whole.bits());
  }
  set_num_threads(before);
}

TEST(AdamWBFloat16, BitsDependOnSeedStreamStepAndElement) {
  const std::int64_t n = 1 << 12;
  BitState start(n);
  start.fill(1.0f, 0.5f, 0.25f, 0.3f);
  const auto after = [&](std::uint64_t seed, std::uint64_t stream, std::int64_t t, std::int64_t offset) {
    AdamWStep step = typical;
    step.step = t;
    step.beta1 = 0.9375;  // the bias corrections depend on the step: m and v do not
    BitState s = start;
    s.step(step, {.seed = seed, .stream = stream, .offset = offset});
    return s;
  };
  const BitState first = after(1, 2, 3, 0);
  EXPECT_EQ(after(1, 2, 3, 0).bits(), first.bits());
  for (const BitState& other : {after(2, 2, 3, 0), after(1, 3, 3, 0), after(1, 2, 4, 0), after(1, 2, 3, n)}) {
    // Independent roundings up with probability p agree with probability p^2 + (1 - p)^2 <= 0.99 for p in [0.006,
    // 0.994], so that 4096 of them agree everywhere with probability below 1e-17.
    for (const auto& [a, b] : {std::pair{&first.exp_avg, &other.exp_avg}, {&first.exp_avg_sq, &other.exp_avg_sq}}) {
      EXPECT_NE(std::memcmp(a->begin(), b->begin(), sizeof(BFloat16) * n), 0);
    }
  }
}

TEST(AdamWBFloat16, RoundingsOfAnElementAreIndependent) {
  // Among the elements of one update whose values are all alike, those with the weight rounded one way have their
  // moments rounded as often one way as all have; so for neighbours.
  const std::int64_t n = 1 << 16;
  BitState s(n);
  s.fill(1.0f, 0.1f, 0.013f, 0.3f);
  s.step(typical, {.seed = 17, .stream = stream_of("weight")});
  const auto ups = [&](const Owned<BFloat16>& x, std::int64_t shift) {
    std::uint16_t low = 0xffff;
    for (std::int64_t i = 0; i < n; ++i) low = std::min(low, x[i].bits);
    std::vector<double> up;
    for (std::int64_t i = 0; i < n; ++i) up.push_back(x[(i + shift) % n].bits > low ? 1.0 : 0.0);
    return up;
  };
  const auto correlation = [&](const std::vector<double>& a, const std::vector<double>& b) {
    double sa = 0, sb = 0, sab = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
      sa += a[i];
      sb += b[i];
      sab += a[i] * b[i];
    }
    const double pa = sa / static_cast<double>(n), pb = sb / static_cast<double>(n);
    EXPECT_GT(pa * (1 - pa) * pb * (1 - pb), 1e-3) << "the values are not between two bfloat16";
    return (sab / static_cast<double>(n) - pa * pb) / std::sqrt(pa * (1 - pa) * pb * (1 - pb));
  };
  const double bound = 5 / std::sqrt(static_cast<double>(n));  // five standard deviations
  const auto w = ups(s.weights, 0), m = ups(s.exp_avg, 0), v = ups(s.exp_avg_sq, 0);
  EXPECT_LT(std::abs(correlation(w, m)), bound);
  EXPECT_LT(std::abs(correlation(w, v)), bound);
  EXPECT_LT(std::abs(correlation(m, v)), bound);
  for (const std::int64_t shift : {1, 2}) {
    EXPECT_LT(std::abs(correlation(w, ups(s.weights, shift))), bound);
    EXPECT_LT(std::abs(correlation(w, ups(s.exp_avg, shift))), bound);
    EXPECT_LT(std::abs(correlation(m, ups(s.exp_avg_sq, shift))), bound);
  }
}

TEST(AdamWBFloat16, WhatABFloat16HoldsStays) {
  const float infinity = std::numeric_limits<float>::infinity();
  const float values[] = {0.0f, -0.0f, 1.0f, -3.140625f, 0x1p-130f, infinity, -infinity, std::nanf("")};
  AdamWStep still = typical;  // no gradient, moments 0, no decay: nothing moves
  still.weight_decay = 0;
  BitState s(std::size(values) * 64);
  s.fill(0, 0, 0, 0);
  for (std::int64_t i = 0; i < s.weights.size(); ++i) s.weights[i] = to_bfloat16(values[i / 64]);
  s.step(still, {.seed = 1});
  for (std::int64_t i = 0; i < s.weights.size(); ++i) {
    const float expected = values[i / 64], w = to_float(s.weights[i]);
    EXPECT_TRUE(std::isnan(expected) ? std::isnan(w) : w == expected) << w << " for " << expected;
    EXPECT_EQ(to_float(s.exp_avg[i]), 0.0f);
    EXPECT_EQ(to_float(s.exp_avg_sq[i]), 0.0f);
  }
}

TEST(AdamWBFloat16, BrokenContractsThrow) {
  BitState s(4);
  s.fill(1, 0, 0, 1);
  Owned<float> wide({4});
  const auto run = [&](const AdamWStep& step, const StochasticRounding& rounding, const Tensor& weights,
                       const Tensor& gradient) {
    kernels::adamw_bfloat16(Stream::cpu(), step, rounding, weights, gradient, s.exp_avg, s.exp_avg_sq);
  };
  EXPECT_NO_THROW(run(typical, {}, s.weights, s.gradient));
  EXPECT_THROW(run(typical, {}, wide, s.gradient), InternalError);
  EXPECT_THROW(run(typical, {}, s.weights, s.weights), InternalError);
  EXPECT_THROW(run(typical, {}, s.weights, s.gradient.tensor().rows(0, 3)), InternalError);
  EXPECT_THROW(run(typical, {.offset = -1}, s.weights, s.gradient), InternalError);
  AdamWStep step = typical;
  step.step = 0;
  EXPECT_THROW(run(step, {}, s.weights, s.gradient), InternalError);
}

TEST(AdamW, BrokenContractsThrow) {
  State<float> s(4);
  s.master.fill(1);
  s.gradient.fill(1);
  Owned<float> short_one({3});
  Owned<double> wide({4});
  Owned<std::int32_t> integers({4});
  const auto run = [&](const AdamWStep& step, const Tensor& gradient, const Tensor& param) {
    kernels::adamw(Stream::cpu(), step, s.master, gradient, s.exp_avg, s.exp_avg_sq, param);
  };
  EXPECT_NO_THROW(run(typical, s.gradient, s.master));
  EXPECT_THROW(run(typical, short_one, s.master), InternalError);
  EXPECT_THROW(run(typical, wide, s.master), InternalError);
  EXPECT_THROW(run(typical, s.gradient, short_one), InternalError);
  EXPECT_THROW(run(typical, s.gradient, integers), InternalError);
  EXPECT_THROW(run(typical, s.gradient, Tensor(s.master.begin(), DType::bf16, {4})), InternalError);
  AdamWStep step = typical;
  step.step = 0;
  EXPECT_THROW(run(step, s.gradient, s.master), InternalError);
  step = typical;
  step.beta2 = 1;
  EXPECT_THROW(run(step, s.gradient, s.master), InternalError);
}

}  // namespace
}  // namespace deltapipe
