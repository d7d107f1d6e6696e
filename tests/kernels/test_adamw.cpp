#include "kernels/adamw.h"

#include "core/parallel.h"
#include "tests/kernels/testing.h"

#include <cstring>

namespace deltapipe {
namespace {

using kernels::AdamWStep;
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
