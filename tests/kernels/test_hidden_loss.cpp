#include "kernels/hidden_loss.h"

#include "core/parallel.h"
#include "tests/kernels/testing.h"

#include <cstring>

namespace deltapipe {
namespace {

using testing::Owned;
using Sums = Owned<double>;

Sums zero_sums() {
  Sums sums({2});
  sums.fill(0);
  return sums;
}

/// Every third row masked, beginning with the second.
Owned<std::int32_t> some_labels(std::int64_t m) {
  Owned<std::int32_t> labels({m});
  for (std::int64_t i = 0; i < m; ++i) labels[i] = i % 3 == 1 ? -1 : 7;
  return labels;
}

template <class T>
Sums evaluate(const Owned<T>& student, const Owned<T>& teacher, const Owned<std::int32_t>& labels) {
  Sums sums = zero_sums();
  kernels::hidden_loss(Stream::cpu(), student, teacher, labels, 1.0, 1.0, Tensor(), sums, testing::no_workspace());
  return sums;
}

template <class T>
Owned<T> gradient_of(const Owned<T>& student, const Owned<T>& teacher, const Owned<std::int32_t>& labels,
                     double cosine_scale, double mse_scale) {
  Owned<T> g(student.shape());
  g.fill(0);
  Sums sums = zero_sums();
  kernels::hidden_loss(Stream::cpu(), student, teacher, labels, cosine_scale, mse_scale, g, sums,
                       testing::no_workspace());
  return g;
}

template <class T>
Sums reference(const Owned<T>& student, const Owned<T>& teacher, const Owned<std::int32_t>& labels) {
  const std::int64_t d = student.shape()[1];
  Sums sums = zero_sums();
  for (std::int64_t r = 0; r < student.shape()[0]; ++r) {
    if (labels[r] < 0) continue;
    double st = 0, ss = 0, tt = 0, mse = 0;
    for (std::int64_t i = r * d; i < (r + 1) * d; ++i) {
      const auto s = static_cast<double>(student[i]), t = static_cast<double>(teacher[i]);
      st += s * t;
      ss += s * s;
      tt += t * t;
      mse += (s - t) * (s - t) / static_cast<double>(d);
    }
    sums[0] += 1 - st / (std::max(std::sqrt(ss), 1e-8) * std::max(std::sqrt(tt), 1e-8));
    sums[1] += mse;
  }
  return sums;
}

TEST(HiddenLoss, KnownValues) {
  Owned<double> s({1, 2}), t({1, 2});
  s[0] = t[1] = 3;
  s[1] = t[0] = 4;
  const auto labels = some_labels(1);
  const Sums sums = evaluate(s, t, labels);
  EXPECT_NEAR(sums[0], 1.0 / 25, 1e-15);  // cos = 24 / 25
  EXPECT_NEAR(sums[1], 1.0, 1e-15);
  const auto g = gradient_of(s, t, labels, 1.0, 0.0);
  EXPECT_NEAR(g[0], 0.96 * 3 / 25 - 4.0 / 25, 1e-15);
  EXPECT_NEAR(g[1], 0.96 * 4 / 25 - 3.0 / 25, 1e-15);
  const auto h = gradient_of(s, t, labels, 0.0, 5.0);
  EXPECT_NEAR(h[0], -5, 1e-14);
  EXPECT_NEAR(h[1], 5, 1e-14);
}

TEST(HiddenLoss, ValuesMatchDefinition) {
  RandomStream r(testing::test_seed(), "data");
  for (const auto& [m, d] : {std::pair{1, 1}, {3, 7}, {65, 130}, {4, 2561}}) {
    Owned<float> s({m, d}), t({m, d});
    s.normal(r);
    t.normal(r, 2.0, 0.5);
    const auto labels = some_labels(m);
    const Sums sums = evaluate(s, t, labels), expected = reference(s, t, labels);
    // Sums are in double even for float rows.
    for (int k = 0; k < 2; ++k) EXPECT_NEAR(sums[k], expected[k], 1e-12 * (1 + expected[k])) << m << " x " << d;
  }
}

TEST(HiddenLoss, GradientsMatchFiniteDifferences) {
  RandomStream r(testing::test_seed(), "data");
  for (const auto& [m, d] : {std::pair{4, 2}, {5, 9}, {2, 131}}) {
    for (const auto& [cosine, mse] : {std::pair{0.6, 0.0}, {0.0, 1.7}, {0.6, 1.7}}) {
      Owned<double> s({m, d}), t({m, d});
      s.normal(r);
      t.normal(r);
      const auto labels = some_labels(m);
      const auto g = gradient_of(s, t, labels, cosine, mse);
      const auto loss = [&, a = cosine, b = mse] {
        const Sums sums = evaluate(s, t, labels);
        return a * sums[0] + b * sums[1];
      };
      testing::expect_gradient(s, g, loss, "student " + std::to_string(d));
    }
  }
}

TEST(HiddenLoss, FloatGradientMatchesDouble) {
  RandomStream r(testing::test_seed(), "data");
  for (const double noise : {1.0, 1e-3}) {  // far from and close to the teacher
    Owned<float> s({5, 2560}), t({5, 2560});
    t.normal(r);
    for (std::int64_t i = 0; i < s.size(); ++i) s[i] = t[i] + static_cast<float>(noise * r.next_normal());
    const auto labels = some_labels(5);
    for (const auto& [cosine, mse] : {std::pair{1.0, 0.0}, {0.0, 1.0}, {0.5, 2.0}}) {
      const auto exact = gradient_of(s.cast<double>(), t.cast<double>(), labels, cosine, mse);
      // A few float operations an element; s - t of close floats is exact.
      EXPECT_LT(testing::relative_rms(gradient_of(s, t, labels, cosine, mse), exact), 5e-7) << noise;
    }
    const Sums sums = evaluate(s, t, labels), expected = reference(s, t, labels);
    EXPECT_NEAR(sums[0], expected[0], 1e-13);  // sums of 2560 terms of cos near 1, four rows: sqrt(n) eps each
  }
}

TEST(HiddenLoss, EqualStatesGiveNothing) {
  RandomStream r(testing::test_seed(), "data");
  Owned<double> s({3, 77});
  s.normal(r);
  const auto labels = some_labels(3);
  const Sums sums = evaluate(s, Owned<double>(s), labels);
  EXPECT_NEAR(sums[0], 0, 1e-15);  // the product of two square roots rounds
  EXPECT_EQ(sums[1], 0);
  for (const double g : gradient_of(s, Owned<double>(s), labels, 1.0, 1.0)) EXPECT_NEAR(g, 0, 1e-16);
}

TEST(HiddenLoss, TinyNormsAreClamped) {
  // |s| = 5e-10 is taken as 1e-8 and held constant: cos = s . t / (1e-8 |t|), d(1 - cos)/ds = -t / (1e-8 |t|).
  Owned<double> s({2, 2}), t({2, 2});
  s[0] = 3e-10;
  s[1] = 4e-10;
  s[2] = s[3] = 0;  // and a zero row
  t[0] = t[2] = 2;
  t[1] = t[3] = 0;
  Owned<std::int32_t> labels({2});
  labels.fill(0);
  EXPECT_NEAR(evaluate(s, t, labels)[0], (1 - 0.03) + 1, 1e-14);
  const auto g = gradient_of(s, t, labels, 1.0, 0.0);
  for (const int i : {0, 2}) {
    EXPECT_NEAR(g[i], -1e8, 1e-6);
    EXPECT_NEAR(g[i + 1], 0, 1e-6);
  }
  // a zero teacher: cos = 0, nothing to follow
  t.fill(0);
  s.fill(1);
  EXPECT_EQ(evaluate(s, t, labels)[0], 2);
  for (const double x : gradient_of(s, t, labels, 1.0, 0.0)) EXPECT_NEAR(x, 0, 1e-7);  // 1e8 (s - s) rounds
}

TEST(HiddenLoss, AddsAndSkipsMaskedRows) {
  RandomStream r(testing::test_seed(), "data");
  const int m = 7, d = 11;
  Owned<float> s({m, d}), t({m, d}), g({m, d});
  s.normal(r);
  t.normal(r);
  const auto labels = some_labels(m);
  const auto alone = gradient_of(s, t, labels, 0.5, 2.0);
  const Sums expected = evaluate(s, t, labels);
  for (int i = 0; i < d; ++i) s[d + i] = std::numeric_limits<float>::quiet_NaN();  // row 1 is masked
  g.fill(8);
  Sums sums({2});
  sums.fill(100);
  kernels::hidden_loss(Stream::cpu(), s, t, labels, 0.5, 2.0, g, sums, testing::no_workspace());
  for (int i = 0; i < m * d; ++i) {
    if (labels[i / d] < 0) {
      EXPECT_EQ(g[i], 8.0f);
    } else {
      EXPECT_NEAR(g[i], 8 + alone[i], 1e-6);  // one rounding at 8
    }
  }
  for (int k = 0; k < 2; ++k) EXPECT_NEAR(sums[k], 100 + expected[k], 1e-12);
}

TEST(HiddenLoss, BitsDoNotDependOnThreads) {
  RandomStream r(testing::test_seed(), "data");
  const int m = 400, d = 257;
  Owned<float> s({m, d}), t({m, d});
  s.normal(r);
  t.normal(r);
  const auto labels = some_labels(m);
  const int before = num_threads();
  std::vector<Owned<float>> gradients;
  std::vector<Sums> sums;
  for (const int threads : {1, 2}) {
    set_num_threads(threads);
    gradients.push_back(gradient_of(s, t, labels, 0.5, 2.0));
    sums.push_back(evaluate(s, t, labels));
  }
  set_num_threads(before);
  EXPECT_EQ(std::memcmp(gradients[0].begin(), gradients[1].begin(), sizeof(float) * m * d), 0);
  EXPECT_EQ(std::memcmp(sums[0].begin(), sums[1].begin(), sizeof(double) * 2), 0);
  const Sums expected = reference(s, t, labels);
  for (int k = 0; k < 2; ++k) EXPECT_NEAR(sums[0][k], expected[k], 1e-12 * expected[k]);
}

TEST(HiddenLoss, BrokenContractsThrow) {
  Owned<float> s({2, 3}), t({2, 3}), narrow({2, 2});
  Owned<double> wide({2, 3});
  s.fill(1);
  t.fill(2);
  Owned<std::int32_t> labels({2}), long_labels({3});
  labels.fill(0);
  Sums sums = zero_sums();
  const auto run = [&](const Tensor& teacher, const Tensor& l, const Tensor& g, const Tensor& u) {
    kernels::hidden_loss(Stream::cpu(), s, teacher, l, 1.0, 1.0, g, u, testing::no_workspace());
  };
  EXPECT_NO_THROW(run(t, labels, Tensor(), sums));
  EXPECT_THROW(run(narrow, labels, Tensor(), sums), InternalError);
  EXPECT_THROW(run(wide, labels, Tensor(), sums), InternalError);
  EXPECT_THROW(run(t, long_labels, Tensor(), sums), InternalError);
  EXPECT_THROW(run(t, labels, wide, sums), InternalError);
  EXPECT_THROW(run(t, labels, narrow, sums), InternalError);
  EXPECT_THROW(run(t, labels, Tensor(), wide), InternalError);
}

}  // namespace
}  // namespace deltapipe
