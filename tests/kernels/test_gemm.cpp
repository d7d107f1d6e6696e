#include "kernels/cpu/gemm.h"
#include "tests/kernels/testing.h"

#include <cstdlib>

extern "C" char* openblas_get_corename();

namespace deltapipe::kernels::cpu {
namespace {

using deltapipe::testing::Owned;

template <class T>
void check_parallel_gemm(double tolerance) {
  RandomStream r(deltapipe::testing::test_seed(), "data");
  const std::int64_t k = 37;
  for (const auto& [m, n] : {std::pair<std::int64_t, std::int64_t>{7, 11}, {401, 53}, {53, 401}}) {
    for (const bool ta : {false, true}) {
      for (const bool tb : {false, true}) {
        Owned<T> a({m, k}), b({k, n}), c({m, n});
        a.normal(r);
        b.normal(r);
        c.normal(r);
        Owned<double> expected({m, n});
        for (std::int64_t i = 0; i < m; ++i) {
          for (std::int64_t j = 0; j < n; ++j) {
            double sum = 0;
            for (std::int64_t x = 0; x < k; ++x) {
              sum += static_cast<double>(a[ta ? x * m + i : i * k + x]) * b[tb ? j * k + x : x * n + j];
            }
            expected[i * n + j] = 0.5 * sum - 2.0 * c[i * n + j];
          }
        }
        parallel_gemm<T>(Transpose{ta}, Transpose{tb}, m, n, k, T(0.5), a.begin(), ta ? m : k, b.begin(), tb ? k : n,
                         T(-2), c.begin(), n);
        EXPECT_LT(deltapipe::testing::relative_rms(c, expected), tolerance) << m << " " << n << " " << ta << tb;
      }
    }
  }
}

// Sums of 37 products keep about sqrt(37) roundings.
TEST(Gemm, ParallelMatchesDefinitionInFloat) { check_parallel_gemm<float>(1e-6); }
TEST(Gemm, ParallelMatchesDefinitionInDouble) { check_parallel_gemm<double>(1e-14); }

#if defined(__x86_64__)
// OpenBLAS calls a processor that it does not know a Prescott and leaves most of it unused.
TEST(Gemm, BlasKernelsFitTheProcessor) {
  if (std::getenv("OPENBLAS_CORETYPE") != nullptr) GTEST_SKIP() << "OPENBLAS_CORETYPE is set";
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) GTEST_SKIP() << "a processor without AVX2";
  EXPECT_STRNE(openblas_get_corename(), "Prescott");
}
#endif

}  // namespace
}  // namespace deltapipe::kernels::cpu
