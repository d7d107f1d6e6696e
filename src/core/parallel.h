// Host threads. Work is cut by problem size alone, never by the number of threads, so that results do not depend on it.
#pragma once

#include <cstdint>
#include <exception>

namespace deltapipe {

/// Threads that parallel_for uses; 0 takes every core this process may run on. Call once, before other threads exist.
void set_num_threads(int threads);
int num_threads();

/// f(i) for every i in [0, n), in any order and on any thread. Of exceptions the one of the lowest i is rethrown after
/// the loop.
template <class F>
void parallel_for(std::int64_t n, const F& f) {
  if (n == 1) {
    f(std::int64_t{0});
    return;
  }
  std::exception_ptr error;
  std::int64_t error_at = n;
#pragma omp parallel for schedule(dynamic, 1)
  for (std::int64_t i = 0; i < n; ++i) {
    try {
      f(i);
    } catch (...) {
#pragma omp critical(deltapipe_parallel_for)
      if (i < error_at) {
        error = std::current_exception();
        error_at = i;
      }
    }
  }
  if (error) std::rethrow_exception(error);
}

/// f(begin, end) over blocks of at most `block` indices that cover [0, n).
template <class F>
void parallel_blocks(std::int64_t n, std::int64_t block, const F& f) {
  parallel_for((n + block - 1) / block, [&](std::int64_t i) {
    const std::int64_t begin = i * block;
    f(begin, begin + block < n ? begin + block : n);
  });
}

}  // namespace deltapipe
