#include "core/error.h"
#include "tests/pipeline/testing.h"

namespace deltapipe::pipeline {
namespace {

// Two ranks, two microbatches, 1f1b, F = 1, B = 2, message 0.5, update 0.25: small enough to do by hand.
//   rank 0: F0 0-1, F1 1-2, B0 5-7, B1 8-10    rank 1: F0 1.5-2.5, B0 2.5-4.5, F1 4.5-5.5, B1 5.5-7.5
TEST(Simulator, ByHand) {
  CostModel cost = testing::even_costs(2, 0, 1, 2);
  cost.message_s = 0.5;
  cost.update_s = 0.25;
  cost.message_bytes = 100;
  cost.stages[0].activation_bytes = 10;
  cost.stages[1].activation_bytes = 1;
  const Simulation s = simulate(one_f_one_b(2, 2), cost);
  const std::vector<std::vector<std::array<double, 2>>> expected{{{0, 1}, {1, 2}, {5, 7}, {8, 10}},
                                                                 {{1.5, 2.5}, {2.5, 4.5}, {4.5, 5.5}, {5.5, 7.5}}};
  for (std::size_t r = 0; r < 2; ++r) {
    ASSERT_EQ(s.tasks[r].size(), 4u);
    for (std::size_t i = 0; i < 4; ++i) {
      EXPECT_DOUBLE_EQ(s.tasks[r][i].start_s, expected[r][i][0]);
      EXPECT_DOUBLE_EQ(s.tasks[r][i].end_s, expected[r][i][1]);
    }
    EXPECT_DOUBLE_EQ(s.busy_s[r], 6);
  }
  EXPECT_DOUBLE_EQ(s.step_s, 10.25);
  EXPECT_DOUBLE_EQ(s.prologue_s, 0);
  EXPECT_DOUBLE_EQ(s.bubble, 1 - 12.5 / 20.5);
  EXPECT_EQ(s.peaks[0].in_flight, 2);
  EXPECT_EQ(s.peaks[1].in_flight, 1);
  EXPECT_EQ(s.peaks[0].waiting, 0);  // gradients are taken as they arrive
  EXPECT_EQ(s.peaks[1].waiting, 1);  // the second activation waits from 2.5 to 4.5
  EXPECT_DOUBLE_EQ(s.peaks[0].bytes, 20);
  EXPECT_DOUBLE_EQ(s.peaks[1].bytes, 101);
}

// The teacher a whole step ahead on a rank of its own: the step is the student's and the teacher's work, the prologue
// the teacher's alone, and hidden states of two steps meet.
TEST(Simulator, TeacherAStepAhead) {
  Schedule schedule;
  schedule.name = "by hand";
  schedule.microbatches = 2;
  schedule.teacher = Teacher::ahead;
  schedule.ahead = {2};
  schedule.tasks = {{{TaskKind::teacher_forward, 0, 0, 1},
                     {TaskKind::teacher_forward, 1, 0, 1},
                     {TaskKind::forward, 0, 0, 0},
                     {TaskKind::backward, 0, 0, 0},
                     {TaskKind::forward, 1, 0, 0},
                     {TaskKind::backward, 1, 0, 0}}};
  CostModel cost = testing::even_costs(1, 3, 1, 2);
  cost.stages[0].teacher_bytes = 8;
  cost.stages[0].activation_bytes = 16;
  const Simulation s = simulate(schedule, cost);
  EXPECT_DOUBLE_EQ(s.prologue_s, 6);
  EXPECT_DOUBLE_EQ(s.step_s, 12);
  EXPECT_EQ(s.peaks[0].kept_teacher, 4);
  EXPECT_EQ(s.peaks[0].in_flight, 1);
  EXPECT_DOUBLE_EQ(s.peaks[0].bytes, 4 * 8 + 16);
}

TEST(Simulator, SplitBackwardHoldsItsWeightPart) {
  CostModel cost = testing::even_costs(1, 0, 1, 2);
  cost.stages[0].activation_bytes = 10;
  cost.stages[0].weight_part_bytes = 4;
  Schedule schedule = zero_bubble(1, 3);
  schedule.tasks = {{}};
  for (const TaskKind kind : {TaskKind::forward, TaskKind::backward_input}) {
    for (int i = 0; i < 3; ++i) schedule.tasks[0].push_back({kind, i, 0, 0});
    if (kind == TaskKind::forward) {
      EXPECT_THROW(simulate(schedule, cost), InternalError);  // not complete yet
    }
  }
  for (int i = 0; i < 3; ++i) schedule.tasks[0].push_back({TaskKind::backward_weight, i, 0, 0});
  EXPECT_DOUBLE_EQ(simulate(schedule, cost).peaks[0].bytes, 30);
  EXPECT_DOUBLE_EQ(simulate(zero_bubble(1, 3), cost).peaks[0].bytes, 10);
  cost.stages[0].weight_part_bytes = 12;
  EXPECT_DOUBLE_EQ(simulate(schedule, cost).peaks[0].bytes, 36);
}

TEST(Simulator, RefusesAnotherModelsCosts) {
  EXPECT_THROW(simulate(one_f_one_b(4, 4), testing::afm_costs(3)), InternalError);
}

}  // namespace
}  // namespace deltapipe::pipeline
