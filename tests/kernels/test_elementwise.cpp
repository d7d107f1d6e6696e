#include "kernels/elementwise.h"
#include "kernels/reduce.h"
#include "tests/kernels/testing.h"
#include "tests/kernels/threads.h"

namespace deltapipe {
namespace {

using testing::Owned;

const Stream cpu = Stream::cpu();

TEST(Elementwise, AddsAndScales) {
  RandomStream r(testing::test_seed(), "data");
  for (const std::int64_t n : {1, 13, 70'001}) {
    Owned<float> a({n}), b({n}), out({n});
    a.normal(r);
    b.normal(r);
    kernels::add(cpu, a, b, out);
    for (std::int64_t i = 0; i < n; ++i) ASSERT_EQ(out[i], a[i] + b[i]);
    Owned<float> left = a, right = b, y = b;
    kernels::add(cpu, left, b, left);
    kernels::add(cpu, a, right, right);
    kernels::add_in_place(cpu, a, y);
    EXPECT_TRUE(testing::same_bits(left, out));
    EXPECT_TRUE(testing::same_bits(right, out));
    EXPECT_TRUE(testing::same_bits(y, out));
    kernels::scale_in_place(cpu, -0.3, y);
    for (std::int64_t i = 0; i < n; ++i) ASSERT_EQ(y[i], out[i] * -0.3f);
  }
  Owned<double> x({3});
  x.fill(1);
  kernels::scale_in_place(cpu, 0.3, x);
  EXPECT_EQ(x[2], 0.3);  // not rounded to float on the way
}

TEST(Elementwise, FillZeroClearsEveryType) {
  Owned<float> a({300'001});
  a.fill(1);
  kernels::fill_zero(cpu, a);
  for (const float x : a) ASSERT_EQ(x, 0.0f);
  Owned<std::int32_t> b({3});
  b.fill(7);
  kernels::fill_zero(cpu, b.tensor().rows(0, 2));
  EXPECT_EQ(b[0], 0);
  EXPECT_EQ(b[1], 0);
  EXPECT_EQ(b[2], 7);
}

TEST(CopyCast, ConvertsBetweenAllPairs) {
  RandomStream r(testing::test_seed(), "data");
  for (const std::int64_t n : {1, 17, 40'001}) {
    Owned<double> d({n}), d2({n});
    Owned<float> f({n}), f2({n});
    Owned<BFloat16> h({n}), h2({n});
    d.normal(r, 10.0);
    kernels::copy_cast(cpu, d, d2);
    EXPECT_TRUE(testing::same_bits(d, d2));
    kernels::copy_cast(cpu, d, f);
    for (std::int64_t i = 0; i < n; ++i) ASSERT_EQ(f[i], static_cast<float>(d[i]));
    kernels::copy_cast(cpu, f, f2);
    EXPECT_TRUE(testing::same_bits(f, f2));
    kernels::copy_cast(cpu, f, d2);
    for (std::int64_t i = 0; i < n; ++i) ASSERT_EQ(d2[i], static_cast<double>(f[i]));
    kernels::copy_cast(cpu, f, h);
    for (std::int64_t i = 0; i < n; ++i) {
      // eight significant bits: within half a unit of the last place
      ASSERT_LE(std::abs(to_float(h[i]) - f[i]), std::ldexp(1.0f, std::ilogb(f[i]) - 8));
      ASSERT_EQ(h[i].bits, to_bfloat16(f[i]).bits);
    }
    kernels::copy_cast(cpu, d, h2);
    EXPECT_TRUE(testing::same_bits(h, h2));
    kernels::copy_cast(cpu, h, h2);
    EXPECT_TRUE(testing::same_bits(h, h2));
    kernels::copy_cast(cpu, h, f2);
    kernels::copy_cast(cpu, h, d2);
    for (std::int64_t i = 0; i < n; ++i) {
      ASSERT_EQ(f2[i], to_float(h[i]));
      ASSERT_EQ(d2[i], static_cast<double>(f2[i]));
    }
  }
}

TEST(CopyCast, RoundsTiesToEvenAndKeepsSpecialValues) {
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<std::pair<float, float>> cases = {
      {1.0f + 0x1p-8f, 1.0f},                    // a tie, down to the even neighbour
      {1.0f + 3 * 0x1p-8f, 1.0f + 4 * 0x1p-8f},  // a tie, up to the even neighbour
      {3.4e38f, inf},                            // over the largest bfloat16
      {-inf, -inf},
      {-0.0f, -0.0f}};
  const auto n = static_cast<std::int64_t>(cases.size());
  Owned<float> f({n + 1}), back({n + 1});
  Owned<BFloat16> h({n + 1});
  for (std::int64_t i = 0; i < n; ++i) f[i] = cases[static_cast<std::size_t>(i)].first;
  f[n] = std::bit_cast<float>(0x7f800001u);  // a NaN whose payload lies in the bits that are cut off
  kernels::copy_cast(cpu, f, h);
  kernels::copy_cast(cpu, h, back);
  for (std::int64_t i = 0; i < n; ++i) {
    EXPECT_EQ(back[i], cases[static_cast<std::size_t>(i)].second);
    EXPECT_EQ(std::signbit(back[i]), std::signbit(f[i]));
  }
  EXPECT_TRUE(std::isnan(back[n]));
}

TEST(CopyCast, RefusesIntegers) {
  Owned<std::int32_t> i({3});
  Owned<float> f({3});
  EXPECT_THROW(kernels::copy_cast(cpu, i, f), InternalError);
  EXPECT_THROW(kernels::copy_cast(cpu, f, i), InternalError);
}

TEST(SumOfSquares, MatchesAPlainSum) {
  RandomStream r(testing::test_seed(), "data");
  // The last size has more than one block a partial sum.
  for (const std::int64_t n : {0, 1, 15, 16, 17, 16'385, 5'000'011}) {
    Owned<float> x({n});
    for (std::int64_t i = 0; i < n; ++i) x[i] = static_cast<float>(i % 97) - 48.5f + static_cast<float>(r.uniform(0));
    double expected = 3.5;
    for (const float v : x) expected += static_cast<double>(v) * v;
    Owned<double> out({1}), out64({1});
    out.fill(3.5);
    out64.fill(3.5);
    kernels::sum_of_squares(cpu, x, out, testing::no_workspace());
    kernels::sum_of_squares(cpu, x.cast<double>(), out64, testing::no_workspace());
    // Squares of floats are exact in double; the plain sum of 5e6 of them keeps 1e-16 * 5e6 at worst.
    EXPECT_NEAR(out[0], expected, 1e-9 * expected) << n;
    EXPECT_EQ(out[0], out64[0]);
  }
}

TEST(SumOfSquares, NanAndInfinityReachTheResult) {
  Owned<float> x({40'000});
  for (const std::int64_t at : {0, 39'999}) {
    Owned<double> out({1});
    x.fill(1);
    x[at] = std::numeric_limits<float>::infinity();
    out.fill(0);
    kernels::sum_of_squares(cpu, x, out, testing::no_workspace());
    EXPECT_EQ(out[0], std::numeric_limits<double>::infinity());
    x[at] = std::numeric_limits<float>::quiet_NaN();
    out.fill(0);
    kernels::sum_of_squares(cpu, x, out, testing::no_workspace());
    EXPECT_TRUE(std::isnan(out[0]));
  }
}

TEST(SumOfSquares, DoesNotOverflowInFloat) {
  Owned<float> x({2});
  x.fill(1e30f);
  Owned<double> out({1});
  out.fill(0);
  kernels::sum_of_squares(cpu, x, out, testing::no_workspace());
  EXPECT_NEAR(out[0], 2e60, 1e54);  // 1e30 is not exact in float: 6e-8 relative
}

TEST(SumOfSquares, DoesNotDependOnThreadsOrAddress) {
  RandomStream r(testing::test_seed(), "data");
  const std::int64_t n = 100'003;
  Owned<float> x({n}), shifted({n + 1});
  x.normal(r);
  std::copy(x.begin(), x.end(), shifted.begin() + 1);
  testing::expect_same_on_any_threads([&] {
    Owned<double> a({1}), b({1});
    a.fill(0);
    b.fill(0);
    kernels::sum_of_squares(cpu, x, a, testing::no_workspace());
    kernels::sum_of_squares(cpu, shifted.tensor().rows(1, n + 1), b, testing::no_workspace());
    EXPECT_EQ(a[0], b[0]);
    return std::vector{a, b};
  });
}

TEST(Elementwise, ADryStreamTouchesNothing) {
  Owned<float> a({4}), b({4});
  a.fill(1);
  b.fill(2);
  const Stream dry = Stream::dry({});
  kernels::add_in_place(dry, a, b);
  kernels::fill_zero(dry, b);
  kernels::scale_in_place(dry, 3, b);
  for (const float x : b) EXPECT_EQ(x, 2.0f);
  EXPECT_THROW(kernels::add_in_place(dry, a, b.tensor().rows(0, 2)), InternalError);  // shapes are still checked
}

}  // namespace
}  // namespace deltapipe
