#include "core/error.h"
#include "model/rope.h"

#include <gtest/gtest.h>

#include <cmath>

namespace deltapipe {
namespace {

RopeSpec afm() {
  RopeSpec s;
  s.theta = 10000;
  s.factor = 20;
  s.original_max_positions = 4096;
  s.mscale = 1;
  return s;
}

TEST(RopeFrequencies, PlainIsAGeometricSeries) {
  const RopeSpec s{.theta = 500000.0};
  const auto f = rope_inverse_frequencies(s, 64);
  ASSERT_EQ(f.size(), 32u);
  for (std::size_t i = 0; i < f.size(); ++i) {
    EXPECT_NEAR(f[i], std::exp(-static_cast<double>(i) / 32.0 * std::log(500000.0)), 1e-15);
  }
  EXPECT_EQ(rope_attention_factor(s), 1.0);
  EXPECT_THROW(rope_inverse_frequencies(s, 63), InternalError);
}

// The numbers of AFM-4.5B: channels below 20 as trained, above 46 stretched by 20, a ramp between.
TEST(RopeFrequencies, YarnOfAfm) {
  const auto f = rope_inverse_frequencies(afm(), 128);
  ASSERT_EQ(f.size(), 64u);
  for (int i = 0; i < 64; ++i) {
    const double plain = std::pow(10000.0, -2.0 * i / 128.0);
    const double ramp = std::min(1.0, std::max(0.0, (i - 20) / 26.0));
    EXPECT_NEAR(f[static_cast<std::size_t>(i)] / plain, (1 - ramp) + ramp / 20, 1e-12) << i;
  }
  EXPECT_LT(f[21] / std::pow(10000.0, -42.0 / 128), 1.0 - 0.01);
  EXPECT_GT(f[45] / std::pow(10000.0, -90.0 / 128), 0.05 + 0.01);
}

TEST(RopeFrequencies, CorrectionRangeIsClampedToTheHead) {
  RopeSpec s = afm();
  s.original_max_positions = 16;  // fewer positions than beta_fast turns need: low would be negative
  const auto f = rope_inverse_frequencies(s, 8);
  EXPECT_EQ(f[0], 1.0);                                     // low = 0: channel 0 stays
  EXPECT_NEAR(f[3], std::pow(10000.0, -0.75) / 20, 1e-15);  // high = ceil(0.41) = 1: the rest is stretched
  s.beta_fast = s.beta_slow = 2.6;                          // low == high == 0: a step, not 0 / 0
  const auto step = rope_inverse_frequencies(s, 8);
  EXPECT_EQ(step[0], 1.0);
  EXPECT_NEAR(step[1], std::pow(10000.0, -0.25) / 20, 1e-15);
}

TEST(RopeAttentionFactor, FollowsThePaperAndTransformers) {
  RopeSpec s = afm();
  EXPECT_NEAR(rope_attention_factor(s), 1.2995732, 5e-8);
  s.mscale = 0.707;  // alone it changes nothing
  EXPECT_NEAR(rope_attention_factor(s), 1.2995732, 5e-8);
  s.mscale_all_dim = 0.707;
  EXPECT_NEAR(rope_attention_factor(s), 1.0, 1e-15);
  s.mscale = 1.0;
  EXPECT_NEAR(rope_attention_factor(s), (0.1 * std::log(20.0) + 1) / (0.0707 * std::log(20.0) + 1), 1e-15);
  s.attention_factor = 1.5;
  EXPECT_EQ(rope_attention_factor(s), 1.5);
}

}  // namespace
}  // namespace deltapipe
