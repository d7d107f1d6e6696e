// The CPU's building blocks of KDA: small products and the gate.
#include "kernels/cpu/kda_gate.h"
#include "kernels/cpu/small_gemm.h"
#include "tests/kernels/testing.h"

namespace deltapipe::kernels::cpu {
namespace {

using testing::Owned;

template <class T>
void expect_products(RandomStream& r, std::int64_t m, std::int64_t n, std::int64_t k, double tolerance) {
  const std::int64_t lda = k + 3, ldt = m + 1, ldb = n + 2, ldc = n + 5;  // rows further apart than they are long
  Owned<T> a({m, lda}), at({k, ldt}), b({k, ldb}), c({m, ldc});
  a.normal(r);
  b.normal(r);
  c.normal(r);
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t p = 0; p < k; ++p) at[p * ldt + i] = a[i * lda + p];
  }
  Owned<double> plain({m, ldc}), added({m, ldc});
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = 0; j < ldc; ++j) {
      double sum = 0;
      for (std::int64_t p = 0; p < k && j < n; ++p) sum += static_cast<double>(a[i * lda + p]) * b[p * ldb + j];
      added[i * ldc + j] = static_cast<double>(c[i * ldc + j]) + sum;
      plain[i * ldc + j] = j < n ? sum : static_cast<double>(c[i * ldc + j]);  // beyond n nothing is written
    }
  }
  Owned<T> c1 = c, c2 = c, c3 = c;
  small_gemm<false>(m, n, k, a.begin(), lda, 1, b.begin(), ldb, c1.begin(), ldc);
  small_gemm<true>(m, n, k, a.begin(), lda, 1, b.begin(), ldb, c2.begin(), ldc);
  small_gemm<false>(m, n, k, at.begin(), 1, ldt, b.begin(), ldb, c3.begin(), ldc);
  EXPECT_LT(testing::relative_rms(c1, plain), tolerance) << m << ' ' << n << ' ' << k;
  EXPECT_LT(testing::relative_rms(c2, added), tolerance) << m << ' ' << n << ' ' << k;
  EXPECT_LT(testing::relative_rms(c3, plain), tolerance) << m << ' ' << n << ' ' << k;
}

TEST(SmallGemm, MatchesTripleLoop) {
  RandomStream r(testing::test_seed(), "data");
  for (std::int64_t m : {1, 2, 5, 6, 7, 17}) {
    for (std::int64_t n : {1, 7, 8, 16, 27, 64}) {
      for (std::int64_t k : {1, 9, 64}) {
        expect_products<float>(r, m, n, k, 1e-6);  // sums of 64 products
        expect_products<double>(r, m, n, k, 1e-14);
      }
    }
  }
}

TEST(SmallGemm, TransposeMovesEveryElement) {
  RandomStream r(testing::test_seed(), "data");
  for (const auto& [m, n] : {std::pair{1, 1}, {8, 8}, {13, 5}, {64, 33}}) {
    Owned<float> in({m, n + 1}), out({n, m + 2});
    in.normal(r);
    transpose<float>(m, n, in.begin(), n + 1, out.begin(), m + 2);
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < n; ++j) EXPECT_EQ(out[j * (m + 2) + i], in[i * (n + 1) + j]);
    }
  }
}

TEST(KdaGate, Log1pKeepsRelativeAccuracy) {
  for (int i = 0; i <= 4000; ++i) {
    const float y = std::exp2(-static_cast<float>(i) / 40.0f);  // 1 down to 2^-100
    const double exact = std::log1p(static_cast<double>(y));
    // s, z, the polynomial and two products: about four roundings of 6e-8.
    EXPECT_NEAR(static_cast<double>(vlog1p_unit(y)), exact, 3e-7 * exact) << y;
  }
}

TEST(KdaGate, FloatFollowsDoubleFromOneEndToTheOther) {
  const int n = 401;
  Owned<float> f({n}), zeros({n}), g({n}), df({n}), ddt({n});
  Owned<double> exact({n}), slope({n});
  for (int i = 0; i < n; ++i) f[i] = static_cast<float>(i - n / 2) * 0.5f;  // -100 to 100
  zeros.fill(0);
  for (float bound : {0.0f, -5.0f}) {
    const float rate = 0.75f;
    for (int i = 0; i < n; ++i) {
      const double x = static_cast<double>(f[i]), s = 1 / (1 + std::exp(-x)), sr = 1 / (1 + std::exp(-0.75 * x)),
                   sr_minus = 1 / (1 + std::exp(0.75 * x));
      exact[i] = bound == 0 ? -0.75 * (std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x)))) : -5 * sr;
      slope[i] = bound == 0 ? -0.75 * s : -5 * 0.75 * sr * sr_minus;
    }
    const Gate<float> gate{rate, bound};
    gate.forward(f.begin(), zeros.begin(), n, g.begin());
    Owned<float> ones({n});
    ones.fill(1);
    ddt.fill(0);
    const float da = gate.backward(ones.begin(), f.begin(), zeros.begin(), n, df.begin(), ddt.begin());
    double exact_da = 0;
    for (int i = 0; i < n; ++i) {
      // exp is within 2 ulp and flushes below e^-87; the rest rounds a few times.
      EXPECT_NEAR(static_cast<double>(g[i]), exact[i], 1e-6 * std::abs(exact[i]) + 1e-37) << f[i];
      EXPECT_NEAR(static_cast<double>(df[i]), slope[i], 1e-6 * std::abs(slope[i]) + 1e-36) << f[i];
      EXPECT_EQ(ddt[i], df[i]);
      exact_da += bound == 0 ? exact[i] : slope[i] * static_cast<double>(f[i]);
    }
    // The bounded sum is of an odd function and cancels: its terms are up to 2.
    EXPECT_NEAR(static_cast<double>(da), exact_da, 1e-5 * std::abs(exact_da) + 1e-5);
  }
}

}  // namespace
}  // namespace deltapipe::kernels::cpu
