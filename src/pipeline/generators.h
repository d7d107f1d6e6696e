// Schedules by name. All of them pass verify() for any p >= 1, m >= 1.
//
// F, B, W below are a rank's seconds for one microbatch: forward, whole backward, and the weight part of the backward
// (the input part is B - W); p ranks, m microbatches, v chunks a rank. With equal stages, free messages and no teacher
// the bubble of a rank is, in seconds:
//   1f1b         (p - 1)(F + B)         Narayanan et al., "Memory-Efficient Pipeline-Parallel DNN Training", 2021
//   interleaved  (p - 1)(F + B) / v     Narayanan et al., "Efficient Large-Scale Language Model Training on GPU
//   Clusters
//                                       Using Megatron-LM", 2021; m a multiple of p
//   zero_bubble  (p - 1)(F + B - 2W)    Qi et al., "Zero Bubble Pipeline Parallelism", 2023, schedule ZB-H1; m >= p
#pragma once

#include "pipeline/cost_model.h"

#include <cstdint>

namespace deltapipe::pipeline {

enum class ScheduleKind : std::uint8_t { one_f_one_b, interleaved, zero_bubble, align };

struct ScheduleRequest {
  ScheduleKind kind = ScheduleKind::one_f_one_b;
  int ranks = 1;
  int chunks = 1;  // over 1: interleaved and align only
  int microbatches = 1;
  Teacher teacher = Teacher::in_line;
  /// Teacher::ahead: teacher forwards (microbatches times chunks) whose hidden states a rank may keep at a time; 0: any
  /// number. Never fewer than the inline schedule needs.
  int kept_limit = 0;
};

/// Throws InternalError for sizes below 1, chunks with a kind that has none, or alignment without teacher. The cost
/// model is used for Teacher::ahead alone.
Schedule make_schedule(const ScheduleRequest& request, const CostModel& cost);

/// Forward, then as soon as possible backward: rank r begins with p - 1 - r forwards, so min(m, p - r) are in flight.
Schedule one_f_one_b(int ranks, int microbatches);
/// Ranks hold v chunks and pass every microbatch round v times. Microbatches go in max(1, m / p) groups of even size;
/// with groups of g at most, rank r begins with 2(p - 1 - r) + (v - 1) g forwards and holds one more.
Schedule interleaved(int ranks, int chunks, int microbatches);
/// ZB-H1: the order of 1f1b; rank r puts off r weight parts, so that each rank has min(m, p) in flight.
Schedule zero_bubble(int ranks, int microbatches);
/// The most microbatches (times chunks) that a rank has in flight.
int in_flight_bound(const ScheduleRequest& request, int rank);

/// Adds the teacher's forward right before each forward (or align) of the same microbatch and chunk.
Schedule with_teacher_inline(Schedule student);

/// Adds the teacher's forwards where `cost` says that ranks idle, those of the next step included. The order of the
/// student's tasks stays. Of many placements the one with the shortest simulated step is returned, among nearly equal
/// ones (0.2 %) the one that keeps fewest teacher forwards; never one that is slower than inline.
Schedule with_teacher_ahead(const Schedule& student, const CostModel& cost, int kept_limit);

/// Legal, but drawn at random: any order that keeps dependencies, channels and the order of microbatches. For tests.
/// Teacher::ahead draws how far ahead each stage is as well.
Schedule random_legal_schedule(std::uint64_t seed, int ranks, int chunks, int microbatches, StudentWork student,
                               Teacher teacher);

}  // namespace deltapipe::pipeline
