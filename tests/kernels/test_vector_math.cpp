#include "kernels/cpu/vector_math.h"

#include <gtest/gtest.h>

#include <limits>

namespace deltapipe::kernels::cpu {
namespace {

TEST(VectorMath, ExpIsWithinTwoUlp) {
  double worst = 0;
  for (int i = 0; i <= 2'000'000; ++i) {
    const float x = -87.3f + 176.0f * static_cast<float>(i) / 2e6f;
    const double exact = std::exp(static_cast<double>(x));
    if (exact > std::numeric_limits<float>::max()) break;
    const double ulp = std::ldexp(1.0, std::max(-126, std::ilogb(exact)) - 23);
    worst = std::max(worst, std::abs(static_cast<double>(vexp(x)) - exact) / ulp);
  }
  EXPECT_LT(worst, 2.0);
}

TEST(VectorMath, ExpAtTheEdges) {
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT_EQ(vexp(0.0f), 1.0f);
  EXPECT_EQ(vexp(-inf), 0.0f);
  EXPECT_EQ(vexp(-1000.0f), 0.0f);
  EXPECT_EQ(vexp(inf), inf);
  EXPECT_EQ(vexp(89.0f), inf);
  EXPECT_TRUE(std::isnan(vexp(std::numeric_limits<float>::quiet_NaN())));
  EXPECT_EQ(vsigmoid(-1000.0f), 0.0f);
  EXPECT_EQ(vsigmoid(1000.0f), 1.0f);
}

}  // namespace
}  // namespace deltapipe::kernels::cpu
