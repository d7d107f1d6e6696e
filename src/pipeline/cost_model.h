// What a schedule is simulated against: seconds and bytes of every virtual stage.
#pragma once

#include "pipeline/schedule.h"

#include <vector>

namespace deltapipe::pipeline {

/// Cost of one microbatch on one virtual stage; costs of layers, embedding and heads add up to it.
struct StageCost {
  double teacher_forward_s = 0;
  double forward_s = 0;
  double backward_input_s = 0;   // with the recomputation, when activations are recomputed
  double backward_weight_s = 0;  // a whole backward takes both
  double align_s = 0;
  double activation_bytes = 0;   // from the start of the forward to the end of the backward (or its input part)
  double weight_part_bytes = 0;  // from the end of the input part to the end of the weight part
  double teacher_bytes = 0;      // from the start of the teacher's forward to the end of what uses its hidden states

  double seconds(TaskKind kind) const {
    switch (kind) {
      case TaskKind::teacher_forward: return teacher_forward_s;
      case TaskKind::forward: return forward_s;
      case TaskKind::backward: return backward_input_s + backward_weight_s;
      case TaskKind::backward_input: return backward_input_s;
      case TaskKind::backward_weight: return backward_weight_s;
      case TaskKind::align: return align_s;
    }
    return 0;
  }
  StageCost& operator+=(const StageCost& other) {
    teacher_forward_s += other.teacher_forward_s;
    forward_s += other.forward_s;
    backward_input_s += other.backward_input_s;
    backward_weight_s += other.backward_weight_s;
    align_s += other.align_s;
    activation_bytes += other.activation_bytes;
    weight_part_bytes += other.weight_part_bytes;
    teacher_bytes += other.teacher_bytes;
    return *this;
  }
  friend bool operator==(const StageCost&, const StageCost&) = default;
};

struct CostModel {
  std::vector<StageCost> stages;  // [virtual stage]
  double message_s = 0;           // from the end of the sender to the earliest start of the receiver; occupies neither
  double message_bytes = 0;       // held by the receiving rank from arrival to the start of the task that takes it
  double update_s = 0;            // gradient norm and optimizer, after the last task of the last rank

  double seconds(const Schedule& schedule, int rank, const Task& task) const {
    return stages[static_cast<std::size_t>(schedule.stage_of(rank, task.chunk))].seconds(task.kind);
  }
  /// The same cost for every stage.
  static CostModel uniform(int stages, const StageCost& cost) {
    CostModel model;
    model.stages.assign(static_cast<std::size_t>(stages), cost);
    return model;
  }
};

}  // namespace deltapipe::pipeline
