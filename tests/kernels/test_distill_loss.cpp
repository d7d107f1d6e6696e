#include "kernels/distill_loss.h"

#include "core/parallel.h"
#include "tests/kernels/testing.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <span>

namespace deltapipe {
namespace {

using kernels::DistillWeights;
using kernels::LossSum;
using testing::Owned;
using Sums = Owned<double>;

const std::vector<std::pair<int, DistillWeights>> each_alone = {{LossSum::ce, {.ce = 1}},
                                                                {LossSum::kl, {.kl = 1}},
                                                                {LossSum::reverse_kl, {.reverse_kl = 1}},
                                                                {LossSum::jsd, {.jsd = 1}},
                                                                {LossSum::tvd, {.tvd = 1}}};

DistillWeights all_weights(float temperature, float beta = 0.5f) {
  return {.ce = 0.2f,
          .kl = 0.5f,
          .reverse_kl = 0.3f,
          .jsd = 0.7f,
          .tvd = 1.1f,
          .temperature = temperature,
          .jsd_beta = beta};
}

Sums zero_sums() {
  Sums sums({LossSum::count});
  sums.fill(0);
  return sums;
}

double weighted(const DistillWeights& w, const Sums& s) {
  return static_cast<double>(w.ce) * s[LossSum::ce] + static_cast<double>(w.kl) * s[LossSum::kl] +
         static_cast<double>(w.reverse_kl) * s[LossSum::reverse_kl] + static_cast<double>(w.jsd) * s[LossSum::jsd] +
         static_cast<double>(w.tvd) * s[LossSum::tvd];
}

template <class T>
Sums evaluate(const DistillWeights& w, const Owned<T>& student, const Owned<T>& teacher,
              const Owned<std::int32_t>& labels) {
  Sums sums = zero_sums();
  kernels::distill_loss(Stream::cpu(), w, student, teacher, labels, 1.0, false, sums, testing::no_workspace());
  return sums;
}

/// Logits replaced by their gradient.
template <class T>
Owned<T> gradient_of(const DistillWeights& w, const Owned<T>& student, const Owned<T>& teacher,
                     const Owned<std::int32_t>& labels, double scale = 1.0) {
  Owned<T> g = student;
  Sums sums = zero_sums();
  kernels::distill_loss(Stream::cpu(), w, g, teacher, labels, scale, true, sums, testing::no_workspace());
  return g;
}

/// Labels in [0, n), every fifth row from the third on masked.
Owned<std::int32_t> some_labels(RandomStream& r, std::int64_t m, std::int64_t n) {
  Owned<std::int32_t> labels({m});
  for (std::int64_t i = 0; i < m; ++i) {
    labels[i] = i % 5 == 2 ? -1 : static_cast<std::int32_t>(r.next_below(static_cast<std::uint64_t>(n)));
  }
  return labels;
}

template <class T>
std::vector<double> log_softmax(const T* z, std::int64_t n, double temperature) {
  const double largest = static_cast<double>(*std::max_element(z, z + n));
  double sum = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += std::exp((static_cast<double>(z[i]) - largest) / temperature);
  std::vector<double> out;
  for (std::int64_t i = 0; i < n; ++i) {
    out.push_back((static_cast<double>(z[i]) - largest) / temperature - std::log(sum));
  }
  return out;
}

double kl_of(const std::vector<double>& log_p, const std::vector<double>& log_q) {
  double sum = 0;
  for (std::size_t i = 0; i < log_p.size(); ++i) sum += std::exp(log_p[i]) * (log_p[i] - log_q[i]);
  return sum;
}

/// All sums by their definitions in plain double.
template <class T>
Sums reference(const DistillWeights& w, const Owned<T>& student, const Owned<T>& teacher,
               const Owned<std::int32_t>& labels) {
  const std::int64_t n = student.shape()[1];
  const double t = w.temperature, beta = w.jsd_beta;
  Sums sums = zero_sums();
  for (std::int64_t r = 0; r < student.shape()[0]; ++r) {
    if (labels[r] < 0) continue;
    const T *zs = student.begin() + r * n, *zt = teacher.begin() + r * n;
    const auto log_p = log_softmax(zt, n, t), log_q = log_softmax(zs, n, t);
    std::vector<double> log_m;
    double tvd = 0;
    for (std::size_t i = 0; i < log_p.size(); ++i) {
      // log of the mixture without underflow
      const double top = std::max(log_p[i], log_q[i]);
      log_m.push_back(top + std::log(beta * std::exp(log_p[i] - top) + (1 - beta) * std::exp(log_q[i] - top)));
      tvd += 0.5 * std::abs(std::exp(log_p[i]) - std::exp(log_q[i]));
    }
    const auto label = static_cast<std::size_t>(labels[r]);
    const auto best_s = std::max_element(zs, zs + n) - zs, best_t = std::max_element(zt, zt + n) - zt;
    sums[LossSum::ce] -= log_softmax(zs, n, 1.0)[label];
    sums[LossSum::teacher_ce] -= log_softmax(zt, n, 1.0)[label];
    sums[LossSum::kl] += t * t * kl_of(log_p, log_q);
    sums[LossSum::reverse_kl] += t * t * kl_of(log_q, log_p);
    sums[LossSum::jsd] += t * t * (beta * kl_of(log_p, log_m) + (1 - beta) * kl_of(log_q, log_m));
    sums[LossSum::tvd] += tvd;
    sums[LossSum::top1_agree] += best_s == best_t;
    sums[LossSum::student_correct] += best_s == labels[r];
    sums[LossSum::teacher_correct] += best_t == labels[r];
    sums[LossSum::tokens] += 1;
  }
  return sums;
}

void expect_sums(const Sums& sums, const Sums& expected, double tolerance, const std::string& what) {
  for (int k = 0; k < LossSum::count; ++k) {
    EXPECT_NEAR(sums[k], expected[k], tolerance * (1 + std::abs(expected[k]))) << what << " sum " << k;
  }
}

template <class T>
void expect_values(double tolerance) {
  RandomStream r(testing::test_seed(), "data");
  for (const auto& [m, n] : {std::pair{1, 1}, {3, 2}, {67, 33}, {7, 258}, {5, 5001}, {2, 511}, {2, 513}}) {
    for (const float temperature : {1.0f, 2.0f, 0.7f}) {
      for (const float beta : {0.5f, 0.1f}) {
        Owned<T> student({m, n}), teacher({m, n});
        student.normal(r, 2.0, 5.0);
        teacher.normal(r, 2.0, -3.0);
        const auto labels = some_labels(r, m, n);
        const DistillWeights w = all_weights(temperature, beta);
        expect_sums(evaluate(w, student, teacher, labels), reference(w, student, teacher, labels), tolerance,
                    std::to_string(m) + " x " + std::to_string(n));
      }
    }
  }
}

// Sums of n terms in double, relative to values of order 1: n eps at worst.
TEST(DistillLoss, ValuesMatchDefinitionsInDouble) { expect_values<double>(1e-12); }
// Each term and each tile's sum is good to a few float eps (6e-8); errors of many terms average out.
TEST(DistillLoss, ValuesMatchDefinitionsInFloat) { expect_values<float>(2e-6); }

TEST(DistillLoss, KnownValuesOfTwoClasses) {
  // p = (3/4, 1/4), q = (1/2, 1/2) at temperature 2; softmax(z_t) = (9/10, 1/10) at temperature 1.
  Owned<double> student({1, 2}), teacher({1, 2});
  student.fill(7);
  teacher[0] = 2 * std::log(3.0) - 4;
  teacher[1] = -4;
  Owned<std::int32_t> labels({1});
  labels[0] = 1;
  const Sums s = evaluate(all_weights(2.0f), student, teacher, labels);
  const double m0 = 0.625, m1 = 0.375;
  EXPECT_NEAR(s[LossSum::ce], std::log(2.0), 1e-14);
  EXPECT_NEAR(s[LossSum::teacher_ce], std::log(10.0), 1e-14);
  EXPECT_NEAR(s[LossSum::kl], 4 * (0.75 * std::log(1.5) + 0.25 * std::log(0.5)), 1e-14);
  EXPECT_NEAR(s[LossSum::reverse_kl], 4 * (0.5 * std::log(0.5 / 0.75) + 0.5 * std::log(2.0)), 1e-14);
  EXPECT_NEAR(s[LossSum::jsd],
              4 * (0.5 * (0.75 * std::log(0.75 / m0) + 0.25 * std::log(0.25 / m1)) +
                   0.5 * (0.5 * std::log(0.5 / m0) + 0.5 * std::log(0.5 / m1))),
              1e-14);
  EXPECT_NEAR(s[LossSum::tvd], 0.25, 1e-14);
  // T (q - p) for kl, softmax - 1 at the label for ce
  const auto kl = gradient_of({.kl = 1, .temperature = 2}, student, teacher, labels);
  EXPECT_NEAR(kl[0], 2 * (0.5 - 0.75), 1e-14);
  EXPECT_NEAR(kl[1], 2 * (0.5 - 0.25), 1e-14);
  const auto ce = gradient_of({.ce = 1, .temperature = 2}, student, teacher, labels);
  EXPECT_NEAR(ce[0], 0.5, 1e-14);
  EXPECT_NEAR(ce[1], -0.5, 1e-14);
}

TEST(DistillLoss, GradientsMatchFiniteDifferences) {
  RandomStream r(testing::test_seed(), "data");
  std::vector<DistillWeights> mixes = {all_weights(1.0f, 0.2f), {.ce = 0.2f, .kl = 0.2f}};
  for (const auto& [k, w] : each_alone) mixes.push_back(w);
  for (const auto& [m, n] : {std::pair{4, 1}, {4, 2}, {4, 19}, {3, 258}, {1, 5001}}) {
    for (const float temperature : {1.0f, 2.0f, 0.7f}) {
      if (n > 1000 && temperature != 2.0f) continue;  // one temperature is enough for many tiles
      for (std::size_t k = 0; k < mixes.size(); ++k) {
        DistillWeights w = mixes[k];
        w.temperature = temperature;
        Owned<double> student({m, n}), teacher({m, n});
        student.normal(r, 1.5);
        teacher.normal(r, 1.5);
        const auto labels = some_labels(r, m, n);
        const double scale = 0.37;
        const auto gradient = gradient_of(w, student, teacher, labels, scale);
        const auto loss = [&] { return scale * weighted(w, evaluate(w, student, teacher, labels)); };
        // Gradients of 5001 classes are near 1e-4, values near 10: h = 1e-4 keeps rounding at 1e-11 / 1e-4 = 1e-7 and
        // truncation at 1e-8.
        testing::expect_gradient(student, gradient, loss,
                                 "mix " + std::to_string(k) + ", " + std::to_string(n) + " classes, temperature " +
                                     std::to_string(temperature),
                                 1e-6, 1e-4, 24);
      }
    }
  }
}

TEST(DistillLoss, FloatMatchesDouble) {
  RandomStream r(testing::test_seed(), "data");
  std::vector<DistillWeights> mixes = {all_weights(1.0f)};
  for (const auto& [k, w] : each_alone) mixes.push_back(w);
  for (const auto& [m, n] : {std::pair{5, 2}, {9, 258}, {3, 5001}, {1, 128004}}) {
    for (DistillWeights w : mixes) {
      w.temperature = 2.0f;
      Owned<float> student({m, n}), teacher({m, n});
      student.normal(r, 3.0);
      teacher.normal(r, 3.0);
      const auto labels = some_labels(r, m, n);
      const auto exact = gradient_of(w, student.cast<double>(), teacher.cast<double>(), labels);
      // exp and the normalisers are good to about 3e-7 each; at this noise tvd has no sign near enough to 0 to turn.
      EXPECT_LT(testing::relative_rms(gradient_of(w, student, teacher, labels), exact), 2e-6) << n;
      expect_sums(evaluate(w, student, teacher, labels),
                  evaluate(w, student.cast<double>(), teacher.cast<double>(), labels), 2e-6, std::to_string(n));
    }
  }
}

template <class T>
void expect_nothing_to_learn() {
  RandomStream r(testing::test_seed(), "data");
  for (const int n : {1, 2, 258, 5001}) {
    for (const float temperature : {1.0f, 2.0f, 0.7f}) {
      Owned<T> student({4, n});
      student.normal(r, 10.0);
      const auto labels = some_labels(r, 4, n);
      DistillWeights w = all_weights(temperature, 0.3f);
      w.ce = 0;
      const Sums s = evaluate(w, student, student, labels);
      for (const int k : {LossSum::kl, LossSum::reverse_kl, LossSum::jsd, LossSum::tvd}) EXPECT_EQ(s[k], 0.0) << k;
      EXPECT_EQ(s[LossSum::top1_agree], 3.0);
      EXPECT_EQ(s[LossSum::ce], s[LossSum::teacher_ce]);
      for (const T g : gradient_of(w, student, Owned<T>(student), labels)) ASSERT_EQ(g, T(0));
    }
  }
}

TEST(DistillLoss, EqualLogitsGiveExactZeros) {
  expect_nothing_to_learn<float>();
  expect_nothing_to_learn<double>();
}

TEST(DistillLoss, AConstantShiftChangesNothing) {
  RandomStream r(testing::test_seed(), "data");
  Owned<double> student({3, 258});
  student.normal(r);
  Owned<double> teacher = student;
  for (double& z : teacher) z += 1000;
  const auto labels = some_labels(r, 3, 258);
  const Sums s = evaluate(all_weights(2.0f), student, teacher, labels);
  // The shift itself rounds each logit by up to 6e-14 (half an ulp of 1000).
  for (const int k : {LossSum::kl, LossSum::reverse_kl, LossSum::jsd, LossSum::tvd}) EXPECT_NEAR(s[k], 0, 1e-12);
}

TEST(DistillLoss, DivergencesOfCloseDistributionsKeepTheirDigits) {
  RandomStream r(testing::test_seed(), "data");
  Owned<float> student({8, 5001});
  student.normal(r);
  Owned<float> teacher = student;
  for (float& z : teacher) z += static_cast<float>(1e-3 * r.next_normal());
  const auto labels = some_labels(r, 8, 5001);
  const DistillWeights w = all_weights(1.0f);
  const Sums s = evaluate(w, student, teacher, labels), expected = reference(w, student, teacher, labels);
  for (const int k : {LossSum::kl, LossSum::reverse_kl, LossSum::jsd, LossSum::tvd}) {
    EXPECT_LT(expected[k], 1e-2) << k;
    // Logits differ by 1e-3, known to 1e-7: 1e-4 relative in each difference, less in a mean of thousands. The plain
    // sum of p log(p / q), at rounding errors of about 1e-7 of its 4e-6, fails this.
    EXPECT_NEAR(s[k], expected[k], 1e-3 * expected[k]) << k;
  }
}

TEST(DistillLoss, DivergencesAreNeverNegative) {
  RandomStream r(testing::test_seed(), "data");
  for (const double noise : {1e-7, 1e-5, 1e-2, 1.0, 30.0}) {
    Owned<float> student({1, 258}), teacher({1, 258});
    Owned<std::int32_t> labels({1});
    labels[0] = 0;
    for (int trial = 0; trial < 20; ++trial) {
      student.normal(r, 3.0);
      for (int i = 0; i < 258; ++i) teacher[i] = student[i] + static_cast<float>(noise * r.next_normal());
      const Sums s = evaluate(all_weights(1.0f), student, teacher, labels);
      EXPECT_GE(s[LossSum::kl], 0) << noise;
      EXPECT_GE(s[LossSum::reverse_kl], 0) << noise;
      EXPECT_GE(s[LossSum::tvd], 0) << noise;
      // jsd's two parts cancel to first order: a few float eps of the distance remain
      EXPECT_GE(s[LossSum::jsd], -1e-6 * std::min(noise, 1.0)) << noise;
    }
  }
}

template <class T>
void expect_extremes(double tolerance) {
  const int rows = 8, n = 258;
  RandomStream r(testing::test_seed(), "data");
  Owned<T> student({rows, n}), teacher({rows, n});
  student.normal(r);
  teacher.normal(r);
  const auto row = [n](Owned<T>& t, int i) { return std::span<T>(t.begin() + i * n, static_cast<std::size_t>(n)); };
  std::ranges::fill(row(student, 0), T(0));  // student equal, teacher one-hot
  std::ranges::fill(row(teacher, 0), T(-1e4));
  row(teacher, 0)[17] = T(1e4);
  for (T& z : row(student, 1)) z = r.next_uniform() < 0.5 ? T(-1e4) : T(1e4);  // many ties at both ends
  for (T& z : row(teacher, 2)) z = r.next_uniform() < 0.5 ? T(-1e4) : T(1e4);
  for (int i = 0; i < n; ++i) {  // both, far apart
    row(student, 3)[i] = i % 3 == 0 ? T(1e4) : T(-1e4);
    row(teacher, 3)[i] = i % 2 == 0 ? T(1e4) : T(-1e4);
  }
  std::ranges::fill(row(student, 4), T(-1e4));  // one-hot at different places
  row(student, 4)[3] = T(1e4);
  std::ranges::fill(row(teacher, 4), T(-1e4));
  row(teacher, 4)[257] = T(1e4);
  std::ranges::fill(row(student, 5), T(1e4));  // equal rows, at either end
  std::ranges::fill(row(teacher, 5), T(-1e4));
  for (T& z : row(student, 6)) z *= T(40);  // a spread around the limits of exp in float
  for (T& z : row(teacher, 7)) z *= T(40);
  Owned<std::int32_t> labels({rows});
  labels.fill(5);
  for (const float temperature : {1.0f, 2.0f, 0.7f}) {
    for (int i = 0; i < rows; ++i) {
      Owned<T> s({1, n}), t({1, n});
      std::ranges::copy(row(student, i), s.begin());
      std::ranges::copy(row(teacher, i), t.begin());
      Owned<std::int32_t> label({1});
      label[0] = labels[i];
      std::vector<DistillWeights> mixes = {all_weights(temperature)};
      for (auto [k, w] : each_alone) {
        w.temperature = temperature;
        mixes.push_back(w);
      }
      expect_sums(evaluate(mixes[0], s, t, label), reference(mixes[0], s, t, label), tolerance,
                  "row " + std::to_string(i));
      for (const DistillWeights& w : mixes) {
        const auto g = gradient_of(w, s, t, label);
        const auto exact = gradient_of(w, s.template cast<double>(), t.template cast<double>(), label);
        double sum = 0, size = 0, error = 0;
        for (int j = 0; j < n; ++j) {
          ASSERT_TRUE(std::isfinite(g[j])) << "row " << i;
          sum += exact[j];
          size += std::abs(exact[j]);
          error += std::abs(static_cast<double>(g[j]) - exact[j]);
        }
        // No loss changes when a constant is added to a row, so its gradient sums to 0.
        EXPECT_NEAR(sum, 0, 1e-11 * (1 + size)) << "row " << i;
        // Float knows log(p / q) near 2e4 to 1e-3 (half an ulp); reverse_kl's gradient is made of differences of such
        // numbers, which are near 80 where all classes but one are alike: 1e-5 relative. Where q is nearly one-hot the
        // gradient all but cancels, and errors of log(p / q) near 10 (1e-6) stay: hence the absolute part.
        EXPECT_LT(error, 3e-5 * size + 1e-5) << "row " << i;
      }
    }
  }
}

TEST(DistillLoss, ExtremeLogits) {
  expect_extremes<double>(1e-13);  // sums of hundreds of terms, relative to values of 1 to 1e5
  expect_extremes<float>(2e-6);    // as for common values: the tolerance is relative
}

TEST(DistillLoss, MaskedRowsCountForNothing) {
  RandomStream r(testing::test_seed(), "data");
  const int m = 12, n = 33;
  Owned<float> student({m, n}), teacher({m, n});
  student.normal(r);
  teacher.normal(r);
  const auto labels = some_labels(r, m, n);
  std::vector<int> kept;
  for (int i = 0; i < m; ++i) {
    if (labels[i] >= 0) kept.push_back(i);
  }
  const auto k = static_cast<std::int64_t>(kept.size());
  ASSERT_LT(k, m);
  Owned<float> student_kept({k, n}), teacher_kept({k, n});
  Owned<std::int32_t> labels_kept({k});
  for (std::int64_t i = 0; i < k; ++i) {
    const int from = kept[static_cast<std::size_t>(i)];
    std::copy_n(student.begin() + from * n, n, student_kept.begin() + i * n);
    std::copy_n(teacher.begin() + from * n, n, teacher_kept.begin() + i * n);
    labels_kept[i] = labels[from];
  }
  // What stands in a masked row does not matter.
  for (int i = 0; i < m; ++i) {
    if (labels[i] < 0) student[i * n] = teacher[i * n + 1] = std::numeric_limits<float>::quiet_NaN();
  }
  for (const DistillWeights& w : {all_weights(2.0f), DistillWeights{.ce = 1, .kl = 1}}) {
    const Sums s = evaluate(w, student, teacher, labels),
               expected = evaluate(w, student_kept, teacher_kept, labels_kept);
    for (int j = 0; j < LossSum::count; ++j) EXPECT_EQ(s[j], expected[j]) << j;
    const auto g = gradient_of(w, student, teacher, labels);
    const auto g_kept = gradient_of(w, student_kept, teacher_kept, labels_kept);
    std::int64_t next = 0;
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < n; ++j) ASSERT_EQ(g[i * n + j], labels[i] < 0 ? 0.0f : g_kept[next * n + j]);
      next += labels[i] >= 0;
    }
  }
}

