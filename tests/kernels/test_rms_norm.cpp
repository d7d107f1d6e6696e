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
  kernels::rms_norm_backward(Stream::cpu(), dy, x, w, rstd, dx, false, dw, testing::no_workspace());
  testing::expect_gradient(x, dx, loss, "dx");
  testing::expect_gradient(w, dw, loss, "dw");
  // accumulate adds to what is there
  Owned<double> twice = dx;
  kernels::rms_norm_backward(Stream::cpu(), dy, x, w, rstd, twice, true, Tensor(), testing::no_workspace());
  for (std::int64_t i = 0; i < dx.size(); ++i) EXPECT_DOUBLE_EQ(twice[i], 2 * dx[i]);
}

}  // namespace
}  // namespace deltapipe
