// Row-major matrix products on OpenBLAS. BLAS itself runs on one thread; large products are cut into blocks of C whose
// sizes depend on the problem alone, so that results do not depend on the number of threads.
#pragma once

#include <cstdint>

namespace deltapipe::kernels::cpu {

enum class Transpose : bool { no = false, yes = true };

/// C [M, N] = alpha op(A) op(B) + beta C on the calling thread. ld* are row strides in elements as stored.
/// beta == 0 does not read C.
template <class T>
void gemm(Transpose ta, Transpose tb, std::int64_t m, std::int64_t n, std::int64_t k, T alpha, const T* a,
          std::int64_t lda, const T* b, std::int64_t ldb, T beta, T* c, std::int64_t ldc);

/// The same, spread over all threads. Not to be called inside a parallel loop.
template <class T>
void parallel_gemm(Transpose ta, Transpose tb, std::int64_t m, std::int64_t n, std::int64_t k, T alpha, const T* a,
                   std::int64_t lda, const T* b, std::int64_t ldb, T beta, T* c, std::int64_t ldc);

}  // namespace deltapipe::kernels::cpu