TEST(DistillLoss, CountsAndTies) {
  Owned<float> student({4, 3}), teacher({4, 3});
  const float zs[] = {1, 2, 2, /**/ 0, 0, 0, /**/ 3, 1, 3, /**/ -1, -2, -3};
  const float zt[] = {0, 5, 1, /**/ 1, 0, 1, /**/ 1, 2, 3, /**/ -9, -9, -8};
  std::copy_n(zs, 12, student.begin());
  std::copy_n(zt, 12, teacher.begin());
  Owned<std::int32_t> labels({4});
  labels[0] = 1;   // student 1 (tie with 2), teacher 1
  labels[1] = 2;   // student 0, teacher 0
  labels[2] = 2;   // student 0 (tie with 2), teacher 2
  labels[3] = -1;  // not counted
  const Sums s = evaluate({.ce = 1}, student, teacher, labels);
  EXPECT_EQ(s[LossSum::tokens], 3);
  EXPECT_EQ(s[LossSum::top1_agree], 2);
  EXPECT_EQ(s[LossSum::student_correct], 1);
  EXPECT_EQ(s[LossSum::teacher_correct], 2);
}

TEST(DistillLoss, TheLowestIndexWinsATieAcrossTiles) {
  Owned<float> student({1, 2000}), teacher({1, 2000});
  student.fill(0);
  teacher.fill(0);
  student[700] = student[701] = student[1999] = 1;
  teacher[700] = 1;
  Owned<std::int32_t> labels({1});
  labels[0] = 700;
  const Sums s = evaluate({.ce = 1}, student, teacher, labels);
  EXPECT_EQ(s[LossSum::top1_agree], 1);
  EXPECT_EQ(s[LossSum::student_correct], 1);
}

