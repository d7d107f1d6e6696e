#include "kernels/hidden_loss.h"
#include "tests/gpu/device.h"

namespace deltapipe {
namespace {

using testing::OnDevice;
using testing::Owned;
using testing::relative_rms;

class HiddenLossCuda : public testing::CudaTest {
 protected:
  /// `distance` of the student from the teacher; `gradient` the dtype of d_student. Every third row is masked.
  void expect_cpu(std::int64_t rows, std::int64_t d, double distance, DType gradient, std::int64_t shift = 0) {
    SCOPED_TRACE(Shape({rows, d}).str() + " distance " + std::to_string(distance) + " gradient " +
                 std::string(name_of(gradient)) + " shift " + std::to_string(shift));
    const Owned<double> teacher = normal({rows, d});
    Owned<double> student = normal({rows, d}, distance);
    for (std::int64_t i = 0; i < rows * d; ++i) student[i] += teacher[i];
    student = testing::round_to(dtype(), student);
    const Owned<double> old = testing::round_to(gradient, Owned<double>({rows, d}).normal(random_, 1e-3));
    Owned<std::int32_t> labels({rows});
    for (std::int64_t r = 0; r < rows; ++r) labels[r] = r % 3 == 1 ? -1 : 5;
    Owned<double> sums({2}), ds = old;
    sums.fill(0.25);
    const double cosine_scale = 0.3, mse_scale = 0.7;
    kernels::hidden_loss(Stream::cpu(), student, teacher, labels, cosine_scale, mse_scale, ds, sums,
                         testing::no_workspace());
    const OnDevice gs = upload(student, shift), gt = upload(teacher, shift), gl(labels), gds(gradient, old, shift),
                   gsums(DType::f64, Owned<double>({2}).fill(0.25)), again(gradient, old, shift),
                   again_sums(DType::f64, Owned<double>({2}).fill(0.25)), sums_alone(DType::f64, again_sums.host());
    kernels::hidden_loss(stream(), gs, gt, gl, cosine_scale, mse_scale, gds, gsums, workspace());
    // Float sums of d products. Relative to the loss itself where s is close to t; else what 1 - cos is the rest of,
    // (|s - t|^2 - (|s| - |t|)^2) / (2 |s| |t|), counts.
    double minuend = 0;
    for (std::int64_t r = 0; r < rows; ++r) {
      double ss = 0, tt = 0, apart = 0;
      for (std::int64_t i = r * d; i < (r + 1) * d; ++i) {
        ss += student[i] * student[i];
        tt += teacher[i] * teacher[i];
        apart += (student[i] - teacher[i]) * (student[i] - teacher[i]);
      }
      minuend += labels[r] < 0 ? 0 : apart / (2 * std::sqrt(ss * tt));
    }
    const double size[] = {minuend, sums[1] - 0.25};
    for (int i = 0; i < 2; ++i) EXPECT_NEAR(gsums.host()[i], sums[i], 1e-6 * size[i] + 1e-15) << i;
    // Of two channels the gradient is a difference of terms several times its size.
    EXPECT_LT(relative_rms(gds.host(), ds), (d == 2 ? 8 : 1) * testing::rounding_error(gradient));
    kernels::hidden_loss(stream(), gs, gt, gl, cosine_scale, mse_scale, again, again_sums, workspace());
    expect_same_bits(again, gds, "d_student");
    expect_same_bits(again_sums, gsums, "sums");
    kernels::hidden_loss(stream(), gs, gt, gl, cosine_scale, mse_scale, Tensor(), sums_alone, workspace());
    for (int i = 0; i < 2; ++i) EXPECT_NEAR(sums_alone.host()[i], sums[i], 1e-6 * size[i] + 1e-15) << i;
    const OnDevice alone_again(DType::f64, Owned<double>({2}).fill(0.25));
    kernels::hidden_loss(stream(), gs, gt, gl, cosine_scale, mse_scale, Tensor(), alone_again, workspace());
    expect_same_bits(alone_again, sums_alone, "sums without a gradient");
  }
};

TEST_P(HiddenLossCuda, FollowsTheCpu) {
  for (const DType gradient : {dtype(), DType::f32}) {
    for (const auto& [rows, d] : {std::pair<std::int64_t, std::int64_t>{1, 2},
                                  {3, 7},
                                  {65, 130},
                                  {9, 2560},
                                  {5, 4100},
                                  {3, 8192},
                                  {1300, 64},
                                  {9001, 24}}) {
      for (const std::int64_t shift : {0, 1}) expect_cpu(rows, d, 0.5, gradient, shift);
    }
  }
}

TEST_P(HiddenLossCuda, CloseStates) { expect_cpu(64, 2560, 0.01, DType::f32); }

TEST_P(HiddenLossCuda, SpecialRows) {
  const std::int64_t d = 64;
  Owned<double> student = normal({5, d}), teacher = normal({5, d});
  for (std::int64_t i = 0; i < d; ++i) {
    student[0 * d + i] = 0;                         // a student's norm that is clamped
    teacher[1 * d + i] = 0;                         // a teacher's
    student[2 * d + i] = teacher[2 * d + i];        // equal
    student[3 * d + i] = -2 * teacher[3 * d + i];   // opposite
    student[4 * d + i] = teacher[4 * d + i] * 0.5;  // parallel
  }
  Owned<std::int32_t> labels({5});
  labels.fill(0);
  for (int row = 0; row < 5; ++row) {
    Owned<double> sums({2}), ds({5, d});
    sums.fill(0);
    ds.fill(0);
    Owned<std::int32_t> one({1});
    one.fill(0);
    const Tensor s = student.tensor().rows(row, row + 1), t = teacher.tensor().rows(row, row + 1);
    Owned<double> row_ds({1, d});
    row_ds.fill(0);
    kernels::hidden_loss(Stream::cpu(), s, t, one, 1, 0, row_ds, sums, testing::no_workspace());
    const OnDevice gs = upload(student), gt = upload(teacher), gl(one), gsums(DType::f64, Owned<double>({2}).fill(0)),
                   gds(DType::f32, Owned<double>({1, d}).fill(0));
    kernels::hidden_loss(stream(), gs.tensor().rows(row, row + 1), gt.tensor().rows(row, row + 1), gl, 1, 0, gds, gsums,
                         workspace());
    EXPECT_NEAR(gsums.host()[0], sums[0], 1e-6) << row;
    EXPECT_NEAR(gsums.host()[1], sums[1], 1e-6 * sums[1]) << row;
    double largest = 1;  // of gradients of order 1 / |s|, 1e8 where |s| is clamped
    for (const double x : row_ds) largest = std::max(largest, std::abs(x));
    for (std::int64_t i = 0; i < d; ++i) ASSERT_NEAR(gds.host()[i], row_ds[i], 1e-6 * largest) << row;
  }
}

TEST_P(HiddenLossCuda, MaskedRowsMayHoldAnything) {
  const Shape shape{2, 16};
  const OnDevice student = poisoned(shape), teacher = poisoned(shape), ds(DType::f32, Owned<double>(shape).fill(4)),
                 sums(DType::f64, Owned<double>({2}).fill(1));
  const OnDevice labels(Owned<std::int32_t>({2}).fill(-1));
  kernels::hidden_loss(stream(), student, teacher, labels, 1, 1, ds, sums, workspace());
  kernels::hidden_loss(stream(), student, teacher, labels, 1, 1, Tensor(), sums, workspace());
  for (const double x : ds.host()) EXPECT_EQ(x, 4);
  for (const double x : sums.host()) EXPECT_EQ(x, 1);
}

INSTANTIATE_TEST_SUITE_P(DTypes, HiddenLossCuda, testing::model_dtypes(), testing::dtype_name);

}  // namespace
}  // namespace deltapipe
