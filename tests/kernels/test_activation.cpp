#include "kernels/activation.h"
#include "tests/kernels/testing.h"
#include "tests/kernels/threads.h"

namespace deltapipe {
namespace {

using testing::Owned;

const Stream cpu = Stream::cpu();

TEST(SquaredRelu, ForwardMatchesDefinition) {
  RandomStream r(testing::test_seed(), "data");
  for (const std::int64_t n : {1, 7, 40'009}) {
    Owned<float> x({n}), y({n});
    x.normal(r);
    kernels::squared_relu_forward(cpu, x, y);
    for (std::int64_t i = 0; i < n; ++i) ASSERT_EQ(y[i], x[i] > 0 ? x[i] * x[i] : 0.0f);
    kernels::squared_relu_forward(cpu, x, x);  // in place
    EXPECT_TRUE(testing::same_bits(x, y));
  }
}

TEST(SquaredRelu, GradientMatchesFiniteDifferences) {
  RandomStream r(testing::test_seed(), "data");
  Owned<double> x({9, 7}), y({9, 7}), dy({9, 7}), dx({9, 7});
  x.normal(r);
  dy.normal(r);
  kernels::squared_relu_backward(cpu, dy, x, dx);
  const auto loss = [&] {
    kernels::squared_relu_forward(cpu, x, y);
    return testing::inner(y, dy);
  };
  // The second derivative jumps at 0: an x within the step of 1e-5 is off by up to the step.
  testing::expect_gradient(x, dx, loss, "dx", 1e-5);
  kernels::squared_relu_backward(cpu, dy, x, dy);  // in place
  EXPECT_TRUE(testing::same_bits(dy, dx));
}

TEST(SquaredRelu, NanIsNotHidden) {
  Owned<float> x({3}), y({3}), dy({3}), dx({3});
  x.fill(std::numeric_limits<float>::quiet_NaN());
  dy.fill(1);
  kernels::squared_relu_forward(cpu, x, y);
  kernels::squared_relu_backward(cpu, dy, x, dx);
  for (std::int64_t i = 0; i < 3; ++i) {
    EXPECT_TRUE(std::isnan(y[i]));
    EXPECT_TRUE(std::isnan(dx[i]));
  }
}

TEST(GatedSilu, ForwardMatchesDefinition) {
  RandomStream r(testing::test_seed(), "data");
  for (const std::int64_t n : {1, 7, 40'009}) {
    Owned<float> gate({n}), up({n}), y({n});
    Owned<double> expected({n});
    gate.normal(r, 4.0);
    up.normal(r);
    for (std::int64_t i = 0; i < n; ++i) {
      expected[i] = static_cast<double>(gate[i]) / (1 + std::exp(-static_cast<double>(gate[i]))) * up[i];
    }
    kernels::gated_silu_forward(cpu, gate, up, y);
    EXPECT_LT(testing::relative_rms(y, expected), 5e-7);  // exp within 2 ulp, then four roundings
    kernels::gated_silu_forward(cpu, gate, up, gate);     // in place
    EXPECT_TRUE(testing::same_bits(gate, y));
  }
}

TEST(GatedSilu, LargeGatesStayFinite) {
  Owned<float> gate({2}), up({2}), y({2});
  gate[0] = 1000;
  gate[1] = -1000;
  up.fill(2);
  kernels::gated_silu_forward(cpu, gate, up, y);
  EXPECT_EQ(y[0], 2000.0f);
  EXPECT_EQ(y[1], 0.0f);
}

TEST(GatedSilu, GradientsMatchFiniteDifferences) {
  RandomStream r(testing::test_seed(), "data");
  const Shape shape{9, 7};
  Owned<double> gate(shape), up(shape), y(shape), dy(shape), dgate(shape), dup(shape);
  gate.normal(r);
  up.normal(r);
  dy.normal(r);
  kernels::gated_silu_backward(cpu, dy, gate, up, dgate, dup);
  const auto loss = [&] {
    kernels::gated_silu_forward(cpu, gate, up, y);
    return testing::inner(y, dy);
  };
  testing::expect_gradient(gate, dgate, loss, "dgate");
  testing::expect_gradient(up, dup, loss, "dup");
  {
    Owned<double> g = gate, u = up;
    kernels::gated_silu_backward(cpu, dy, g, u, g, u);
    EXPECT_TRUE(testing::same_bits(g, dgate));
    EXPECT_TRUE(testing::same_bits(u, dup));
  }
  {
    Owned<double> d = dy, other(shape);
    kernels::gated_silu_backward(cpu, d, gate, up, other, d);
    EXPECT_TRUE(testing::same_bits(other, dgate));
    EXPECT_TRUE(testing::same_bits(d, dup));
  }
}

TEST(Activation, FloatGradientsMatchDouble) {
  RandomStream r(testing::test_seed(), "data");
  const Shape shape{331};
  Owned<float> gate(shape), up(shape), dy(shape), dgate(shape), dup(shape), dx(shape);
  gate.normal(r, 3.0);
  up.normal(r);
  dy.normal(r);
  const auto gate64 = gate.cast<double>(), up64 = up.cast<double>(), dy64 = dy.cast<double>();
  Owned<double> dgate64(shape), dup64(shape), dx64(shape);
  kernels::gated_silu_backward(cpu, dy, gate, up, dgate, dup);
  kernels::squared_relu_backward(cpu, dy, gate, dx);
  kernels::gated_silu_backward(cpu, dy64, gate64, up64, dgate64, dup64);
  kernels::squared_relu_backward(cpu, dy64, gate64, dx64);
  // A handful of roundings of 6e-8 each.
  EXPECT_LT(testing::relative_rms(dgate, dgate64), 1e-6);
  EXPECT_LT(testing::relative_rms(dup, dup64), 1e-6);
  EXPECT_LT(testing::relative_rms(dx, dx64), 1e-6);
}

TEST(Activation, ResultsDoNotDependOnThreads) {
  RandomStream r(testing::test_seed(), "data");
  const Shape shape{50'003};
  Owned<float> gate(shape), up(shape), dy(shape);
  gate.normal(r);
  up.normal(r);
  dy.normal(r);
  testing::expect_same_on_any_threads([&] {
    Owned<float> y(shape), dgate(shape), dup(shape), z(shape), dz(shape);
    kernels::gated_silu_forward(cpu, gate, up, y);
    kernels::gated_silu_backward(cpu, dy, gate, up, dgate, dup);
    kernels::squared_relu_forward(cpu, gate, z);
    kernels::squared_relu_backward(cpu, dy, gate, dz);
    return std::vector{y, dgate, dup, z, dz};
  });
}

}  // namespace
}  // namespace deltapipe
