// Every number of ranks from 2 to 32 with every number of microbatches from 1 to 64, random costs.
#include "tests/pipeline/testing.h"

#include <tuple>

namespace deltapipe::pipeline {
namespace {

class Matrix : public ::testing::TestWithParam<std::tuple<int, int>> {};  // ranks, ScheduleKind

TEST_P(Matrix, LegalWithRandomCosts) {
  const auto [ranks, kind] = GetParam();
  RandomStream random(30, static_cast<std::uint64_t>(4 * ranks + kind));
  for (int m = 1; m <= 64; ++m) {
    for (const Teacher teacher : {Teacher::none, Teacher::in_line, Teacher::ahead}) {
      ScheduleRequest q{static_cast<ScheduleKind>(kind), ranks, 1, m, teacher, 0};
      if (q.kind == ScheduleKind::align && teacher == Teacher::none) continue;
      if (q.kind == ScheduleKind::interleaved) q.chunks = 2 + static_cast<int>(random.next_below(3));
      testing::expect_good_schedule(q, testing::random_costs(random, q.ranks * q.chunks));
      if (HasFailure()) return;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(RanksAndKind, Matrix, ::testing::Combine(::testing::Range(2, 33), ::testing::Range(0, 4)));

}  // namespace
}  // namespace deltapipe::pipeline
