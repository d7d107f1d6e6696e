// Sets of moments against answers by hand, and against counting moments one by one.
#include "core/intervals.h"

#include "core/random.h"

#include <gtest/gtest.h>

#include <array>

namespace deltapipe {
namespace {

TEST(Intervals, UnitedJoinsWhatOverlapsOrTouches) {
  EXPECT_EQ(united({}), Intervals{});
  EXPECT_EQ(united({{5, 5}, {7, 6}}), Intervals{});
  EXPECT_EQ(united({{8, 10}, {0, 3}, {2, 4}, {4, 5}, {9, 9}}), (Intervals{{0, 5}, {8, 10}}));
  EXPECT_EQ(united({{0, 10}, {2, 3}}), (Intervals{{0, 10}}));
}

TEST(Intervals, CommonAndWithout) {
  const Intervals a{{0, 10}, {20, 30}, {40, 41}}, b{{2, 4}, {6, 22}, {25, 26}, {29, 50}};
  EXPECT_EQ(common(a, b), (Intervals{{2, 4}, {6, 10}, {20, 22}, {25, 26}, {29, 30}, {40, 41}}));
  EXPECT_EQ(without(a, b), (Intervals{{0, 2}, {4, 6}, {22, 25}, {26, 29}}));
  EXPECT_EQ(without(b, a), (Intervals{{10, 20}, {30, 40}, {41, 50}}));
  EXPECT_EQ(without(a, {}), a);
  EXPECT_EQ(common(a, {}), Intervals{});
  EXPECT_EQ(without(a, a), Intervals{});
  EXPECT_EQ(length(a), 21);
}

constexpr int moments = 60;
using Moments = std::array<bool, moments>;

Intervals draw(const RandomStream& random, std::uint64_t first) {
  Intervals list;
  for (std::uint64_t i = 0; i < 6; ++i) {
    const auto at = [&](std::uint64_t n) {
      return static_cast<std::int64_t>(moments * random.uniform(first + 2 * i + n));
    };
    list.push_back({at(0), at(1)});
  }
  return list;
}

Moments moments_of(const Intervals& list) {
  Moments m{};
  for (const Interval& i : list) {
    for (std::int64_t t = i.begin; t < i.end; ++t) m[static_cast<std::size_t>(t)] = true;
  }
  return m;
}

TEST(Intervals, AgreeWithCounting) {
  const RandomStream random(1, "intervals");
  for (std::uint64_t n = 0; n < 500; ++n) {
    const Intervals raw_a = draw(random, 24 * n), raw_b = draw(random, 24 * n + 12);
    const Intervals a = united(raw_a), b = united(raw_b);
    const Moments in_a = moments_of(raw_a), in_b = moments_of(raw_b);
    ASSERT_EQ(moments_of(a), in_a);
    Moments both{}, only_a{};
    std::int64_t count = 0;
    for (std::size_t t = 0; t < moments; ++t) {
      both[t] = in_a[t] && in_b[t];
      only_a[t] = in_a[t] && !in_b[t];
      count += both[t];
    }
    ASSERT_EQ(moments_of(common(a, b)), both);
    ASSERT_EQ(moments_of(without(a, b)), only_a);
    ASSERT_EQ(length(common(a, b)), count);
  }
}

}  // namespace
}  // namespace deltapipe
