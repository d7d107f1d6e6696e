#include "kernels/rms_norm.h"
#include "tests/kernels/testing.h"

namespace deltapipe {
namespace {

using testing::Owned;

TEST(RmsNorm, ForwardMatchesDefinition) {
  RandomStream r(testing::test_seed(), "data");
  for (const auto& [t, d] : {std::pair{1, 1}, {3, 7}, {65, 130}}) {
    Owned<float> x({t, d}), w({d}), y({t, d}), rstd({t});
    x.normal(r);
    w.normal(r);
    kernels::rms_norm_forward(Stream::cpu(), x, w, 1e-5f, y, rstd);
    Owned<double> expected({t, d});
    for (int i = 0; i < t; ++i) {
      double sum = 0;
      for (int j = 0; j < d; ++j) sum += static_cast<double>(x[i * d + j]) * x[i * d + j];
      for (int j = 0; j < d; ++j) expected[i * d + j] = w[j] * (x[i * d + j] / std::sqrt(sum / d + 1e-5));
    }
    // A float sum of d squares keeps about 1e-7 relative.
    EXPECT_LT(testing::relative_rms(y, expected), 1e-6);
  }
}

TEST(RmsNorm, GradientsMatchFiniteDifferences) {
  RandomStream r(testing::test_seed(), "data");
  const int t = 5, d = 9;
  Owned<double> x({t, d}), w({d}), y({t, d}), rstd({t}), dy({t, d}), dx({t, d}), dw({d});
  x.normal(r);
  w.normal(r);
  dy.normal(r);
  dw.fill(0);
  const auto loss = [&] {
    kernels::rms_norm_forward(Stream::cpu(), x, w, 1e-5f, y, rstd);
    return testing::inner(y, dy);
  };
  loss();
  kernels::rms_norm_backward(Stream::cpu(), dy, x, w, rstd, Tensor(), dx, dw, testing::no_workspace());
  testing::expect_gradient(x, dx, loss, "dx");
  testing::expect_gradient(w, dw, loss, "dw");
  // A residual is added: from elsewhere, from dx itself, and with everything in the memory of dy.
  Owned<double> residual({t, d}), apart({t, d}), in_place = dx;
  residual.normal(r);
  kernels::rms_norm_backward(Stream::cpu(), dy, x, w, rstd, residual, apart, Tensor(), testing::no_workspace());
  kernels::rms_norm_backward(Stream::cpu(), dy, x, w, rstd, in_place, in_place, Tensor(), testing::no_workspace());
  Owned<double> all = dy;
  kernels::rms_norm_backward(Stream::cpu(), all, x, w, rstd, all, all, Tensor(), testing::no_workspace());
  for (std::int64_t i = 0; i < dx.size(); ++i) {
    constexpr double fused = 1e-14;  // the last product and the sum may be one fused multiply-add
    EXPECT_NEAR(apart[i], residual[i] + dx[i], fused);
    EXPECT_NEAR(in_place[i], 2 * dx[i], fused);
    EXPECT_NEAR(all[i], dy[i] + dx[i], fused);
  }
}

TEST(RmsNorm, ForwardOfASumIsTheSumsForward) {
  RandomStream r(testing::test_seed(), "data");
  const int t = 9, d = 33;
  Owned<double> x({t, d}), h({t, d}), w({d}), expected({t, d}), expected_rstd({t}), y({t, d}), rstd({t}), sum({t, d});
  for (Owned<double>* z : {&x, &h, &w}) z->normal(r);
  Owned<double> truth({t, d});
  for (std::int64_t i = 0; i < truth.size(); ++i) truth[i] = x[i] + h[i];
  kernels::rms_norm_forward(Stream::cpu(), truth, w, 1e-5f, expected, expected_rstd);
  const auto expect_same = [&](const Owned<double>& s) {
    for (std::int64_t i = 0; i < truth.size(); ++i) {
      ASSERT_EQ(s[i], truth[i]);
      ASSERT_EQ(y[i], expected[i]);
    }
    for (int i = 0; i < t; ++i) ASSERT_EQ(rstd[i], expected_rstd[i]);
  };
  kernels::add_rms_norm_forward(Stream::cpu(), x, h, w, 1e-5f, sum, y, rstd);
  expect_same(sum);
  for (Owned<double>* in_place : {&x, &h}) {  // sum in the memory of either
    const Owned<double> kept = *in_place;
    kernels::add_rms_norm_forward(Stream::cpu(), x, h, w, 1e-5f, *in_place, y, rstd);
    expect_same(*in_place);
    *in_place = kept;
  }
}

}  // namespace
}  // namespace deltapipe
