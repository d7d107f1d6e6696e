#include "kernels/distill_loss.h"
#include "tests/gpu/device.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

namespace deltapipe {
namespace {

using kernels::DistillWeights;
using kernels::LossSum;
using testing::OnDevice;
using testing::Owned;
using testing::relative_rms;

class DistillLossCuda : public testing::CudaTest {
 protected:
  struct Case {
    std::int64_t rows, classes;
    DistillWeights weights;
    bool with_teacher = true;
    double distance = 1;                                // of the student's logits from the teacher's, of size 3
    std::int64_t student_shift = 0, teacher_shift = 0;  // elements past an aligned address
  };

  static OnDevice start_sums() { return {DType::f64, Owned<double>({LossSum::count}).fill(100)}; }

  void expect_cpu(const Case& c) {
    SCOPED_TRACE(Shape({c.rows, c.classes}).str() + " temperature " + std::to_string(c.weights.temperature) +
                 " distance " + std::to_string(c.distance) + " shifts " + std::to_string(c.student_shift) + " " +
                 std::to_string(c.teacher_shift));
    const Shape shape{c.rows, c.classes};
    const Owned<double> teacher = normal(shape, 3);
    Owned<double> student(shape);
    for (std::int64_t i = 0; i < student.size(); ++i) student[i] = teacher[i] + c.distance * random_.next_normal();
    student = testing::round_to(dtype(), student);
    Owned<std::int32_t> labels({c.rows});
    for (std::int64_t r = 0; r < c.rows; ++r) {
      labels[r] =
          r % 5 == 2 ? -1 : static_cast<std::int32_t>(random_.next_below(static_cast<std::uint64_t>(c.classes)));
    }
    const double scale = 0.37;
    Owned<double> gradient = student, sums({LossSum::count});
    sums.fill(100);
    const Tensor cpu_teacher = c.with_teacher ? teacher.tensor() : Tensor();
    kernels::distill_loss(Stream::cpu(), c.weights, gradient, cpu_teacher, labels, scale, true, sums,
                          testing::no_workspace());

    const OnDevice gs = upload(student, c.student_shift), gt = upload(teacher, c.teacher_shift), gl(labels),
                   gsums = start_sums(), again = upload(student, c.student_shift), again_sums = start_sums(),
                   untouched = upload(student, c.student_shift), sums_alone = start_sums();
    const Tensor gpu_teacher = c.with_teacher ? gt.tensor() : Tensor();
    kernels::distill_loss(stream(), c.weights, gs, gpu_teacher, gl, scale, true, gsums, workspace());
    // Exponentials and terms in float: a few 1e-7 each, up to 1e-6 for probabilities of 2^-20 and less; logarithms and
    // sums in double. A row's logarithm of a sum of exponentials keeps 1e-7 absolutely too. Counts are exact.
    const Owned<double> got = gsums.host();
    for (int k = 0; k < LossSum::count; ++k) {
      const bool counts = k == LossSum::top1_agree || k == LossSum::student_correct || k == LossSum::teacher_correct ||
                          k == LossSum::tokens;
      // kl and reverse_kl take the error of two such logarithms, each 2^-22, as the contract says.
      const double t2 = static_cast<double>(c.weights.temperature) * static_cast<double>(c.weights.temperature);
      const double a_row = k == LossSum::ce || k == LossSum::teacher_ce   ? 2e-7
                           : k == LossSum::kl || k == LossSum::reverse_kl ? 4e-7 * t2
                                                                          : 0;
      const double floor = a_row * static_cast<double>(c.rows) + 1e-12;
      EXPECT_NEAR(got[k], sums[k], counts ? 0 : 1e-5 * std::abs(sums[k] - 100) + floor) << "sum " << k;
    }
    const Owned<double> got_gradient = gs.host();
    if (c.classes > 1) {
      EXPECT_LT(relative_rms(got_gradient, gradient), std::max(tolerance(), 1e-5));
    } else {
      for (const double g : got_gradient) EXPECT_NEAR(g, 0, 1e-6);  // of one class, a difference of equal numbers
    }

    kernels::distill_loss(stream(), c.weights, again, gpu_teacher, gl, scale, true, again_sums, workspace());
    expect_same_bits(again, gs, "gradient");
    expect_same_bits(again_sums, gsums, "sums");
    kernels::distill_loss(stream(), c.weights, untouched, gpu_teacher, gl, scale, false, sums_alone, workspace());
    expect_same_bits(untouched, upload(student), "logits without a gradient");
    expect_same_bits(sums_alone, gsums, "sums without a gradient");
  }
};

const DistillWeights recipe{.ce = 0.2f, .kl = 0.8f, .temperature = 2};

DistillWeights all_weights(float temperature) {
  return {.ce = 0.2f,
          .kl = 0.5f,
          .reverse_kl = 0.3f,
          .jsd = 0.7f,
          .tvd = 1.1f,
          .temperature = temperature,
          .jsd_beta = 0.3f};
}

TEST_P(DistillLossCuda, OddNumbersOfClasses) {
  // One class; less than a pack, a block, a cluster, a step of a cluster; whole packs and not; two steps.
  for (const std::int64_t classes : {1, 2, 7, 8, 9, 130, 1001, 4099, 33000, 66001}) {
    expect_cpu({.rows = 6, .classes = classes, .weights = recipe});
  }
}

TEST_P(DistillLossCuda, EveryTemperatureAndLoss) {
  for (const float temperature : {1.0f, 2.0f, 0.7f, 3.5f}) {
    expect_cpu({.rows = 8, .classes = 517, .weights = {.ce = 1, .kl = 1, .temperature = temperature}});
    expect_cpu({.rows = 8, .classes = 517, .weights = all_weights(temperature)});
    expect_cpu({.rows = 3, .classes = 517, .weights = {.reverse_kl = 1, .temperature = temperature}});
    expect_cpu({.rows = 3, .classes = 517, .weights = {.jsd = 1, .temperature = temperature}});
    expect_cpu({.rows = 3, .classes = 517, .weights = {.tvd = 1, .temperature = temperature}});
  }
}

TEST_P(DistillLossCuda, WithoutTeacher) {
  for (const std::int64_t classes : {1, 9, 1001, 33001}) {
    expect_cpu({.rows = 7, .classes = classes, .weights = {.ce = 0.5f, .temperature = 2}, .with_teacher = false});
  }
}

TEST_P(DistillLossCuda, AnyAddress) {
  for (const auto& [student, teacher] : {std::pair<std::int64_t, std::int64_t>{1, 1}, {3, 3}, {1, 2}, {0, 1}}) {
    expect_cpu({.rows = 5, .classes = 1003, .weights = recipe, .student_shift = student, .teacher_shift = teacher});
    expect_cpu(
        {.rows = 5, .classes = 1003, .weights = all_weights(2), .student_shift = student, .teacher_shift = teacher});
  }
}

TEST_P(DistillLossCuda, WhatIsBeyondTheClassesOfARowIsLeftAlone) {
  const std::int64_t rows = 6;
  for (const auto& [classes, row] : {std::pair<std::int64_t, std::int64_t>{1003, 1024}, {513, 520}, {300, 301}}) {
    SCOPED_TRACE(std::to_string(classes) + " classes in rows of " + std::to_string(row));
    const std::int64_t n = classes, length = row;
    const auto lengthen = [&](const Owned<double>& logits) {
      Owned<double> out({rows, length});
      out.fill(std::numeric_limits<double>::quiet_NaN());
      for (std::int64_t r = 0; r < rows; ++r) {
        std::copy_n(logits.begin() + r * n, n, out.begin() + r * length);
      }
      return out;
    };
    const Owned<double> student = normal({rows, n}), teacher = normal({rows, n});
    Owned<std::int32_t> labels({rows});
    for (std::int64_t r = 0; r < rows; ++r) labels[r] = r == 3 ? -1 : static_cast<std::int32_t>(r * 11);
    const OnDevice s = upload(student), t = upload(teacher), l(labels), sums = start_sums(),
                   long_s = upload(lengthen(student)), long_t = upload(lengthen(teacher)), long_sums = start_sums();
    kernels::distill_loss(stream(), all_weights(2), s, t, l, 1, true, sums, workspace());
    kernels::distill_loss(stream(), all_weights(2), long_s, long_t, l, 1, true, long_sums, workspace(), n);
    // Threads take other elements where rows begin elsewhere, so float sums differ in their order.
    const Owned<double> got = long_sums.host(), expected = sums.host();
    for (int k = 0; k < LossSum::count; ++k) EXPECT_NEAR(got[k], expected[k], 1e-5 * std::abs(expected[k])) << k;
    const Owned<double> gradient = s.host(), long_gradient = long_s.host();
    Owned<double> head({rows, n});
    for (std::int64_t r = 0; r < rows; ++r) {
      std::copy_n(long_gradient.begin() + r * length, n, head.begin() + r * n);
      for (std::int64_t j = n; j < length; ++j) ASSERT_TRUE(std::isnan(long_gradient[r * length + j])) << r << " " << j;
    }
    EXPECT_LT(relative_rms(head, gradient), std::max(tolerance(), 1e-5));
  }
}

TEST_P(DistillLossCuda, RealVocabulary) {
  expect_cpu({.rows = 4, .classes = 128004, .weights = recipe});
  expect_cpu({.rows = 4, .classes = 128004, .weights = all_weights(1.5f)});
}

// Distributions so close that KL is of second order in their distance.
TEST_P(DistillLossCuda, CloseDistributions) {
  expect_cpu({.rows = 8, .classes = 4000, .weights = recipe, .distance = 0.02});
  DistillWeights smooth = all_weights(2);
  smooth.tvd = 0;  // its gradient jumps where p = q, which float probabilities meet elsewhere
  expect_cpu({.rows = 8, .classes = 4000, .weights = smooth, .distance = 0.02});
}

TEST_P(DistillLossCuda, EqualLogitsGiveTheLowestPlace) {
  const std::int64_t classes = 20000;
  Owned<double> student({3, classes}), teacher({3, classes});
  student.fill(1);
  teacher.fill(1);
  for (const int at : {17000, 9000, 9001}) student[classes + at] = 2;  // row 1: 9000
  Owned<std::int32_t> labels({3});
  labels[0] = 0, labels[1] = 9000, labels[2] = 1;
  const OnDevice s = upload(student), t = upload(teacher), l(labels),
                 sums(DType::f64, Owned<double>({LossSum::count}).fill(0));
  kernels::distill_loss(stream(), {}, s, t, l, 1, false, sums, workspace());
  const Owned<double> got = sums.host();
  EXPECT_EQ(got[LossSum::student_correct], 2);
  EXPECT_EQ(got[LossSum::teacher_correct], 1);
  EXPECT_EQ(got[LossSum::top1_agree], 2);
}

TEST_P(DistillLossCuda, BrokenRows) {
  const std::int64_t classes = 300;
  for (const int what : {0, 1, 2}) {
    Owned<double> student = normal({1, classes});
    if (what == 0) student[200] = std::numeric_limits<double>::quiet_NaN();
    if (what == 1) student[200] = std::numeric_limits<double>::infinity();
    Owned<std::int32_t> labels({1});
    labels[0] = what == 2 ? static_cast<std::int32_t>(classes) : 3;
    const OnDevice s = upload(student), t = upload(normal({1, classes})), l(labels),
                   sums(DType::f64, Owned<double>({LossSum::count}).fill(0));
    kernels::distill_loss(stream(), recipe, s, t, l, 1, true, sums, workspace());
    EXPECT_FALSE(std::isfinite(sums.host()[LossSum::ce])) << what;
    if (what == 2) continue;
    EXPECT_FALSE(std::isfinite(sums.host()[LossSum::kl])) << what;
    EXPECT_FALSE(std::isfinite(s.host()[7])) << what;
  }
}

TEST_P(DistillLossCuda, MaskedRowsMayHoldAnything) {
  const OnDevice s = poisoned({2, 1001}), t = poisoned({2, 1001}), l(Owned<std::int32_t>({2}).fill(-1)),
                 sums = start_sums();
  kernels::distill_loss(stream(), recipe, s, t, l, 1, true, sums, workspace());
  for (const double x : sums.host()) EXPECT_EQ(x, 100);
  for (const double x : s.host()) EXPECT_EQ(x, 0);
}

TEST_P(DistillLossCuda, TooManyClassesAreRefused) {
  const OnDevice s = poisoned({1, 500000}), l(Owned<std::int32_t>({1}).fill(0)), sums = start_sums();
  EXPECT_THROW(kernels::distill_loss(stream(), {.ce = 1}, s, Tensor(), l, 1, true, sums, workspace()), InternalError);
}

INSTANTIATE_TEST_SUITE_P(DTypes, DistillLossCuda, testing::model_dtypes(), testing::dtype_name);

}  // namespace
}  // namespace deltapipe