TEST(DistillLoss, AddsToSumsAndLeavesLogitsAlone) {
  RandomStream r(testing::test_seed(), "data");
  Owned<double> student({5, 33}), teacher({5, 33});
  student.normal(r);
  teacher.normal(r);
  const Owned<double> before = student;
  const auto labels = some_labels(r, 5, 33);
  // ce, kl, teacher_ce and counts always; the others only with a weight
  Sums sums({LossSum::count});
  sums.fill(100);
  kernels::distill_loss(Stream::cpu(), {}, student, teacher, labels, 1.0, false, sums, testing::no_workspace());
  const Sums expected = reference({}, student, teacher, labels);
  for (int k = 0; k < LossSum::count; ++k) {
    const bool weighted_only = k == LossSum::reverse_kl || k == LossSum::jsd || k == LossSum::tvd;
    EXPECT_NEAR(sums[k], weighted_only ? 100 : 100 + expected[k], 1e-11) << k;
  }
  EXPECT_EQ(std::memcmp(student.begin(), before.begin(), sizeof(double) * 5 * 33), 0);
  // no weight, no gradient
  for (const double g : gradient_of({}, student, teacher, labels)) EXPECT_EQ(g, 0);
}

TEST(DistillLoss, WithoutTeacherOnlyCrossEntropy) {
  RandomStream r(testing::test_seed(), "data");
  const int m = 6, n = 700;
  Owned<double> student({m, n}), teacher({m, n});
  student.normal(r);
  teacher.normal(r);
  const auto labels = some_labels(r, m, n);
  const DistillWeights w = {.ce = 0.6f, .temperature = 2.0f};
  const Sums with = evaluate(w, student, teacher, labels);
  const auto expected = gradient_of(w, student, teacher, labels, 3.0);
  Sums sums = zero_sums();
  kernels::distill_loss(Stream::cpu(), w, student, Tensor(), labels, 3.0, true, sums, testing::no_workspace());
  for (const int k : {LossSum::ce, LossSum::student_correct, LossSum::tokens}) EXPECT_EQ(sums[k], with[k]) << k;
  for (const int k : {LossSum::kl, LossSum::teacher_ce, LossSum::teacher_correct, LossSum::top1_agree}) {
    EXPECT_EQ(sums[k], 0) << k;
  }
  for (int i = 0; i < m * n; ++i) ASSERT_EQ(student[i], expected[i]) << i;
}

