#include "kernels/linear.h"
#include "tests/kernels/testing.h"
#include "tests/kernels/threads.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace deltapipe {
namespace {

using testing::Owned;

struct Size {
  std::int64_t m, out, in;
};
// One, primes, sizes over one block of the parallel product in either direction, no rows.
const Size sizes[] = {{1, 1, 1}, {3, 7, 5}, {211, 13, 37}, {5, 307, 64}, {130, 129, 257}, {0, 3, 2}};

/// Plain product in double: y = x w^T + bias.
Owned<double> reference_forward(const Owned<float>& x, const Owned<float>& w, const Owned<float>& bias, Size s) {
  Owned<double> y({s.m, s.out});
  for (std::int64_t i = 0; i < s.m; ++i) {
    for (std::int64_t o = 0; o < s.out; ++o) {
      double sum = bias[o];
      for (std::int64_t k = 0; k < s.in; ++k) sum += static_cast<double>(x[i * s.in + k]) * w[o * s.in + k];
      y[i * s.out + o] = sum;
    }
  }
  return y;
}

TEST(Linear, ForwardMatchesDefinition) {
  RandomStream r(testing::test_seed(), "data");
  for (const Size s : sizes) {
    Owned<float> x({s.m, s.in}), w({s.out, s.in}), bias({s.out}), y({s.m, s.out});
    x.normal(r);
    w.normal(r);
    bias.normal(r);
    kernels::linear_forward(Stream::cpu(), x, w, bias, y);
    // A float sum of up to 257 products keeps about sqrt(257) * 6e-8 relative.
    EXPECT_LT(testing::relative_rms(y, reference_forward(x, w, bias, s)), 1e-6) << s.m << " " << s.out << " " << s.in;
    y.fill(std::numeric_limits<float>::quiet_NaN());
    kernels::linear_forward(Stream::cpu(), x, w, Tensor(), y);
    bias.fill(0);
    EXPECT_LT(testing::relative_rms(y, reference_forward(x, w, bias, s)), 1e-6) << s.m << " " << s.out << " " << s.in;
  }
}

TEST(Linear, GradientsMatchFiniteDifferences) {
  RandomStream r(testing::test_seed(), "data");
  const Size s{11, 7, 5};
  Owned<double> x({s.m, s.in}), w({s.out, s.in}), bias({s.out}), y({s.m, s.out}), dy({s.m, s.out}), dx({s.m, s.in}),
      dw({s.out, s.in}), dbias({s.out});
  x.normal(r);
  w.normal(r);
  bias.normal(r);
  dy.normal(r);
  dw.fill(0);
  dbias.fill(0);
  const auto loss = [&] {
    kernels::linear_forward(Stream::cpu(), x, w, bias, y);
    return testing::inner(y, dy);
  };
  kernels::linear_backward_input(Stream::cpu(), dy, w, dx, false, testing::no_workspace());
  kernels::linear_backward_weight(Stream::cpu(), dy, x, dw, dbias);
  testing::expect_gradient(x, dx, loss, "dx");
  testing::expect_gradient(w, dw, loss, "dw");
  testing::expect_gradient(bias, dbias, loss, "dbias");
}

TEST(Linear, GradientsAccumulate) {
  RandomStream r(testing::test_seed(), "data");
  const Size s{9, 4, 6};
  Owned<double> x({s.m, s.in}), w({s.out, s.in}), dy({s.m, s.out}), once({s.m, s.in}), dw({s.out, s.in}),
      dbias({s.out});
  x.normal(r);
  w.normal(r);
  dy.normal(r);
  const Stream cpu = Stream::cpu();
  kernels::linear_backward_input(cpu, dy, w, once, false, testing::no_workspace());
  Owned<double> twice = once;
  kernels::linear_backward_input(cpu, dy, w, twice, true, testing::no_workspace());
  for (std::int64_t i = 0; i < once.size(); ++i) EXPECT_NEAR(twice[i], 2 * once[i], 1e-13);  // rounding of a few sums
  dw.fill(0);
  dbias.fill(0);
  kernels::linear_backward_weight(cpu, dy, x, dw, Tensor());
  kernels::linear_backward_weight(cpu, dy, x, Tensor(), dbias);
  const Owned<double> dw1 = dw, dbias1 = dbias;
  kernels::linear_backward_weight(cpu, dy, x, dw, dbias);
  for (std::int64_t i = 0; i < dw.size(); ++i) EXPECT_NEAR(dw[i], 2 * dw1[i], 1e-13);
  for (std::int64_t i = 0; i < dbias.size(); ++i) EXPECT_NEAR(dbias[i], 2 * dbias1[i], 1e-13);
}

TEST(Linear, FloatGradientsMatchDouble) {
  RandomStream r(testing::test_seed(), "data");
  for (const Size s : sizes) {
    Owned<float> x({s.m, s.in}), w({s.out, s.in}), dy({s.m, s.out}), dx({s.m, s.in}), dw({s.out, s.in}), dbias({s.out});
    x.normal(r);
    w.normal(r);
    dy.normal(r);
    dw.fill(0);
    dbias.fill(0);
    const auto x64 = x.cast<double>(), w64 = w.cast<double>(), dy64 = dy.cast<double>();
    auto dx64 = dx.cast<double>(), dw64 = dw.cast<double>(), dbias64 = dbias.cast<double>();
    const Stream cpu = Stream::cpu();
    kernels::linear_backward_input(cpu, dy, w, dx, false, testing::no_workspace());
    kernels::linear_backward_weight(cpu, dy, x, dw, dbias);
    kernels::linear_backward_input(cpu, dy64, w64, dx64, false, testing::no_workspace());
    kernels::linear_backward_weight(cpu, dy64, x64, dw64, dbias64);
    // As in forward; a sum that happens to cancel costs a little more.
    EXPECT_LT(testing::relative_rms(dx, dx64), 2e-6);
    EXPECT_LT(testing::relative_rms(dw, dw64), 2e-6);
    EXPECT_LT(testing::relative_rms(dbias, dbias64), 2e-6);
  }
}

TEST(Linear, ResultsDoNotDependOnThreads) {
  RandomStream r(testing::test_seed(), "data");
  const Size s{301, 203, 65};
  Owned<float> x({s.m, s.in}), w({s.out, s.in}), bias({s.out}), dy({s.m, s.out});
  x.normal(r);
  w.normal(r);
  bias.normal(r);
  dy.normal(r);
  testing::expect_same_on_any_threads([&] {
    Owned<float> y({s.m, s.out}), dx({s.m, s.in}), dw({s.out, s.in}), dbias({s.out});
    dw.fill(0);
    dbias.fill(0);
    kernels::linear_forward(Stream::cpu(), x, w, bias, y);
    kernels::linear_backward_input(Stream::cpu(), dy, w, dx, false, testing::no_workspace());
    kernels::linear_backward_weight(Stream::cpu(), dy, x, dw, dbias);
    return std::vector{y, dx, dw, dbias};
  });
}

TEST(Linear, WhatIsBeyondTheOutputsOfARowIsLeftAlone) {
  RandomStream r(testing::test_seed(), "data");
  const Size s{21, 13, 8};
  const std::int64_t row = 16;
  Owned<double> x({s.m, s.in}), w({s.out, s.in}), bias({s.out}), dy({s.m, s.out}), y({s.m, s.out}), dx({s.m, s.in}),
      dw({s.out, s.in}), dbias({s.out});
  for (Owned<double>* t : {&x, &w, &bias, &dy}) t->normal(r);
  dw.fill(1);
  dbias.fill(2);
  Owned<double> dx_of_long({s.m, s.in}), dw_of_long = dw, dbias_of_long = dbias, long_y({s.m, row}),
                                         long_dy({s.m, row});
  const double nan = std::numeric_limits<double>::quiet_NaN();
  long_y.fill(nan);
  long_dy.fill(nan);
  for (std::int64_t t = 0; t < s.m; ++t) std::copy_n(dy.begin() + t * s.out, s.out, long_dy.begin() + t * row);
  const Stream cpu = Stream::cpu();
  for (const Tensor& b : {Tensor(), bias.tensor()}) {
    kernels::linear_forward(cpu, x, w, b, y);
    kernels::linear_forward(cpu, x, w, b, long_y);
    for (std::int64_t t = 0; t < s.m; ++t) {
      for (std::int64_t o = 0; o < row; ++o) {
        if (o >= s.out) {
          EXPECT_TRUE(std::isnan(long_y[t * row + o]));
        } else {
          EXPECT_NEAR(long_y[t * row + o], y[t * s.out + o], 1e-14);  // a sum of eight products, its order free
        }
      }
    }
  }
  kernels::linear_backward_input(cpu, dy, w, dx, false, testing::no_workspace());
  kernels::linear_backward_input(cpu, long_dy, w, dx_of_long, false, testing::no_workspace());
  kernels::linear_backward_weight(cpu, dy, x, dw, dbias);
  kernels::linear_backward_weight(cpu, long_dy, x, dw_of_long, dbias_of_long);
  EXPECT_LT(testing::relative_rms(dx_of_long, dx), 1e-14);
  EXPECT_LT(testing::relative_rms(dw_of_long, dw), 1e-14);
  EXPECT_LT(testing::relative_rms(dbias_of_long, dbias), 1e-14);
}

TEST(Linear, WrongShapesAndTypesAreErrors) {
  Owned<float> x({3, 4}), w({5, 4}), y({3, 5}), narrow({3, 4}), long_y({4, 5}), dw({5, 4}), dbias({5}), six({6});
  Owned<double> w64({5, 4});
  const Stream cpu = Stream::cpu();
  for (const Tensor& t : {narrow.tensor(), long_y.tensor(), six.tensor(), w64.tensor()}) {
    EXPECT_THROW(kernels::linear_forward(cpu, x, w, Tensor(), t), InternalError);
    EXPECT_THROW(kernels::linear_backward_input(cpu, t, w, x, false, testing::no_workspace()), InternalError);
    EXPECT_THROW(kernels::linear_backward_weight(cpu, t, x, dw, Tensor()), InternalError);
    EXPECT_THROW(kernels::linear_backward_weight(cpu, t, x, Tensor(), dbias), InternalError);
  }
  EXPECT_THROW(kernels::linear_forward(cpu, x, w64, Tensor(), y), InternalError);
  EXPECT_THROW(kernels::linear_backward_input(cpu, y, w64, x, false, testing::no_workspace()), InternalError);
  EXPECT_THROW(kernels::linear_backward_weight(cpu, y, x, w64, Tensor()), InternalError);
  EXPECT_THROW(kernels::linear_backward_weight(cpu, y, x, dw, six), InternalError);
}

}  // namespace
}  // namespace deltapipe
