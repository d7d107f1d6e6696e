// Plays a schedule against a cost model: when every task runs, how long a step takes, what a rank idles and holds.
#pragma once

#include "pipeline/execution.h"

#include <vector>

namespace deltapipe::pipeline {

/// Largest counts and bytes that a rank holds at one time, over prologue, steps and last step.
struct RankPeak {
  int in_flight = 0;     // microbatches (times chunks) whose forward has begun and whose backward has not wholly ended
  int kept_teacher = 0;  // teacher forwards whose hidden states still wait for the student
  int waiting = 0;       // messages that have arrived for a task that has not begun
  double bytes = 0;      // all of these together: the CostModel's bytes
};

struct Simulation {
  int ranks = 1;
  int chunks = 1;
  int microbatches = 1;
  std::vector<std::vector<TimedTask>> tasks;  // [rank]: a step between two others, from its start
  double prologue_s = 0;                      // once, before the first step
  double step_s = 0;                          // from the start of a step to the start of the next one: tasks and update
  double update_s = 0;                        // the part of it after the last task
  std::vector<double> busy_s;                 // [rank]: seconds in tasks, a step
  std::vector<RankPeak> peaks;                // [rank]
  /// Share of the ranks' time in which they neither run a task nor the update:
  /// 1 - (sum of busy_s + ranks * update_s) / (ranks * step_s).
  double bubble = 0;
};

/// Verifies the schedule, then plays prologue, three steps and the last step; the middle one is reported. In a run,
/// steps between two others are all alike, because ranks meet at their ends. Throws InternalError as verify() does, or
/// when the cost model has not one entry a virtual stage.
Simulation simulate(const Schedule& schedule, const CostModel& cost);

}  // namespace deltapipe::pipeline
