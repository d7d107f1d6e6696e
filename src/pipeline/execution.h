// Internal: a run of a schedule (prologue, steps, last step) laid out and played. verify() and simulate() share it.
#pragma once

#include "pipeline/cost_model.h"

#include <vector>

namespace deltapipe::pipeline {

struct TimedTask {
  Task task;
  double start_s = 0;
  double end_s = 0;
};

/// A stretch of a run between two meetings of all ranks.
struct Segment {
  int step = 0;            // that tasks of step_offset 0 belong to
  bool trains = true;      // false: the prologue
  const TaskLists* lists;  // borrowed
};
struct PlayedSegment {
  double begin_s = 0;                         // on the run's clock, as all times here
  double end_s = 0;                           // of the last task
  std::vector<std::vector<TimedTask>> tasks;  // [rank]
};

/// Runs the segments one after another: every rank its tasks in order, each as soon as what it needs has ended and,
/// from another rank, arrived. Throws InternalError when no rank can go on. The schedule must be complete.
std::vector<PlayedSegment> play(const Schedule& schedule, const std::vector<Segment>& segments, const CostModel& cost);

}  // namespace deltapipe::pipeline
