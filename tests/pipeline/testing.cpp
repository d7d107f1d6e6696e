#include "tests/pipeline/testing.h"

#include <fmt/core.h>

#include <algorithm>
#include <map>
#include <tuple>

namespace deltapipe::pipeline::testing {

CostModel even_costs(int stages, double teacher_forward_s, double forward_s, double backward_s, double weight_share) {
  StageCost cost;
  cost.teacher_forward_s = teacher_forward_s;
  cost.forward_s = forward_s;
  cost.backward_input_s = backward_s * (1 - weight_share);
  cost.backward_weight_s = backward_s * weight_share;
  cost.align_s = forward_s + backward_s;
  return CostModel::uniform(stages, cost);
}

CostModel random_costs(RandomStream& random, int stages) {
  const auto seconds = [&] { return 0.2 + 1.8 * random.next_uniform(); };
  CostModel model;
  for (int s = 0; s < stages; ++s) {
    StageCost cost;
    cost.teacher_forward_s = seconds();
    cost.forward_s = seconds();
    cost.backward_input_s = seconds();
    cost.backward_weight_s = seconds();
    cost.align_s = seconds();
    cost.activation_bytes = 4;
    cost.weight_part_bytes = 2;
    cost.teacher_bytes = 1;
    model.stages.push_back(cost);
  }
  model.message_s = 0.2 * random.next_uniform();
  model.update_s = random.next_uniform();
  return model;
}

void expect_sound(const Schedule& schedule, const CostModel& cost, const Simulation& simulation) {
  const int p = schedule.ranks, stages = p * schedule.chunks, m = schedule.microbatches;
  using Key = std::tuple<TaskKind, int, int, int>;  // kind, stage, microbatch, step offset
  std::map<Key, TimedTask> found;
  double busy = 0, end_of_step = 0;
  for (int r = 0; r < p; ++r) {
    double free_at = 0;
    for (const TimedTask& t : simulation.tasks[static_cast<std::size_t>(r)]) {
      const int stage = t.task.chunk * p + r;
      const Key key{t.task.kind, stage, t.task.microbatch, t.task.step_offset};
      EXPECT_TRUE(found.emplace(key, t).second) << describe(t.task) << " twice on rank " << r;
      EXPECT_GE(t.start_s, free_at - 1e-9) << describe(t.task) << " overlaps on rank " << r;
      // 1e-9: times of later steps are sums of more terms, and differ in their last bits.
      EXPECT_NEAR(t.end_s - t.start_s, cost.stages[static_cast<std::size_t>(stage)].seconds(t.task.kind), 1e-9);
      free_at = t.end_s;
      busy += t.end_s - t.start_s;
    }
    end_of_step = std::max(end_of_step, free_at);
  }
  EXPECT_NEAR(simulation.step_s, end_of_step + cost.update_s, 1e-9);
  EXPECT_NEAR(simulation.bubble, 1 - (busy / p + cost.update_s) / simulation.step_s, 1e-9);

  const auto expect_after = [&](const Key& key, const Key& needed) {
    const auto it = found.find(needed);
    ASSERT_NE(it, found.end()) << "a step lacks what its task needs";
    const double delay = std::get<1>(key) % p == std::get<1>(needed) % p ? 0.0 : cost.message_s;
    EXPECT_GE(found.at(key).start_s, it->second.end_s + delay - 1e-9)
        << schedule.name << ": " << describe(found.at(key).task) << " of stage " << std::get<1>(key);
  };
  const bool teacher = schedule.teacher != Teacher::none;
  const auto expect_after_teacher = [&](const Key& key) {
    const auto [kind, stage, i, offset] = key;
    if (teacher && i >= schedule.ahead[static_cast<std::size_t>(stage)]) {
      expect_after(key, {TaskKind::teacher_forward, stage, i, 0});
    }
  };
  std::size_t expected = 0;
  for (int s = 0; s < stages; ++s) {
    for (int i = 0; i < m; ++i) {
      if (teacher) {
        const int offset = i < schedule.ahead[static_cast<std::size_t>(s)] ? 1 : 0;
        const Key key{TaskKind::teacher_forward, s, i, offset};
        ASSERT_TRUE(found.count(key)) << "stage " << s << " lacks the teacher's microbatch " << i;
        ++expected;
        // With the same offset in this step, unless the step before has run it for a stage that is less far ahead.
        const Key before{TaskKind::teacher_forward, s - 1, i, offset};
        if (s > 0 && (offset == 1 || i >= schedule.ahead[static_cast<std::size_t>(s - 1)])) expect_after(key, before);
      }
      if (schedule.student == StudentWork::align) {
        expect_after_teacher({TaskKind::align, s, i, 0});
        ++expected;
        continue;
      }
      const bool split = schedule.student == StudentWork::split_backward;
      const TaskKind backward = split ? TaskKind::backward_input : TaskKind::backward;
      const Key forward_key{TaskKind::forward, s, i, 0}, backward_key{backward, s, i, 0};
      ASSERT_TRUE(found.count(forward_key) && found.count(backward_key));
      expected += split ? 3 : 2;
      if (s > 0) expect_after(forward_key, {TaskKind::forward, s - 1, i, 0});
      if (s == stages - 1) expect_after_teacher(forward_key);
      expect_after(backward_key, forward_key);
      if (s < stages - 1) expect_after(backward_key, {backward, s + 1, i, 0});
      expect_after_teacher(backward_key);
      if (split) expect_after({TaskKind::backward_weight, s, i, 0}, backward_key);
    }
  }
  EXPECT_EQ(found.size(), expected);
}

Simulation expect_good_schedule(const ScheduleRequest& request, const CostModel& cost) {
  SCOPED_TRACE(describe(request));
  const Schedule schedule = make_schedule(request, cost);
  Simulation simulation = simulate(schedule, cost);
  expect_sound(schedule, cost, simulation);
  for (int r = 0; r < request.ranks; ++r) {
    EXPECT_LE(simulation.peaks[static_cast<std::size_t>(r)].in_flight, in_flight_bound(request, r)) << "rank " << r;
  }
  return simulation;
}

std::string describe(const ScheduleRequest& q) {
  constexpr std::array<const char*, 4> kinds{"1f1b", "interleaved", "zero_bubble", "align"};
  constexpr std::array<const char*, 3> teachers{"none", "inline", "ahead"};
  return fmt::format("{} p={} v={} m={} teacher={} limit={}", kinds[static_cast<std::size_t>(q.kind)], q.ranks,
                     q.chunks, q.microbatches, teachers[static_cast<std::size_t>(q.teacher)], q.kept_limit);
}

}  // namespace deltapipe::pipeline::testing
