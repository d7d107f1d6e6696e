// Published bubble formulas, the case of AFM-4.5B, and the table of src/pipeline/README.md.
#include "tests/pipeline/testing.h"

#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <cstdio>

namespace deltapipe::pipeline {
namespace {

double bubble_seconds(const Simulation& s) { return s.bubble * s.step_s; }

struct Costs {
  double forward_s, backward_s;
};
constexpr Costs several_costs[] = {{1, 2}, {1, 1}, {10.8, 21.6}, {3, 4}};

// Narayanan et al. 2021 (PipeDream-Flush): (p - 1)(F + B), for any number of microbatches.
TEST(Bubbles, OneFOneB) {
  for (const auto& [f, b] : several_costs) {
    for (int p = 1; p <= 32; p += p < 9 ? 1 : 7) {
      for (const int m : {1, 2, 3, 7, 8, 16, 33, 64}) {
        const Simulation s = simulate(one_f_one_b(p, m), testing::even_costs(p, 0, f, b));
        EXPECT_NEAR(bubble_seconds(s), (p - 1) * (f + b), 1e-9 * s.step_s) << p << " " << m;
      }
    }
  }
}

// Narayanan et al. 2021 (Megatron-LM): (p - 1)(F + B) / v with m a multiple of p; F and B of a rank's v chunks
// together.
TEST(Bubbles, Interleaved) {
  for (const auto& [f, b] : several_costs) {
    for (const int p : {2, 3, 4, 8, 16}) {
      for (const int v : {2, 3, 4}) {
        for (const int groups : {1, 2, 3, 4}) {
          const Simulation s = simulate(interleaved(p, v, groups * p), testing::even_costs(p * v, 0, f / v, b / v));
          EXPECT_NEAR(bubble_seconds(s), (p - 1) * (f + b) / v, 1e-9 * s.step_s) << p << " " << v << " " << groups;
        }
      }
    }
  }
}

// Qi et al. 2023, table 2, ZB-H1: (p - 1)(T_F + T_B - T_W) with T_B the input part, so F + B - 2W; for m >= p.
TEST(Bubbles, ZeroBubble) {
  // Forward, input part and weight part: equal, and unequal where the formula still holds (parts near each other).
  constexpr std::array<double, 3> costs[] = {{1, 1, 1}, {10.8, 10.8, 10.8}, {1, 1.2, 1}, {1.1, 1, 0.9}};
  for (const auto& [f, input, weight] : costs) {
    for (const int p : {2, 3, 4, 8, 16, 32}) {
      for (const int m : {p, p + 1, 2 * p - 1, 2 * p, 3 * p, 64}) {
        if (m < p) continue;
        const CostModel cost = testing::even_costs(p, 0, f, input + weight, weight / (input + weight));
        const Simulation s = simulate(zero_bubble(p, m), cost);
        EXPECT_NEAR(bubble_seconds(s), (p - 1) * (f + input - weight), 1e-9 * s.step_s)
            << p << " " << m << " " << f << " " << input << " " << weight;
      }
    }
  }
}

// Peaks of the same papers: 1f1b p - r, ZB-H1 p on every rank, interleaved 2(p - 1 - r) + (v - 1)p + 1 chunks.
TEST(Bubbles, PublishedPeaks) {
  const int p = 6, v = 3, m = 24;
  const Simulation one = simulate(one_f_one_b(p, m), testing::afm_costs(p));
  const Simulation zero = simulate(zero_bubble(p, m), testing::afm_costs(p));
  const Simulation inter = simulate(interleaved(p, v, m), testing::afm_costs(p * v));
  for (int r = 0; r < p; ++r) {
    const auto i = static_cast<std::size_t>(r);
    EXPECT_EQ(one.peaks[i].in_flight, p - r);
    EXPECT_EQ(zero.peaks[i].in_flight, p);
    EXPECT_EQ(inter.peaks[i].in_flight, 2 * (p - 1 - r) + (v - 1) * p + 1);
  }
}

// With teacher and student of a microbatch as one task, as other systems run them, the bubble is (p - 1) / (m + p - 1).
// Two tasks do better: the teacher's hidden state goes on while the student's forward runs. The first student forward
// of the last rank can then start after p teacher forwards (T > F) instead of (p - 1)(T + F) + T.
TEST(Bubbles, AfmInline) {
  const int p = 8, m = 16;
  const double t = 14.6, f = 10.8, b = 21.6, work = m * (t + f + b);
  const Simulation joined = simulate(one_f_one_b(p, m), testing::even_costs(p, 0, t + f, b));
  EXPECT_NEAR(joined.bubble, 7.0 / 23.0, 1e-9);  // 30.4 %
  const Simulation s = simulate(with_teacher_inline(one_f_one_b(p, m)), testing::afm_costs(p));
  const double step = (p - 1) * t + work + (p - 1) * b;
  EXPECT_NEAR(s.step_s, step, 1e-9 * step);
  EXPECT_NEAR(s.bubble, 1 - work / step, 1e-9);  // 25.2 %
}

TEST(Bubbles, AfmAheadIsAtMostThreePercent) {
  const CostModel cost = testing::afm_costs(8);
  const Schedule schedule = with_teacher_ahead(one_f_one_b(8, 16), cost, 0);
  const Simulation s = simulate(schedule, cost);
  testing::expect_sound(schedule, cost, s);
  EXPECT_LE(s.bubble, 0.03);
  EXPECT_EQ(s.peaks[0].in_flight, 8);  // not bought with the student's memory
  EXPECT_LE(simulate(with_teacher_ahead(zero_bubble(8, 16), cost, 0), cost).bubble, 0.001);
  // Messages of 1 % of a forward make the student alone 0.5 % longer (8 hops each way, and 1f1b waits for both in
  // between).
  CostModel slow = cost;
  slow.message_s = 0.1;
  EXPECT_LE(simulate(with_teacher_ahead(one_f_one_b(8, 16), slow, 0), slow).bubble, 0.035);
}

// Prints the table of src/pipeline/README.md: run test_pipeline --gtest_filter=Bubbles.Table.
TEST(Bubbles, Table) {
  struct Row {
    ScheduleKind kind;
    int chunks;
    const char* name;
  };
  constexpr Row rows[] = {{ScheduleKind::one_f_one_b, 1, "1f1b"},
                          {ScheduleKind::interleaved, 2, "interleaved, v = 2"},
                          {ScheduleKind::zero_bubble, 1, "zero_bubble"}};
  const auto table_line = [](const Row& row, int p, int m, Teacher teacher, int limit, const char* words) {
    StageCost c = testing::afm_costs(1).stages[0];
    for (double* seconds : {&c.teacher_forward_s, &c.forward_s, &c.backward_input_s, &c.backward_weight_s}) {
      *seconds /= row.chunks;
    }
    const CostModel cost = CostModel::uniform(p * row.chunks, c);
    const Simulation s = simulate(make_schedule({row.kind, p, row.chunks, m, teacher, limit}, cost), cost);
    int in_flight = 0, kept = 0;
    for (const RankPeak& peak : s.peaks) {
      in_flight = std::max(in_flight, peak.in_flight);
      kept = std::max(kept, peak.kept_teacher);
    }
    std::printf("| %s | %d | %d | %s | %.1f %% | %.4g | %.4g |\n", row.name, p, m, words, 100 * s.bubble,
                static_cast<double>(in_flight) / row.chunks, static_cast<double>(kept) / row.chunks);
    return s.bubble;
  };
  for (const auto& [p, m] : {std::pair{4, 8}, {8, 16}, {8, 32}, {16, 64}}) {
    for (const Row& row : rows) {
      const double in_line = table_line(row, p, m, Teacher::in_line, 0, "inline");
      const double ahead = table_line(row, p, m, Teacher::ahead, 0, "ahead");
      EXPECT_LT(ahead, 0.5 * in_line);
    }
  }
  for (const Row& row : {rows[0], rows[2]}) {
    double before = 1;
    for (const int limit : {8, 12, 16, 20, 24, 28}) {
      const double bubble =
          table_line(row, 8, 16, Teacher::ahead, limit, fmt::format("ahead, at most {} kept", limit).c_str());
      EXPECT_LE(bubble, before + 0.01);  // more memory does not make it worse, but for what the search misses
      before = bubble;
    }
  }
}

}  // namespace
}  // namespace deltapipe::pipeline