TEST(DistillLoss, ANonFiniteLogitIsSeen) {
  RandomStream r(testing::test_seed(), "data");
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    for (const bool in_teacher : {false, true}) {
      Owned<float> student({1, 600}), teacher({1, 600});
      student.normal(r);
      teacher.normal(r);
      (in_teacher ? teacher : student)[599] = bad;
      Owned<std::int32_t> labels({1});
      labels[0] = 0;
      const Sums s = evaluate(all_weights(2.0f), student, teacher, labels);
      for (const int k : {LossSum::kl, LossSum::reverse_kl, LossSum::jsd, LossSum::tvd}) {
        EXPECT_FALSE(std::isfinite(s[k])) << k;
      }
      EXPECT_FALSE(std::isfinite(s[in_teacher ? LossSum::teacher_ce : LossSum::ce]));
      const auto g = gradient_of({.ce = 1, .kl = 1}, student, teacher, labels);
      EXPECT_FALSE(std::isfinite(std::accumulate(g.begin(), g.end(), 0.0)));
    }
  }
}

TEST(DistillLoss, BitsDoNotDependOnThreads) {
  RandomStream r(testing::test_seed(), "data");
  const int m = 700, n = 258;  // many tasks
  Owned<float> student({m, n}), teacher({m, n});
  student.normal(r);
  teacher.normal(r);
  const auto labels = some_labels(r, m, n);
  const DistillWeights w = all_weights(2.0f);
  const int before = num_threads();
  std::vector<Owned<float>> gradients;
  std::vector<Sums> sums;
  for (const int threads : {1, 2}) {
    set_num_threads(threads);
    gradients.push_back(gradient_of(w, student, teacher, labels));
    sums.push_back(evaluate(w, student, teacher, labels));
  }
  set_num_threads(before);
  EXPECT_EQ(std::memcmp(gradients[0].begin(), gradients[1].begin(), sizeof(float) * m * n), 0);
  EXPECT_EQ(std::memcmp(sums[0].begin(), sums[1].begin(), sizeof(double) * LossSum::count), 0);
  expect_sums(sums[0], reference(w, student, teacher, labels), 2e-6, "many tasks");
}

