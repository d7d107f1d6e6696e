// Costs to simulate with, and a check of simulated steps that shares no code with what it checks.
#pragma once

#include "core/random.h"
#include "pipeline/generators.h"
#include "pipeline/simulator.h"

#include <gtest/gtest.h>

#include <string>

namespace deltapipe::pipeline::testing {

/// The same for every stage; `weight_share` of the backward is its weight part.
CostModel even_costs(int stages, double teacher_forward_s, double forward_s, double backward_s,
                     double weight_share = 0.5);

/// AFM-4.5B at 32,768 tokens, in model FLOPs of a microbatch: teacher forward, student forward and backward.
inline CostModel afm_costs(int stages) { return even_costs(stages, 14.6, 10.8, 21.6); }

/// Every stage and kind between 0.2 and 2 s, and a message of up to 0.2 s.
CostModel random_costs(RandomStream& random, int stages);

/// Checks a step between two others from the definitions in schedule.h: every task once, ranks do one thing at a time,
/// nothing starts before what it needs has ended and arrived, and the peaks follow from the tasks.
void expect_sound(const Schedule& schedule, const CostModel& cost, const Simulation& simulation);

/// make_schedule, simulate, expect_sound, and the bound on microbatches in flight. Returns the simulation.
Simulation expect_good_schedule(const ScheduleRequest& request, const CostModel& cost);

std::string describe(const ScheduleRequest& request);

}  // namespace deltapipe::pipeline::testing
