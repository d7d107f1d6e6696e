// One training step, and the stages it belongs to. The loop around it is in train/run.h.
#pragma once

#include "comm/mesh.h"
#include "comm/sequence_parallel.h"
#include "core/config.h"
#include "data/host_batch.h"
#include "data/loader.h"
#include "distill/distiller.h"
#include "distill/model_set.h"
#include "distill/objective.h"
#include "eval/divergence.h"
#include "pipeline/executor.h"
#include "pipeline/generators.h"
#include "pipeline/model_costs.h"
#include "train/bucket_exchange.h"
#include "train/optimizer.h"

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

namespace deltapipe {

/// A configuration with the models it speaks of, on a mesh.
struct TrainingPlan {
  Config config;
  ModelSpec student;
  std::optional<ModelSpec> teacher;
  std::vector<Objective> objectives;  // one a stage of the recipe
  MeshShape mesh;
  std::vector<LayerRange> partition;          // layers of every virtual stage of the pipeline
  std::vector<pipeline::Schedule> schedules;  // one a stage of the recipe

  const ModelSpec* teacher_spec() const { return teacher ? &*teacher : nullptr; }
  /// Whether any stage trains this parameter.
  bool trains(const ParameterSpec& parameter) const;
  std::int64_t evaluation_length() const;
  std::int64_t total_steps() const;
  LayoutKind layout() const;
  int chunks() const { return static_cast<int>(partition.size()) / mesh.pipeline; }
  /// Layers of the chunks of a pipeline rank.
  std::vector<LayerRange> ranges_of(int pipeline_rank) const;
  /// Microbatches that a rank runs in a step of stage i.
  int microbatches(std::size_t i) const;
  /// pipeline::model_flops_per_token of stage i.
  double flops_per_token(std::size_t i) const;
  /// What the schedule of stage i was placed with; another speed gives its time on another device.
  pipeline::CostModel cost_model(std::size_t i, const pipeline::Speed& speed = {}) const;
};

/// `mesh` is resolved. Throws ConfigError when stages, models, mesh and settings do not fit each other.
TrainingPlan make_training_plan(const Config& config, const ModelSpec& student, const ModelSpec* teacher,
                                const MeshShape& mesh = {});

struct StepReport {
  LossReport losses;
  double learning_rate = 0;
  double gradient_norm = 0;
  bool applied = false;  // false: loss or gradients were not finite, weights are unchanged
};

/// Every rank of the mesh has one and calls the same of its functions in the same order.
class Trainer {
 public:
  /// Takes all memory from `arenas`; they, `mesh` and the loaders outlive this object. Weights and moments are
  /// uninitialised.
  Trainer(const TrainingPlan& plan, Mesh& mesh, ArenaSet& arenas, const Stream& stream);
  Trainer(const Trainer&) = delete;
  Trainer& operator=(const Trainer&) = delete;

  /// Sets what is trainable and starts the optimizer afresh.
  void begin_stage(std::size_t stage);
  /// Step `stage_step` (from 0) of the current stage, after the one before it or any other after begin_stage() and
  /// stop(). Data depends on the step's number alone. On a dry stream `loader` may be null.
  StepReport step(const SequenceLoader* loader, std::int64_t stage_step);
  /// Its two halves. After accumulate() the gradients of optimizer().state() are the whole batch's; `applied` is not
  /// known yet. update() changes weights unless loss or gradients are not finite; then the gradients are gone.
  StepReport accumulate(const SequenceLoader* loader, std::int64_t stage_step);
  void update(StepReport& report);
  /// Before steps end elsewhere than at the end of a stage: drops what was done ahead.
  void stop();
  DivergenceResult evaluate(const WindowReader* reader);

  ModelSet& models() { return models_; }
  Optimizer& optimizer() { return optimizer_; }
  /// Sends every rank's shard of the trained weights to the ranks that hold the same layers, after the shards were set.
  void gather_weights(bool all_stages);
  /// Whether this rank's copy of a weight is the one that counts: tied embeddings live on two ranks of a pipeline.
  bool owns(const ParameterSpec& parameter) const;
  pipeline::Executor& executor() { return works_[stage_].executor; }

  /// Peaks of every arena over all stages and an evaluation: what a real trainer of this rank needs.
  static ArenaSet measure(const TrainingPlan& plan, Mesh& mesh, Device device);

 private:
  /// Of one stage of the recipe. Stages follow each other, so all of this is in the same memory.
  struct StageWork {
    std::vector<HostBatch> batches;  // two where the teacher runs ahead: this step's and the next one's
    pipeline::Executor executor;
    std::array<std::int64_t, 2> loaded{-1, -1};  // stage steps that the batches hold
  };
  std::vector<StageWork> make_works();
  void mark_trainable(std::size_t stage);
  HostBatch& load(const SequenceLoader* loader, std::int64_t stage_step);
  void sum_gradients();
  /// Tied embeddings on two ranks of a pipeline: each holds a part of their gradient.
  bool embedding_is_apart() const { return plan_.student.tied_embeddings && mesh_.shape().pipeline > 1; }

  TrainingPlan plan_;
  Mesh& mesh_;
  ArenaSet& arenas_;
  std::optional<SequenceParallel> sequence_;
  Context context_;
  ModelSet models_;
  Optimizer optimizer_;
  BucketExchange exchange_;
  pipeline::Stages stages_;
  std::vector<StageWork> works_;  // one a stage
  Tensor totals_;                 // float64 [LossSums::count + 1]: the losses' sums and the gradients' squared norm
  Tensor host_totals_;            // as read back; the same memory on the CPU
  LossSums sums_;                 // the first part of totals_
  DivergenceEvaluation evaluation_;
  std::size_t stage_ = 0;
};

}  // namespace deltapipe