TEST(DistillLoss, WhatIsBeyondTheClassesOfARowIsLeftAlone) {
  RandomStream r(testing::test_seed(), "data");
  const std::int64_t m = 7, n = 533, row = 576;
  Owned<double> student({m, n}), teacher({m, n}), long_student({m, row}), long_teacher({m, row});
  student.normal(r);
  teacher.normal(r);
  for (Owned<double>* t : {&long_student, &long_teacher}) t->fill(std::numeric_limits<double>::quiet_NaN());
  for (std::int64_t i = 0; i < m; ++i) {
    std::copy_n(student.begin() + i * n, n, long_student.begin() + i * row);
    std::copy_n(teacher.begin() + i * n, n, long_teacher.begin() + i * row);
  }
  const auto labels = some_labels(r, m, n);
  const DistillWeights w = all_weights(2, 0.3f);
  const Sums expected = evaluate(w, student, teacher, labels);
  const Owned<double> gradient = gradient_of(w, student, teacher, labels);
  Sums sums = zero_sums();
  kernels::distill_loss(Stream::cpu(), w, long_student, long_teacher, labels, 1.0, true, sums, testing::no_workspace(),
                        n);
  for (int k = 0; k < LossSum::count; ++k) EXPECT_EQ(sums[k], expected[k]) << k;
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = 0; j < row; ++j) {
      if (j < n) {
        EXPECT_EQ(long_student[i * row + j], gradient[i * n + j]);
      } else {
        EXPECT_TRUE(std::isnan(long_student[i * row + j]));
      }
    }
  }
  EXPECT_THROW(kernels::distill_loss(Stream::cpu(), w, long_student, long_teacher, labels, 1.0, true, sums,
                                     testing::no_workspace(), row + 1),
               InternalError);
}

