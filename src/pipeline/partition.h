// Which layers a virtual stage holds. Layers cost differently (KDA, attention), and the ends cost more: stage 0 embeds,
// the last stage has both heads, so stages of even cost hold uneven numbers of layers.
#pragma once

#include "pipeline/cost_model.h"

#include <cstdint>
#include <span>
#include <vector>

namespace deltapipe::pipeline {

/// Layers begin .. end - 1 of teacher and student.
struct LayerRange {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  std::int64_t layers() const { return end - begin; }
  friend bool operator==(const LayerRange&, const LayerRange&) = default;
};
using Partition = std::vector<LayerRange>;  // [virtual stage]: consecutive, at least one layer each

/// Cost of each layer (teacher and student together, any unit), and what the ends add.
struct LayerCosts {
  std::vector<double> layers;
  double embedding = 0;  // on stage 0
  double head = 0;       // on the last stage
};
double stage_cost(const LayerCosts& costs, const Partition& partition, int stage);

/// The partition whose most expensive stage is cheapest: with as many microbatches as it takes, that stage sets the
/// pace. Of several such the one with the smallest sum of squared stage costs. Exact, by dynamic programming. Throws
/// ConfigError when there are fewer layers than stages.
Partition partition_layers(const LayerCosts& costs, int stages);

/// A partition given as the number of layers of each virtual stage, in order. Throws ConfigError unless there is one
/// number a stage, each at least 1, and they add up to `layers`.
Partition partition_from_counts(std::span<const std::int64_t> counts, std::int64_t layers, int stages);

/// The costs of a partition's stages. `embedding` and `head` are added to the first and the last one.
CostModel make_cost_model(const Partition& partition, std::span<const StageCost> layers, const StageCost& embedding,
                          const StageCost& head);

}  // namespace deltapipe::pipeline
