#include "kernels/rope.h"
#include "tests/kernels/testing.h"
#include "tests/kernels/threads.h"

namespace deltapipe {
namespace {

using testing::Owned;

const Stream cpu = Stream::cpu();
constexpr float factor = 1.2995732f;

struct Size {
  std::int64_t tokens, heads, d;
};
// d = 130 and 256 have more frequencies than one chunk of the CPU code.
const Size sizes[] = {{1, 1, 2}, {5, 3, 14}, {67, 2, 130}, {9, 5, 256}};

template <class T>
Owned<T> frequencies_of(std::int64_t d) {
  Owned<T> f({d / 2});
  for (std::int64_t i = 0; i < d / 2; ++i) {
    f[i] = static_cast<T>(std::pow(10000.0, -2.0 * static_cast<double>(i) / static_cast<double>(d)));
  }
  return f;
}

Owned<std::int32_t> random_positions(RandomStream& r, std::int64_t tokens) {
  Owned<std::int32_t> p({tokens});
  for (std::int32_t& x : p) x = static_cast<std::int32_t>(r.next_below(65'536));
  p[0] = 65'535;
  return p;
}

/// Plain rotation with angles rounded to T, as the contract says, and the rest in double.
template <class T>
Owned<double> reference(const Owned<T>& x, const Owned<std::int32_t>& positions, const Owned<T>& frequencies, Size s) {
  Owned<double> out({s.tokens, s.heads, s.d});
  const std::int64_t half = s.d / 2;
  for (std::int64_t t = 0; t < s.tokens; ++t) {
    for (std::int64_t h = 0; h < s.heads; ++h) {
      for (std::int64_t i = 0; i < half; ++i) {
        const auto angle = static_cast<double>(static_cast<T>(positions[t]) * frequencies[i]);
        const double c = std::cos(angle) * static_cast<double>(factor),
                     n = std::sin(angle) * static_cast<double>(factor);
        const std::int64_t at = (t * s.heads + h) * s.d + i;
        const double a = x[at], b = x[at + half];
        out[at] = a * c - b * n;
        out[at + half] = b * c + a * n;
      }
    }
  }
  return out;
}

template <class T>
void check_forward(double tolerance) {
  RandomStream r(testing::test_seed(), "data");
  for (const Size s : sizes) {
    const Shape shape{s.tokens, s.heads, s.d};
    Owned<T> x(shape), out(shape);
    x.normal(r);
    const auto positions = random_positions(r, s.tokens);
    const auto frequencies = frequencies_of<T>(s.d);
    kernels::rope_forward(cpu, x, positions, frequencies, factor, out);
    const auto expected = reference(x, positions, frequencies, s);
    for (std::int64_t i = 0; i < x.size(); ++i) ASSERT_NEAR(out[i], expected[i], tolerance) << s.d << " at " << i;
    kernels::rope_forward(cpu, x, positions, frequencies, factor, x);  // in place
    EXPECT_TRUE(testing::same_bits(x, out));
  }
}

// Sine and cosine within 2 ulp (1.2e-7), two products and a sum of values up to about 5.
TEST(Rope, ForwardMatchesDefinitionInFloat) { check_forward<float>(3e-6); }
TEST(Rope, ForwardMatchesDefinitionInDouble) { check_forward<double>(1e-14); }

TEST(Rope, GradientMatchesFiniteDifferences) {
  RandomStream r(testing::test_seed(), "data");
  for (const Size s : {Size{5, 3, 14}, {3, 1, 130}}) {
    const Shape shape{s.tokens, s.heads, s.d};
    Owned<double> x(shape), y(shape), dy(shape), dx(shape);
    x.normal(r);
    dy.normal(r);
    const auto positions = random_positions(r, s.tokens);
    const auto frequencies = frequencies_of<double>(s.d);
    kernels::rope_backward(cpu, dy, positions, frequencies, factor, dx);
    const auto loss = [&] {
      kernels::rope_forward(cpu, x, positions, frequencies, factor, y);
      return testing::inner(y, dy);
    };
    testing::expect_gradient(x, dx, loss, "dx");
    kernels::rope_backward(cpu, dy, positions, frequencies, factor, dy);  // in place
    EXPECT_TRUE(testing::same_bits(dy, dx));
  }
}

TEST(Rope, FloatBackwardMatchesDouble) {
  RandomStream r(testing::test_seed(), "data");
  const Size s{33, 3, 70};
  const Shape shape{s.tokens, s.heads, s.d};
  Owned<float> dy(shape), dx(shape);
  dy.normal(r);
  Owned<std::int32_t> positions({s.tokens});
  for (std::int32_t& p : positions) p = static_cast<std::int32_t>(r.next_below(16));
  const auto frequencies = frequencies_of<float>(s.d);
  Owned<double> dx64(shape);
  kernels::rope_backward(cpu, dy, positions, frequencies, factor, dx);
  kernels::rope_backward(cpu, dy.cast<double>(), positions, frequencies.cast<double>(), factor, dx64);
  // Angles up to 16 are rounded to 1e-6 in float.
  EXPECT_LT(testing::relative_rms(dx, dx64), 2e-6);
}

TEST(Rope, ResultsDoNotDependOnThreads) {
  RandomStream r(testing::test_seed(), "data");
  const Size s{301, 3, 66};
  const Shape shape{s.tokens, s.heads, s.d};
  Owned<float> x(shape);
  x.normal(r);
  const auto positions = random_positions(r, s.tokens);
  const auto frequencies = frequencies_of<float>(s.d);
  testing::expect_same_on_any_threads([&] {
    Owned<float> y(shape), dx(shape);
    kernels::rope_forward(cpu, x, positions, frequencies, factor, y);
    kernels::rope_backward(cpu, x, positions, frequencies, factor, dx);
    return std::vector{y, dx};
  });
}

}  // namespace
}  // namespace deltapipe