TEST(DistillLoss, BrokenContractsThrow) {
  Owned<float> student({2, 3}), teacher({2, 3}), narrow({2, 2});
  student.fill(0);
  teacher.fill(0);
  Owned<double> other_dtype({2, 3});
  Owned<std::int32_t> labels({2}), long_labels({3});
  labels.fill(0);
  Sums sums = zero_sums();
  const Stream cpu = Stream::cpu();
  const auto run = [&](const DistillWeights& w, const Tensor& t, const Tensor& l, const Tensor& s) {
    kernels::distill_loss(cpu, w, student, t, l, 1.0, false, s, testing::no_workspace());
  };
  EXPECT_NO_THROW(run({.kl = 1}, teacher, labels, sums));
  EXPECT_THROW(run({.kl = 1}, narrow, labels, sums), InternalError);
  EXPECT_THROW(run({.kl = 1}, other_dtype, labels, sums), InternalError);
  EXPECT_THROW(run({.kl = 1}, Tensor(), labels, sums), InternalError);
  EXPECT_THROW(run({.kl = 1}, teacher, long_labels, sums), InternalError);
  EXPECT_THROW(run({.kl = 1}, teacher, labels, narrow), InternalError);
  EXPECT_THROW(run({.kl = -1}, teacher, labels, sums), InternalError);
  EXPECT_THROW(run({.kl = 1, .temperature = 0}, teacher, labels, sums), InternalError);
  EXPECT_THROW(run({.jsd = 1, .jsd_beta = 1}, teacher, labels, sums), InternalError);
  labels[1] = 3;
  EXPECT_THROW(run({.ce = 1}, teacher, labels, sums), InternalError);
  // a dry stream checks, but touches nothing
  const Sums before = sums;
  kernels::distill_loss(Stream::dry({}), {.ce = 1}, student, teacher, labels, 1.0, true, sums, testing::no_workspace());
  for (int k = 0; k < LossSum::count; ++k) EXPECT_EQ(sums[k], before[k]);
  for (const float z : student) EXPECT_EQ(z, 0.0f);
}

}  // namespace
}  // namespace deltapipe
