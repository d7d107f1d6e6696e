// kernels/linear.h on CUDA against the CPU in double on the same rounded inputs.
#include "kernels/linear.h"
#include "kernels/settings.h"
#include "tests/gpu/testing.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace deltapipe {
namespace {

using testing::gpu_stream;
using testing::OnDevice;
using testing::Owned;

struct Size {
  std::int64_t m, in, out;
};
// One of everything; odd sizes, whose rows cuBLASLt must not take as aligned; whole tiles; long sums; few columns, as
// of KDA's beta; the low-rank pair of its gate.
const Size sizes[] = {{1, 1, 1},      {7, 33, 17},      {64, 64, 64},    {300, 256, 20},
                      {129, 8, 1000}, {257, 4099, 131}, {1000, 128, 512}};

class LinearCuda : public testing::GpuTest<::testing::TestWithParam<DType>> {
 protected:
  void TearDown() override { kernels::settings() = {}; }
  DType dtype() const { return GetParam(); }
  // One rounding to bf16 errs by 2^-8 at most and by 1.66e-3 in the root mean square. Some of cuBLASLt's algorithms
  // round the product before bias or what is accumulated to, so there are two: 2.35e-3. Sums of up to 4,099 products in
  // fp32 err by 6e-8 sqrt(4099) = 4e-6; TF32 operands would by 3e-4. Of few elements the mean may be any one's.
  double tolerance_of(const Owned<double>& result, bool adds) const {
    return dtype() == DType::f32 ? 4e-6 : result.size() < 100 ? (adds ? 2 : 1) * 0x1p-8 : adds ? 2.6e-3 : 2e-3;
  }
  // Weight gradients leave in fp32: products of bf16 numbers are exact, tensor cores add them a little less carefully
  // than one at a time.
  static constexpr double tolerance_of_sums = 1e-5;
};

TEST_P(LinearCuda, Forward) {
  for (const auto& [m, in, out] : sizes) {
    for (const bool with_bias : {false, true}) {
      SCOPED_TRACE(::testing::Message() << m << " x " << in << " x " << out << " bias " << with_bias);
      const Owned<double> x = normal(dtype(), {m, in}), w = normal(dtype(), {out, in}),
                          bias = normal(dtype(), {out}, 9);
      Owned<double> truth({m, out});
      kernels::linear_forward(Stream::cpu(), x, w, with_bias ? bias.tensor() : Tensor(), truth);
      const OnDevice dx(dtype(), x), dw(dtype(), w), db(dtype(), bias), y(dtype(), truth.shape());
      kernels::linear_forward(gpu_stream(), dx, dw, with_bias ? db.tensor() : Tensor(), y);
      EXPECT_LT(testing::relative_rms(y.host(), truth), tolerance_of(truth, with_bias));
    }
  }
}

TEST_P(LinearCuda, BackwardInput) {
  for (const auto& [m, in, out] : sizes) {
    for (const bool accumulate : {false, true}) {
      SCOPED_TRACE(::testing::Message() << m << " x " << in << " x " << out << " accumulate " << accumulate);
      const Owned<double> dy = normal(dtype(), {m, out}), w = normal(dtype(), {out, in});
      Owned<double> truth = normal(dtype(), {m, in}, 20);
      const OnDevice ddy(dtype(), dy), dw(dtype(), w);
      OnDevice dx(dtype(), truth);
      if (!accumulate) {
        dx.poison();
        truth.fill(0);
      }
      kernels::linear_backward_input(Stream::cpu(), dy, w, truth, true, testing::no_workspace());
      kernels::linear_backward_input(gpu_stream(), ddy, dw, dx, accumulate, testing::no_workspace());
      EXPECT_LT(testing::relative_rms(dx.host(), truth), tolerance_of(truth, accumulate));
    }
  }
}

TEST_P(LinearCuda, BackwardWeight) {
  for (const auto& [m, in, out] : sizes) {
    SCOPED_TRACE(::testing::Message() << m << " x " << in << " x " << out);
    const Owned<double> dy = normal(dtype(), {m, out}), x = normal(dtype(), {m, in});
    Owned<double> dw = normal(DType::f32, {out, in}, 5), db = normal(DType::f32, {out}, 5);
    const OnDevice ddy(dtype(), dy), dx(dtype(), x), sums(DType::f32, dw), bias_sums(DType::f32, db);
    kernels::linear_backward_weight(Stream::cpu(), dy, x, dw, db);
    kernels::linear_backward_weight(gpu_stream(), ddy, dx, sums, bias_sums);
    EXPECT_LT(testing::relative_rms(sums.host(), dw), tolerance_of_sums);
    EXPECT_LT(testing::relative_rms(bias_sums.host(), db), tolerance_of_sums);
    kernels::linear_backward_weight(gpu_stream(), ddy, dx, Tensor(), bias_sums);  // each alone
    kernels::linear_backward_weight(gpu_stream(), ddy, dx, sums, Tensor());
    kernels::linear_backward_weight(Stream::cpu(), dy, x, dw, db);
    EXPECT_LT(testing::relative_rms(sums.host(), dw), tolerance_of_sums);
    EXPECT_LT(testing::relative_rms(bias_sums.host(), db), tolerance_of_sums);
  }
}

TEST_P(LinearCuda, RowsAtAnyAddress) {
  // The second row of an odd width begins at an address that is not a multiple of 4 (bf16) or 8 (f32) bytes.
  constexpr std::int64_t m = 40, in = 37, out = 21;
  const Owned<double> x = normal(dtype(), {m + 1, in}), w = normal(dtype(), {out, in});
  Owned<double> truth({m, out});
  kernels::linear_forward(Stream::cpu(), x.tensor().rows(1, m + 1), w, Tensor(), truth);
  const OnDevice dx(dtype(), x), dw(dtype(), w), y(dtype(), Shape{m + 1, out});
  kernels::linear_forward(gpu_stream(), dx.tensor().rows(1, m + 1), dw, Tensor(), y.tensor().rows(1, m + 1));
  const Owned<double> got = y.host();
  Owned<double> rest({m, out});
  std::copy(got.begin() + out, got.end(), rest.begin());
  EXPECT_LT(testing::relative_rms(rest, truth), tolerance_of(truth, false));
  for (std::int64_t i = 0; i < out; ++i) EXPECT_TRUE(std::isnan(got[i])) << "the row before was written";
}

/// `values` with `more` columns of NaN.
Owned<double> lengthened(const Owned<double>& values, std::int64_t columns, std::int64_t more) {
  const std::int64_t rows = values.size() / columns;
  Owned<double> out({rows, columns + more});
  out.fill(std::numeric_limits<double>::quiet_NaN());
  for (std::int64_t t = 0; t < rows; ++t) {
    std::copy_n(values.begin() + t * columns, columns, out.begin() + t * (columns + more));
  }
  return out;
}

TEST_P(LinearCuda, WhatIsBeyondTheOutputsOfARowIsLeftAlone) {
  // Outputs that are no multiple of 16 bytes in rows that are: cut products; whole ones, where the inputs or the rows
  // are none either or the outputs too few.
  struct Rows {
    Size size;
    std::int64_t row;
  };
  const Rows cases[] = {{{300, 64, 1004}, 1024}, {{129, 200, 517}, 520}, {{65, 37, 258}, 320}, {{2100, 64, 261}, 264},
                        {{77, 40, 515}, 517},    {{50, 24, 3}, 64},      {{64, 2560, 4}, 64},  {{2, 1032, 15}, 64}};
  for (const auto& [size, row] : cases) {
    const auto& [m, in, out] = size;
    SCOPED_TRACE(::testing::Message() << m << " x " << in << " x " << out << " in rows of " << row);
    const Owned<double> x = normal(dtype(), {m, in}), w = normal(dtype(), {out, in}), bias = normal(dtype(), {out}, 9),
                        dy = normal(dtype(), {m, out});
    const OnDevice gx(dtype(), x), gw(dtype(), w), gb(dtype(), bias), gdy(dtype(), lengthened(dy, out, row - out));
    for (const bool with_bias : {false, true}) {
      Owned<double> truth({m, out});
      kernels::linear_forward(Stream::cpu(), x, w, with_bias ? bias.tensor() : Tensor(), truth);
      const OnDevice y(dtype(), Shape{m, row});
      kernels::linear_forward(gpu_stream(), gx, gw, with_bias ? gb.tensor() : Tensor(), y);
      const Owned<double> got = y.host();
      Owned<double> head({m, out});
      for (std::int64_t t = 0; t < m; ++t) {
        std::copy_n(got.begin() + t * row, out, head.begin() + t * out);
        for (std::int64_t o = out; o < row; ++o) ASSERT_TRUE(std::isnan(got[t * row + o])) << t << " " << o;
      }
      EXPECT_LT(testing::relative_rms(head, truth), tolerance_of(truth, with_bias));
    }
    for (const bool accumulate : {false, true}) {
      Owned<double> truth = normal(dtype(), {m, in}, 20);
      OnDevice dx(dtype(), truth);
      if (!accumulate) {
        dx.poison();
        truth.fill(0);
      }
      kernels::linear_backward_input(Stream::cpu(), dy, w, truth, true, testing::no_workspace());
      testing::with_planned_workspace([&](const Stream& stream, Arena& workspace) {
        kernels::linear_backward_input(stream, gdy, gw, dx, accumulate, workspace);
      });
      EXPECT_LT(testing::relative_rms(dx.host(), truth), tolerance_of(truth, accumulate));
    }
    Owned<double> dw = normal(DType::f32, {out, in}, 5), db = normal(DType::f32, {out}, 5);
    const OnDevice sums(DType::f32, dw), bias_sums(DType::f32, db);
    kernels::linear_backward_weight(Stream::cpu(), dy, x, dw, db);
    kernels::linear_backward_weight(gpu_stream(), gdy, gx, sums, bias_sums);
    EXPECT_LT(testing::relative_rms(sums.host(), dw), tolerance_of_sums);
    EXPECT_LT(testing::relative_rms(bias_sums.host(), db), tolerance_of_sums);
  }
}

TEST_P(LinearCuda, NoRowsGiveNothing) {
  const Owned<double> w = normal(dtype(), {3, 4}), zeros = Owned<double>({3, 4}).fill(0);
  const OnDevice x(dtype(), Shape{0, 4}), y(dtype(), Shape{0, 3}), dw(dtype(), w), sums(DType::f32, zeros);
  kernels::linear_forward(gpu_stream(), x, dw, Tensor(), y);
  kernels::linear_backward_input(gpu_stream(), y, dw, x, false, testing::no_workspace());
  kernels::linear_backward_weight(gpu_stream(), y, x, sums, Tensor());
  EXPECT_EQ(testing::relative_rms(sums.host(), zeros), 0.0);
}

TEST_P(LinearCuda, TwoRunsGiveTheSameBits) {
  const Owned<double> dy = normal(dtype(), {5000, 96}), x = normal(dtype(), {5000, 160}),
                      zeros = Owned<double>({96, 160}).fill(0);
  const OnDevice ddy(dtype(), dy), dx(dtype(), x), first(DType::f32, zeros), second(DType::f32, zeros);
  kernels::linear_backward_weight(gpu_stream(), ddy, dx, first, Tensor());
  kernels::linear_backward_weight(gpu_stream(), ddy, dx, second, Tensor());
  EXPECT_EQ(first.raw(), second.raw());
}

TEST_P(LinearCuda, AlgorithmsChosenByTimingGiveTheSameSums) {
  kernels::settings().deterministic = false;
  const Owned<double> dy = normal(dtype(), {777, 88}), x = normal(dtype(), {777, 264});
  Owned<double> dw = normal(DType::f32, {88, 264});
  const OnDevice ddy(dtype(), dy), dx(dtype(), x), sums(DType::f32, dw);
  kernels::linear_backward_weight(Stream::cpu(), dy, x, dw, Tensor());
  kernels::linear_backward_weight(gpu_stream(), ddy, dx, sums, Tensor());  // timing must not add to them
  EXPECT_LT(testing::relative_rms(sums.host(), dw), tolerance_of_sums);
}

TEST_P(LinearCuda, OtherTypesAreRefused) {
  const OnDevice x(DType::f64, Shape{2, 2}), w(DType::f64, Shape{2, 2}), y(DType::f64, Shape{2, 2});
  EXPECT_THROW(kernels::linear_forward(gpu_stream(), x, w, Tensor(), y), InternalError);
}

INSTANTIATE_TEST_SUITE_P(Types, LinearCuda, ::testing::Values(DType::bf16, DType::f32),
                         [](const auto& type) { return std::string(name_of(type.param)); });

}  // namespace
}  // namespace deltapipe
