// One training step, and the stages it belongs to. The loop around it is in train/run.h.
#pragma once

#include "core/config.h"
#include "data/host_batch.h"
#include "data/loader.h"
#include "distill/distiller.h"
#include "distill/model_set.h"
#include "distill/objective.h"
#include "eval/divergence.h"
#include "train/optimizer.h"

#include <cstdint>
#include <optional>
#include <regex>
#include <vector>

namespace deltapipe {

/// A configuration with the models it speaks of.
struct TrainingPlan {
  Config config;
  ModelSpec student;
  std::optional<ModelSpec> teacher;
  std::vector<Objective> objectives;  // one a stage

  const ModelSpec* teacher_spec() const { return teacher ? &*teacher : nullptr; }
  /// Whether any stage trains this parameter.
  bool trains(const ParameterSpec& parameter) const;
  std::int64_t evaluation_length() const;
  std::int64_t total_steps() const;
};

/// Throws ConfigError when stages, models and settings do not fit each other.
TrainingPlan make_training_plan(const Config& config, const ModelSpec& student, const ModelSpec* teacher);

struct StepReport {
  LossReport losses;
  double learning_rate = 0;
  double gradient_norm = 0;
  bool applied = false;  // false: loss or gradients were not finite, weights are unchanged
};

class Trainer {
 public:
  /// Takes all memory from `arenas`; both outlive this object. Weights and moments are uninitialised.
  Trainer(const TrainingPlan& plan, ArenaSet& arenas, const Stream& stream);

  /// Sets what is trainable and starts the optimizer afresh.
  void begin_stage(std::size_t stage);
  /// Step `stage_step` (from 0) of the current stage. Data depends on the step's number alone. On a dry stream `loader`
  /// may be null.
  StepReport step(const SequenceLoader* loader, std::int64_t stage_step);
  DivergenceResult evaluate(const WindowReader* reader);

  ModelSet& models() { return models_; }
  Optimizer& optimizer() { return optimizer_; }

  /// Peaks of every arena over all stages and an evaluation: what a real trainer needs.
  static ArenaSet measure(const TrainingPlan& plan, Device device);

 private:
  TrainingPlan plan_;
  ArenaSet& arenas_;
  Context context_;
  ModelSet models_;
  Optimizer optimizer_;
  Distiller distiller_;
  std::vector<HostBatch> batches_;  // one a stage, all in the same memory
  LossSums sums_;
  MicrobatchState microbatch_;
  DivergenceEvaluation evaluation_;
  std::size_t stage_ = 0;
};

}  // namespace deltapipe
