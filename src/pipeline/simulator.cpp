#include "pipeline/simulator.h"

#include "core/error.h"

#include <algorithm>

namespace deltapipe::pipeline {
namespace {

struct Change {  // of what a rank holds
  double at_s;
  bool takes;  // what ends at a time is released before what starts then is taken
  int in_flight, kept_teacher, waiting;
  double bytes;
};

RankPeak peak_of(std::vector<Change>& changes) {
  std::stable_sort(changes.begin(), changes.end(), [](const Change& a, const Change& b) {
    return a.at_s != b.at_s ? a.at_s < b.at_s : a.takes < b.takes;
  });
  RankPeak now, peak;
  for (const Change& c : changes) {
    now.in_flight += c.in_flight;
    now.kept_teacher += c.kept_teacher;
    now.waiting += c.waiting;
    now.bytes += c.bytes;
    peak.in_flight = std::max(peak.in_flight, now.in_flight);
    peak.kept_teacher = std::max(peak.kept_teacher, now.kept_teacher);
    peak.waiting = std::max(peak.waiting, now.waiting);
    peak.bytes = std::max(peak.bytes, now.bytes);
  }
  return peak;
}

std::vector<RankPeak> peaks_of(const Schedule& schedule, const std::vector<PlayedSegment>& run, const CostModel& cost) {
  const auto ranks = static_cast<std::size_t>(schedule.ranks);
  std::vector<std::vector<Change>> changes(ranks);
  for (const PlayedSegment& segment : run) {
    for (int r = 0; r < schedule.ranks; ++r) {
      auto& own = changes[static_cast<std::size_t>(r)];
      for (const auto& [task, start, end] : segment.tasks[static_cast<std::size_t>(r)]) {
        const StageCost& stage = cost.stages[static_cast<std::size_t>(schedule.stage_of(r, task.chunk))];
        if (incoming(schedule, r, task)) own.push_back({start, false, 0, 0, -1, -cost.message_bytes});
        if (const auto m = outgoing(schedule, r, task)) {
          changes[static_cast<std::size_t>(m->to)].push_back({end + cost.message_s, true, 0, 0, 1, cost.message_bytes});
        }
        const bool uses_teacher = schedule.teacher != Teacher::none;
        const Change teacher_used{end, false, 0, -1, 0, -stage.teacher_bytes};
        switch (task.kind) {
          case TaskKind::teacher_forward: own.push_back({start, true, 0, 1, 0, stage.teacher_bytes}); break;
          case TaskKind::forward: own.push_back({start, true, 1, 0, 0, stage.activation_bytes}); break;
          case TaskKind::backward:
            own.push_back({end, false, -1, 0, 0, -stage.activation_bytes});
            if (uses_teacher) own.push_back(teacher_used);
            break;
          case TaskKind::backward_input:
            own.push_back({end, false, 0, 0, 0, stage.weight_part_bytes - stage.activation_bytes});
            if (uses_teacher) own.push_back(teacher_used);
            break;
          case TaskKind::backward_weight: own.push_back({end, false, -1, 0, 0, -stage.weight_part_bytes}); break;
          case TaskKind::align: own.push_back(teacher_used); break;
        }
      }
    }
  }
  std::vector<RankPeak> peaks;
  for (auto& own : changes) peaks.push_back(peak_of(own));
  return peaks;
}

}  // namespace

Simulation simulate(const Schedule& schedule, const CostModel& cost) {
  verify(schedule);
  if (std::ssize(cost.stages) != schedule.stages()) {
    fail<InternalError>("simulate: the cost model has {} stages, schedule '{}' has {}", cost.stages.size(),
                        schedule.name, schedule.stages());
  }
  const TaskLists first = prologue(schedule), last = last_step(schedule);
  const std::vector<Segment> segments{{0, false, &first},
                                      {0, true, &schedule.tasks},
                                      {1, true, &schedule.tasks},
                                      {2, true, &schedule.tasks},
                                      {3, true, &last}};
  auto run = play(schedule, segments, cost);
  Simulation result;
  result.ranks = schedule.ranks;
  result.chunks = schedule.chunks;
  result.microbatches = schedule.microbatches;
  result.prologue_s = run.front().end_s;
  result.peaks = peaks_of(schedule, run, cost);
  result.update_s = cost.update_s;
  const double begin = run[2].begin_s;
  result.step_s = run[3].begin_s - begin;
  result.tasks = std::move(run[2].tasks);
  double occupied = cost.update_s * schedule.ranks;
  for (auto& list : result.tasks) {
    double busy = 0;
    for (TimedTask& t : list) {
      busy += t.end_s - t.start_s;
      t.start_s -= begin;
      t.end_s -= begin;
    }
    result.busy_s.push_back(busy);
    occupied += busy;
  }
  // Sums in another order can make a full step a few bits shorter than its work.
  if (result.step_s > 0) result.bubble = std::max(0.0, 1 - occupied / (schedule.ranks * result.step_s));
  return result;
}

}  // namespace deltapipe::pipeline
