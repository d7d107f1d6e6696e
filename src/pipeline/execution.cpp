#include "pipeline/execution.h"

#include "core/error.h"

#include <algorithm>

namespace deltapipe::pipeline {
namespace {

/// End of every task of a run on the run's clock; negative: not yet run.
class Ends {
 public:
  Ends(const Schedule& schedule, int steps)
      : stages_(static_cast<std::size_t>(schedule.stages())),
        microbatches_(static_cast<std::size_t>(schedule.microbatches)),
        ends_(static_cast<std::size_t>(steps) * task_kinds * stages_ * microbatches_, -1.0) {}
  double& at(int step, TaskKind kind, int stage, int microbatch) {
    const std::size_t block = static_cast<std::size_t>(step) * task_kinds + static_cast<std::size_t>(kind);
    return ends_[(block * stages_ + static_cast<std::size_t>(stage)) * microbatches_ +
                 static_cast<std::size_t>(microbatch)];
  }

 private:
  std::size_t stages_, microbatches_;
  std::vector<double> ends_;
};

[[noreturn]] void fail_stuck(const Schedule& schedule, const Segment& segment, const std::vector<std::size_t>& place,
                             Ends& ends) {
  std::string waits;
  for (int r = 0; r < schedule.ranks; ++r) {
    const auto& list = (*segment.lists)[static_cast<std::size_t>(r)];
    const std::size_t at = place[static_cast<std::size_t>(r)];
    if (at == list.size()) continue;
    for (const Dependency& needed : dependencies(schedule, r, list[at])) {
      const int stage = schedule.stage_of(needed.rank, needed.task.chunk);
      if (ends.at(segment.step + needed.task.step_offset, needed.task.kind, stage, needed.task.microbatch) >= 0)
        continue;
      if (needed.rank == r) {
        fail<InternalError>("schedule '{}': rank {} has {} at place {}, before {}, which it needs", schedule.name, r,
                            describe(list[at]), at, describe(needed.task));
      }
      if (!waits.empty()) waits += "; ";
      waits += fmt::format("rank {} waits at place {} in {} for {} of rank {}", r, at, describe(list[at]),
                           describe(needed.task), needed.rank);
      break;
    }
  }
  fail<InternalError>("schedule '{}': deadlock: {}", schedule.name, waits);
}

}  // namespace

std::vector<PlayedSegment> play(const Schedule& schedule, const std::vector<Segment>& segments, const CostModel& cost) {
  const auto ranks = static_cast<std::size_t>(schedule.ranks);
  int steps = 0;
  for (const Segment& segment : segments) steps = std::max(steps, segment.step + 2);
  Ends ends(schedule, steps);
  std::vector<PlayedSegment> played;
  double begin = 0;  // of the segment, on the run's clock
  for (const Segment& segment : segments) {
    PlayedSegment result{begin, begin, {}};
    result.tasks.resize(ranks);
    std::vector<std::size_t> place(ranks, 0);
    std::vector<double> free_at(ranks, begin);
    const auto try_next = [&](int r) {
      const auto i = static_cast<std::size_t>(r);
      const auto& list = (*segment.lists)[i];
      if (place[i] == list.size()) return false;
      const Task& task = list[place[i]];
      double start = free_at[i];
      for (const Dependency& needed : dependencies(schedule, r, task)) {
        const double end = ends.at(segment.step + needed.task.step_offset, needed.task.kind,
                                   schedule.stage_of(needed.rank, needed.task.chunk), needed.task.microbatch);
        if (end < 0) return false;
        start = std::max(start, needed.rank == r ? end : end + cost.message_s);
      }
      const double end = start + cost.seconds(schedule, r, task);
      ends.at(segment.step + task.step_offset, task.kind, schedule.stage_of(r, task.chunk), task.microbatch) = end;
      result.tasks[i].push_back({task, start, end});
      free_at[i] = end;
      ++place[i];
      return true;
    };
    for (bool moved = true; moved;) {
      moved = false;
      for (int r = 0; r < schedule.ranks; ++r) {
        while (try_next(r)) moved = true;
      }
    }
    for (std::size_t r = 0; r < ranks; ++r) {
      if (place[r] != (*segment.lists)[r].size()) fail_stuck(schedule, segment, place, ends);
    }
    result.end_s = *std::max_element(free_at.begin(), free_at.end());
    begin = result.end_s + (segment.trains ? cost.update_s : 0.0);
    played.push_back(std::move(result));
  }
  return played;
}

}  // namespace deltapipe::pipeline
