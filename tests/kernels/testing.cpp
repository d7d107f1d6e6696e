#include "tests/kernels/testing.h"

#include <algorithm>
#include <cstdlib>

namespace deltapipe::testing {

std::uint64_t test_seed() {
  if (const char* s = std::getenv("DELTAPIPE_TEST_SEED")) return std::strtoull(s, nullptr, 10);
  const auto* info = ::testing::UnitTest::GetInstance()->current_test_info();
  return info ? stream_of(std::string(info->test_suite_name()) + "." + info->name()) : 1;
}

Arena& no_workspace() {
  static Arena arena("no workspace", 0);
  return arena;
}

void expect_gradient(Owned<double>& x, const Owned<double>& gradient, const std::function<double()>& loss,
                     const std::string& name, double tolerance, double h, std::int64_t samples) {
  ASSERT_EQ(x.size(), gradient.size()) << name;
  const std::int64_t stride = std::max<std::int64_t>(1, x.size() / samples);
  std::vector<std::int64_t> index;
  std::vector<double> numeric;
  double largest = 0;
  for (std::int64_t i = 0; i < x.size(); i += stride) {
    const double old = x[i];
    x[i] = old + h;
    const double up = loss();
    x[i] = old - h;
    const double down = loss();
    x[i] = old;
    index.push_back(i);
    numeric.push_back((up - down) / (2 * h));
    largest = std::max(largest, std::abs(numeric.back()));
  }
  for (std::size_t i = 0; i < index.size(); ++i) {
    EXPECT_NEAR(gradient[index[i]], numeric[i], tolerance * std::max(largest, 1e-8))
        << name << " element " << index[i] << " seed " << test_seed();
  }
}

}  // namespace deltapipe::testing
