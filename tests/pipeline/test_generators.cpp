#include "core/error.h"
#include "tests/pipeline/testing.h"

#include <fmt/core.h>

#include <set>

namespace deltapipe::pipeline {
namespace {

using testing::expect_good_schedule;

// A sample of test_matrix.cpp, one that covers every pair of kind and teacher often.
TEST(Generators, LegalWithRandomCosts) {
  RandomStream random(20, "generators");
  for (int i = 0; i < 220; ++i) {
    ScheduleRequest q;
    q.kind = static_cast<ScheduleKind>(i % 4);
    q.teacher = static_cast<Teacher>(i / 4 % 3);
    if (q.kind == ScheduleKind::align && q.teacher == Teacher::none) continue;
    // Large ones now and then: the time is in the large ones.
    q.ranks = 2 + static_cast<int>(random.next_below(i % 10 == 0 ? 31 : 9));
    q.microbatches = 1 + static_cast<int>(random.next_below(i % 10 == 0 ? 64 : 24));
    if (q.kind == ScheduleKind::interleaved) q.chunks = 2 + static_cast<int>(random.next_below(3));
    if (random.next_below(2) == 1) q.kept_limit = 1 + static_cast<int>(random.next_below(40));
    expect_good_schedule(q, testing::random_costs(random, q.ranks * q.chunks));
    if (HasFailure()) return;
  }
}

TEST(Generators, OneRank) {
  RandomStream random(21, "generators");
  for (int k = 0; k < 4; ++k) {
    for (const Teacher teacher : {Teacher::none, Teacher::in_line, Teacher::ahead}) {
      ScheduleRequest q{static_cast<ScheduleKind>(k), 1, k == 1 ? 3 : 1, 5, teacher, 0};
      if (q.kind == ScheduleKind::align && teacher == Teacher::none) continue;
      const Simulation s = expect_good_schedule(q, testing::random_costs(random, q.chunks));
      EXPECT_NEAR(s.bubble, 0, 1e-12) << testing::describe(q);
    }
  }
}

TEST(Generators, StudentKeepsItsOrderWhereverTheTeacherRuns) {
  const CostModel cost = testing::afm_costs(12);
  for (int k = 0; k < 3; ++k) {
    ScheduleRequest q{static_cast<ScheduleKind>(k), k == 1 ? 6 : 12, k == 1 ? 2 : 1, 13, Teacher::none, 0};
    const Schedule alone = make_schedule(q, cost);
    for (const Teacher teacher : {Teacher::in_line, Teacher::ahead}) {
      q.teacher = teacher;
      Schedule both = make_schedule(q, cost);
      for (auto& list : both.tasks) {
        std::erase_if(list, [](const Task& t) { return t.kind == TaskKind::teacher_forward; });
      }
      EXPECT_EQ(both.tasks, alone.tasks) << testing::describe(q);
    }
  }
}

// A run of prologue, steps and last step executes every forward of the teacher once, in the order of the data.
TEST(Generators, RunsEveryTeacherForwardOnce) {
  RandomStream random(22, "generators");
  for (int k = 0; k < 4; ++k) {
    const ScheduleRequest q{static_cast<ScheduleKind>(k), 4, k == 1 ? 2 : 1, 6, Teacher::ahead, 0};
    const CostModel cost = testing::random_costs(random, q.ranks * q.chunks);
    const Schedule schedule = make_schedule(q, cost);
    const TaskLists first = prologue(schedule), last = last_step(schedule);
    int ahead = 0;
    for (int r = 0; r < q.ranks; ++r) {
      const auto i = static_cast<std::size_t>(r);
      std::set<std::tuple<int, int, int>> run;  // step, microbatch, chunk
      const auto execute = [&](const std::vector<Task>& list, int step) {
        for (const Task& t : list) {
          if (t.kind != TaskKind::teacher_forward) continue;
          EXPECT_TRUE(run.emplace(step + t.step_offset, t.microbatch, t.chunk).second);
          ahead += t.step_offset;
        }
      };
      execute(first[i], 0);
      execute(schedule.tasks[i], 0);
      execute(schedule.tasks[i], 1);
      execute(last[i], 2);
      EXPECT_EQ(std::ssize(run), 3 * q.microbatches * q.chunks);
      EXPECT_EQ(std::get<0>(*run.rbegin()), 2);
    }
    EXPECT_GT(ahead, 0) << testing::describe(q);  // else this shows nothing
  }
}

TEST(Generators, AheadIsNeverSlowerThanInline) {
  RandomStream random(23, "generators");
  for (int i = 0; i < 60; ++i) {
    ScheduleRequest q{static_cast<ScheduleKind>(i % 4),
                      2 + i % 7,
                      i % 4 == 1 ? 2 : 1,
                      1 + static_cast<int>(random.next_below(20)),
                      Teacher::in_line,
                      0};
    const CostModel cost = testing::random_costs(random, q.ranks * q.chunks);
    const Simulation in_line = simulate(make_schedule(q, cost), cost);
    q.teacher = Teacher::ahead;
    if (i % 3 == 0) q.kept_limit = 1 + static_cast<int>(random.next_below(20));
    const Simulation ahead = simulate(make_schedule(q, cost), cost);
    EXPECT_LE(ahead.step_s, in_line.step_s * (1 + 1e-9)) << testing::describe(q);
    if (q.kept_limit == 0) continue;
    int allowed = q.kept_limit, most = 0;
    for (const RankPeak& peak : in_line.peaks) allowed = std::max(allowed, peak.kept_teacher);
    for (const RankPeak& peak : ahead.peaks) most = std::max(most, peak.kept_teacher);
    EXPECT_LE(most, allowed) << testing::describe(q);
  }
}

TEST(Generators, RandomSchedulesAreLegal) {
  RandomStream random(24, "generators");
  std::set<std::string> drawn;
  for (int i = 0; i < 300; ++i) {
    const auto student = static_cast<StudentWork>(i % 3);
    auto teacher = static_cast<Teacher>(i / 3 % 3);
    if (student == StudentWork::align && teacher == Teacher::none) teacher = Teacher::ahead;
    const int ranks = 1 + static_cast<int>(random.next_below(6)), chunks = 1 + static_cast<int>(random.next_below(3));
    const int microbatches = 1 + static_cast<int>(random.next_below(8));
    const Schedule schedule = random_legal_schedule(random.next_bits(), ranks, chunks, microbatches, student, teacher);
    const CostModel cost = testing::random_costs(random, schedule.stages());
    testing::expect_sound(schedule, cost, simulate(schedule, cost));
    if (HasFailure()) FAIL() << i;
    std::string lists;
    for (const auto& list : schedule.tasks) {
      for (const Task& t : list) lists += fmt::format("{}.{}.{} ", static_cast<int>(t.kind), t.microbatch, t.chunk);
    }
    drawn.insert(lists);
  }
  EXPECT_GT(drawn.size(), 250u);  // few but the smallest can be drawn twice
}

TEST(Generators, RefuseWrongSizes) {
  const CostModel cost = testing::afm_costs(4);
  EXPECT_THROW(make_schedule({ScheduleKind::one_f_one_b, 0, 1, 4, Teacher::none, 0}, cost), InternalError);
  EXPECT_THROW(make_schedule({ScheduleKind::one_f_one_b, 4, 1, 0, Teacher::none, 0}, cost), InternalError);
  EXPECT_THROW(make_schedule({ScheduleKind::zero_bubble, 2, 2, 4, Teacher::none, 0}, cost), InternalError);
  EXPECT_THROW(make_schedule({ScheduleKind::align, 4, 1, 4, Teacher::none, 0}, cost), InternalError);
  EXPECT_THROW(make_schedule({ScheduleKind::one_f_one_b, 3, 1, 4, Teacher::ahead, 0}, cost), InternalError);
  EXPECT_THROW(make_schedule({ScheduleKind::one_f_one_b, 4, 1, 4, Teacher::ahead, -1}, cost), InternalError);
}

}  // namespace
}  // namespace deltapipe::pipeline
