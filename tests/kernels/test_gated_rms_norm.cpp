#include "kernels/gated_rms_norm.h"

#include "core/parallel.h"
#include "tests/kernels/testing.h"

#include <cstring>

namespace deltapipe {
namespace {

using testing::Owned;

template <class T>
struct Norm {
  std::int64_t t, h, v;
  Owned<T> x, gate, w, dy, y, rstd, dx, dgate, dw;

  Norm(RandomStream& r, std::int64_t tokens, std::int64_t heads, std::int64_t channels)
      : t(tokens),
        h(heads),
        v(channels),
        x({t, h, v}),
        gate({t, h, v}),
        w({v}),
        dy({t, h, v}),
        y({t, h, v}),
        rstd({t, h}),
        dx({t, h, v}),
        dgate({t, h, v}),
        dw({v}) {
    x.normal(r);
    gate.normal(r, 2.0);
    w.normal(r, 0.3, 1.0);
    dy.normal(r);
    dw.fill(0);
  }
  void forward() { kernels::gated_rms_norm_forward(Stream::cpu(), x, gate, w, 1e-5f, y, rstd); }
  void backward() {
    kernels::gated_rms_norm_backward(Stream::cpu(), dy, x, gate, w, rstd, dx, dgate, dw, testing::no_workspace());
  }
};

TEST(GatedRmsNorm, ForwardMatchesDefinition) {
  RandomStream r(testing::test_seed(), "data");
  for (const auto& [t, h, v] : {std::tuple{1, 1, 1}, {3, 2, 7}, {65, 5, 130}}) {
    Norm<float> n(r, t, h, v);
    n.forward();
    Owned<double> expected({t, h, v});
    for (int i = 0; i < t * h; ++i) {
      double sum = 0;
      for (int j = 0; j < v; ++j) sum += static_cast<double>(n.x[i * v + j]) * n.x[i * v + j];
      const double rstd = 1 / std::sqrt(sum / v + static_cast<double>(1e-5f));
      EXPECT_NEAR(n.rstd[i], rstd, 1e-6 * rstd);
      for (int j = 0; j < v; ++j) {
        const std::int64_t at = i * v + j;
        expected[at] = n.x[at] * rstd * n.w[j] / (1 + std::exp(-static_cast<double>(n.gate[at])));
      }
    }
    // A float sum of v squares keeps about 1e-7 relative, the sigmoid two ulp.
    EXPECT_LT(testing::relative_rms(n.y, expected), 1e-6);
  }
}

TEST(GatedRmsNorm, GradientsMatchFiniteDifferences) {
  RandomStream r(testing::test_seed(), "data");
  Norm<double> n(r, 6, 3, 9);
  const auto loss = [&] {
    n.forward();
    return testing::inner(n.y, n.dy);
  };
  loss();
  n.backward();
  testing::expect_gradient(n.x, n.dx, loss, "dx");
  testing::expect_gradient(n.gate, n.dgate, loss, "dgate");
  testing::expect_gradient(n.w, n.dw, loss, "dw");
}

TEST(GatedRmsNorm, OutputsMayAliasAndSumsAccumulate) {
  RandomStream r(testing::test_seed(), "data");
  Norm<double> n(r, 200, 3, 33);
  n.forward();
  n.backward();
  Owned<double> dy = n.dy, x = n.x, gate = n.gate, dw = n.dw;
  kernels::gated_rms_norm_backward(Stream::cpu(), dy, n.x, gate, n.w, n.rstd, dy, gate, dw, testing::no_workspace());
  EXPECT_EQ(testing::relative_rms(dy, n.dx), 0.0);
  EXPECT_EQ(testing::relative_rms(gate, n.dgate), 0.0);
  for (std::int64_t i = 0; i < dw.size(); ++i) EXPECT_DOUBLE_EQ(dw[i], 2 * n.dw[i]);
  kernels::gated_rms_norm_backward(Stream::cpu(), n.dy, x, n.gate, n.w, n.rstd, x, n.dgate, Tensor(),
                                   testing::no_workspace());
  EXPECT_EQ(testing::relative_rms(x, n.dx), 0.0);
}

TEST(GatedRmsNorm, FloatGradientsFollowDoubleAndNoThreadChangesABit) {
  RandomStream r(testing::test_seed(), "data");
  Norm<float> n(r, 3000, 4, 32);
  Norm<double> exact(r, 3000, 4, 32);
  exact.x = n.x.cast<double>();
  exact.gate = n.gate.cast<double>();
  exact.w = n.w.cast<double>();
  exact.dy = n.dy.cast<double>();
  exact.forward();
  exact.backward();
  set_num_threads(1);
  n.forward();
  n.backward();
  EXPECT_LT(testing::relative_rms(n.dx, exact.dx), 2e-6);
  EXPECT_LT(testing::relative_rms(n.dgate, exact.dgate), 2e-6);
  EXPECT_LT(testing::relative_rms(n.dw, exact.dw), 1e-5);  // sums of 12,000 rows
  const Owned<float> dw = n.dw;
  n.dw.fill(0);
  set_num_threads(2);
  n.backward();
  set_num_threads(0);
  EXPECT_EQ(std::memcmp(dw.begin(), n.dw.begin(), static_cast<std::size_t>(dw.size()) * sizeof(float)), 0);
}

}  // namespace
}  // namespace deltapipe
