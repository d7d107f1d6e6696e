// Checks that an operation's results do not depend on the number of threads.
#pragma once

#include "core/parallel.h"
#include "tests/kernels/testing.h"

#include <cstring>

namespace deltapipe::testing {

template <class T>
bool same_bits(const Owned<T>& a, const Owned<T>& b) {
  return a.size() == b.size() && std::memcmp(a.begin(), b.begin(), static_cast<std::size_t>(a.size()) * sizeof(T)) == 0;
}

/// Calls f(), which returns a vector of Owned, with one thread and with several, and compares bit by bit.
template <class F>
void expect_same_on_any_threads(const F& f) {
  set_num_threads(1);
  const auto one = f();
  for (const int threads : {2, 3}) {
    set_num_threads(threads);
    const auto many = f();
    ASSERT_EQ(one.size(), many.size());
    for (std::size_t i = 0; i < one.size(); ++i) {
      EXPECT_TRUE(same_bits(one[i], many[i])) << "result " << i << ", " << threads << " threads";
    }
  }
  set_num_threads(0);
}

}  // namespace deltapipe::testing
