#include "data/sequence_order.h"

#include "core/error.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <vector>

namespace deltapipe {
namespace {

std::vector<std::uint64_t> order_of(std::uint64_t seed, std::uint64_t epoch, std::uint64_t n) {
  std::vector<std::uint64_t> order;
  for (std::uint64_t i = 0; i < n; ++i) order.push_back(sequence_order(seed, epoch, i, n));
  return order;
}

void expect_bijection(std::uint64_t seed, std::uint64_t epoch, std::uint64_t n) {
  std::vector<bool> seen(n);
  for (const std::uint64_t x : order_of(seed, epoch, n)) {
    ASSERT_LT(x, n);
    ASSERT_FALSE(seen[x]) << "seed " << seed << " epoch " << epoch << " n " << n << ": " << x << " twice";
    seen[x] = true;
  }
}

TEST(SequenceOrder, IsABijection) {
  for (std::uint64_t n = 1; n <= 300; ++n) {
    for (std::uint64_t epoch = 0; epoch < 3; ++epoch) expect_bijection(n * 7919, epoch, n);
  }
  for (const std::uint64_t n : {1023u, 1024u, 1025u, 4095u, 4096u, 4097u, 65537u}) expect_bijection(1, 0, n);
}

TEST(SequenceOrder, StaysInsideHugeRanges) {
  for (const std::uint64_t n :
       {std::uint64_t{1} << 40, (std::uint64_t{1} << 62) + 1, std::numeric_limits<std::uint64_t>::max()}) {
    std::map<std::uint64_t, std::uint64_t> from;
    for (std::uint64_t i = 0; i < 500; ++i) {
      const std::uint64_t position = i % 2 == 0 ? i : n - 1 - i;
      const std::uint64_t x = sequence_order(3, 9, position, n);
      EXPECT_LT(x, n);
      EXPECT_TRUE(from.emplace(x, position).second) << "two positions meet at " << x;
    }
  }
}

TEST(SequenceOrder, RefusesPositionsOutside) {
  EXPECT_THROW(sequence_order(1, 0, 5, 5), InternalError);
  EXPECT_THROW(sequence_order(1, 0, 0, 0), InternalError);
}

TEST(SequenceOrder, NeverChanges) {  // a run that resumes under a newer build goes on with the same data
  EXPECT_EQ(order_of(1, 0, 10), (std::vector<std::uint64_t>{1, 7, 2, 6, 8, 5, 4, 9, 3, 0}));
  EXPECT_EQ(sequence_order(42, 7, 123456789, 1000000007), 152563339u);
}

TEST(SequenceOrder, EpochsAndSeedsDiffer) {
  // Two independent random orders of n agree at one place on average (Poisson): 12 or more has probability below 1e-9.
  const std::uint64_t n = 5000;
  const auto agreements = [](const std::vector<std::uint64_t>& a, const std::vector<std::uint64_t>& b) {
    int count = 0;
    for (std::size_t i = 0; i < a.size(); ++i) count += a[i] == b[i] ? 1 : 0;
    return count;
  };
  const auto base = order_of(1, 0, n);
  for (std::uint64_t epoch = 1; epoch < 6; ++epoch) EXPECT_LT(agreements(base, order_of(1, epoch, n)), 12);
  for (std::uint64_t seed = 2; seed < 6; ++seed) EXPECT_LT(agreements(base, order_of(seed, 0, n)), 12);
  EXPECT_EQ(agreements(base, order_of(1, 0, n)), static_cast<int>(n));
  int at_home = 0, neighbours = 0;
  for (std::size_t i = 0; i < n; ++i) {
    at_home += base[i] == i ? 1 : 0;
    if (i > 0) neighbours += base[i] == base[i - 1] + 1 || base[i - 1] == base[i] + 1 ? 1 : 0;
  }
  EXPECT_LT(at_home, 12);
  EXPECT_LT(neighbours, 16);  // mean 2
}

// chi^2 of `counts` against equal expectation, as standard deviations above its mean (mean k, variance 2k).
double excess(const std::vector<double>& counts, double degrees) {
  double total = 0, chi = 0;
  for (const double c : counts) total += c;
  const double expected = total / static_cast<double>(counts.size());
  for (const double c : counts) chi += (c - expected) * (c - expected) / expected;
  return (chi - degrees) / std::sqrt(2 * degrees);
}

TEST(SequenceOrder, EveryPlaceIsEquallyLikely) {
  // The seeds are fixed, so this either passes always or never; 5 sigma leaves room for the tail of chi^2.
  for (const std::uint64_t n : {2u, 3u, 5u, 7u, 12u, 17u}) {
    std::vector<double> counts(n * n);
    for (std::uint64_t epoch = 0; epoch < 4000; ++epoch) {
      for (std::uint64_t i = 0; i < n; ++i) counts[i * n + sequence_order(11, epoch, i, n)] += 1;
    }
    const double k = static_cast<double>(n - 1);
    EXPECT_LT(excess(counts, k * k), 5.0) << n;
  }
}

TEST(SequenceOrder, EverySmallPermutationIsEquallyLikely) {
  for (const std::uint64_t n : {3u, 4u, 5u}) {
    std::map<std::vector<std::uint64_t>, double> seen;
    for (std::uint64_t seed = 0; seed < 40000; ++seed) seen[order_of(seed, 0, n)] += 1;
    const std::size_t all = n == 3 ? 6 : n == 4 ? 24 : 120;
    ASSERT_EQ(seen.size(), all);
    std::vector<double> counts;
    for (const auto& [order, count] : seen) counts.push_back(count);
    EXPECT_LT(excess(counts, static_cast<double>(all - 1)), 5.0) << n;
  }
}

}  // namespace
}  // namespace deltapipe
