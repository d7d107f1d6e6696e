#include "kernels/cpu/gemm.h"

#include "core/error.h"
#include "core/parallel.h"

#include <cblas.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
// OpenBLAS's choice of kernels when it is loaded, in builds that carry several sets; null in others.
extern "C" {
__attribute__((weak)) void gotoblas_dynamic_quit();
__attribute__((weak)) void gotoblas_dynamic_init();
}
#endif

namespace deltapipe::kernels::cpu {
namespace {

#if defined(__x86_64__)
// OpenBLAS before 0.3.25 takes Intel processors that are younger than itself for a Prescott of 2004 and runs them at a
// fifth of their speed (its issue 4267); Debian 12 has 0.3.21. It reads OPENBLAS_CORETYPE, but only while it is loaded,
// so the choice is made once more here: before main, since the environment must not change beside other threads.
[[maybe_unused]] const bool kernels_fit_the_processor = [] {
  const bool fallback = std::strcmp(openblas_get_corename(), "Prescott") == 0 && __builtin_cpu_supports("avx2") &&
                        __builtin_cpu_supports("fma");
  constexpr const char* variable = "OPENBLAS_CORETYPE";
  if (!fallback || std::getenv(variable) != nullptr || !gotoblas_dynamic_quit || !gotoblas_dynamic_init) return true;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  setenv(variable, avx512 ? "SkylakeX" : "Haswell", 1);
  gotoblas_dynamic_quit();
  gotoblas_dynamic_init();
  unsetenv(variable);
  return true;
}();
#endif

blasint narrow(std::int64_t x) {
  require(x >= 0 && x <= std::numeric_limits<blasint>::max(), "gemm: a dimension does not fit BLAS's integer");
  return static_cast<blasint>(x);
}

CBLAS_TRANSPOSE native(Transpose t) { return t == Transpose::yes ? CblasTrans : CblasNoTrans; }

void single_threaded_blas() {
  static const bool once = [] {
    openblas_set_num_threads(1);
    return true;
  }();
  (void)once;
}

}  // namespace

template <>
void gemm(Transpose ta, Transpose tb, std::int64_t m, std::int64_t n, std::int64_t k, float alpha, const float* a,
          std::int64_t lda, const float* b, std::int64_t ldb, float beta, float* c, std::int64_t ldc) {
  single_threaded_blas();
  cblas_sgemm(CblasRowMajor, native(ta), native(tb), narrow(m), narrow(n), narrow(k), alpha, a, narrow(lda), b,
              narrow(ldb), beta, c, narrow(ldc));
}

template <>
void gemm(Transpose ta, Transpose tb, std::int64_t m, std::int64_t n, std::int64_t k, double alpha, const double* a,
          std::int64_t lda, const double* b, std::int64_t ldb, double beta, double* c, std::int64_t ldc) {
  single_threaded_blas();
  cblas_dgemm(CblasRowMajor, native(ta), native(tb), narrow(m), narrow(n), narrow(k), alpha, a, narrow(lda), b,
              narrow(ldb), beta, c, narrow(ldc));
}

template <class T>
void parallel_gemm(Transpose ta, Transpose tb, std::int64_t m, std::int64_t n, std::int64_t k, T alpha, const T* a,
                   std::int64_t lda, const T* b, std::int64_t ldb, T beta, T* c, std::int64_t ldc) {
  // At least 96 rows or columns a block: BLAS packs its operands anew for every block.
  constexpr std::int64_t smallest_block = 96;
  constexpr std::int64_t most_blocks = 16;
  const bool by_rows = m >= n;
  const std::int64_t extent = by_rows ? m : n;
  const std::int64_t blocks = std::clamp<std::int64_t>(extent / smallest_block, 1, most_blocks);
  const std::int64_t block = ((extent + blocks - 1) / blocks + 15) / 16 * 16;
  parallel_blocks(extent, block, [&](std::int64_t begin, std::int64_t end) {
    if (by_rows) {
      gemm(ta, tb, end - begin, n, k, alpha, a + (ta == Transpose::yes ? begin : begin * lda), lda, b, ldb, beta,
           c + begin * ldc, ldc);
    } else {
      gemm(ta, tb, m, end - begin, k, alpha, a, lda, b + (tb == Transpose::yes ? begin * ldb : begin), ldb, beta,
           c + begin, ldc);
    }
  });
}

template void parallel_gemm(Transpose, Transpose, std::int64_t, std::int64_t, std::int64_t, float, const float*,
                            std::int64_t, const float*, std::int64_t, float, float*, std::int64_t);
template void parallel_gemm(Transpose, Transpose, std::int64_t, std::int64_t, std::int64_t, double, const double*,
                            std::int64_t, const double*, std::int64_t, double, double*, std::int64_t);

}  // namespace deltapipe::kernels::cpu
