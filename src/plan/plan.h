// What a run would take and how long it would last, without running it: no weights are read, no GPU and no launcher is
// needed. Memory is exact, for it is measured by the code that trains; time is a model's.
#pragma once

#include "pipeline/model_costs.h"
#include "pipeline/simulator.h"
#include "train/trainer.h"

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace deltapipe {

/// What the time model takes a rank's device for: rates that it sustains, not its peaks.
struct DeviceSpeed {
  std::string name = "one H100";
  pipeline::Speed compute;     // FLOP and bytes of memory a second
  double link_bytes_s = 40e9;  // to another rank, each way: 400 Gb/s of network, less its overhead
};

/// The shape of `config.mesh` for `ranks` ranks; 0: as many as its axes ask for, an automatic one as 1. Throws
/// ConfigError as a training run of that many ranks does.
MeshShape plan_mesh(const Config& config, int ranks);

/// Teacher and student of a configuration from their config.json alone; published KDA models, whose sizes are in the
/// shapes of their weights, need the weight files' headers too. The data set is opened where the vocabulary is its own.
struct PlannedModels {
  std::optional<ModelSpec> teacher;
  ModelSpec student;
};
PlannedModels read_planned_models(const Config& config);

/// Peaks of one rank's arenas over all stages and the evaluation.
struct RankMemory {
  int rank = 0;
  Coordinate at;
  std::vector<std::pair<std::string, std::size_t>> arenas;  // name, bytes of the device's memory
  std::size_t host = 0;                                     // bytes of page-locked host memory beside it
  std::size_t total() const;                                // of the device's memory
};

/// A stage of the recipe against the time model.
struct StageTime {
  std::string name;
  std::int64_t steps = 0;
  std::int64_t tokens = 0;  // of a step, over all ranks
  std::string schedule;
  pipeline::Simulation simulation;  // of one pipeline
  double tokens_per_second() const { return static_cast<double>(tokens) / simulation.step_s; }
  double seconds() const { return static_cast<double>(steps) * simulation.step_s; }
};

struct RunPlan {
  TrainingPlan training;
  DeviceSpeed device;
  std::vector<double> stage_shares;  // [virtual stage]: of the cost of a microbatch in the recipe's last stage
  std::vector<RankMemory> memory;    // [rank]
  std::vector<StageTime> times;      // [stage of the recipe]
};

/// `training` is of a resolved mesh.
///
/// Time: pipeline/model_costs.h for tasks; a hidden state's bytes over the link for messages between stages; for the
/// update, the gradients' reduce-scatter and the weights' all-gather over the link (ring, float32, both as they are
/// sent) and one pass over gradients and optimizer states. Not in it: what the ranks of a sequence send each other
/// within a layer, evaluation, checkpoints, and imbalance of a contiguous layout.
RunPlan make_run_plan(const TrainingPlan& training, const DeviceSpeed& device = {});

/// For people, and for programs (one JSON object).
std::string describe(const RunPlan& plan);
std::string to_json(const RunPlan& plan);

}  // namespace deltapipe
