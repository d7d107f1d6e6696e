#include "pipeline/partition.h"

#include "core/error.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <limits>
#include <numeric>

namespace deltapipe::pipeline {

double stage_cost(const LayerCosts& costs, const Partition& partition, int stage) {
  const LayerRange& range = partition[static_cast<std::size_t>(stage)];
  double sum = stage == 0 ? costs.embedding : 0.0;
  for (std::int64_t l = range.begin; l < range.end; ++l) sum += costs.layers[static_cast<std::size_t>(l)];
  return stage + 1 == std::ssize(partition) ? sum + costs.head : sum;
}

Partition partition_layers(const LayerCosts& costs, int stages) {
  const auto layers = static_cast<int>(costs.layers.size());
  if (stages < 1 || layers < stages) {
    fail<ConfigError>(
        "cannot spread {} layers over {} virtual stages (pipeline ranks times chunks): each needs at least 1", layers,
        stages);
  }
  std::vector<double> before(static_cast<std::size_t>(layers) + 1, 0.0);  // cost of the layers 0 .. i - 1
  std::partial_sum(costs.layers.begin(), costs.layers.end(), before.begin() + 1);
  const auto cost_of = [&](int stage, int begin, int end) {
    double sum = before[static_cast<std::size_t>(end)] - before[static_cast<std::size_t>(begin)];
    if (stage == 0) sum += costs.embedding;
    if (stage == stages - 1) sum += costs.head;
    return sum;
  };
  constexpr double none = std::numeric_limits<double>::infinity();
  // best(stage, end): the value of the best way to give the layers 0 .. end - 1 to the stages 0 .. stage.
  const auto solve = [&](auto&& join) {
    std::vector<std::vector<double>> best(static_cast<std::size_t>(stages),
                                          std::vector<double>(static_cast<std::size_t>(layers) + 1, none));
    std::vector<std::vector<int>> from(best.size(), std::vector<int>(static_cast<std::size_t>(layers) + 1, 0));
    for (int stage = 0; stage < stages; ++stage) {
      const auto s = static_cast<std::size_t>(stage);
      for (int end = stage + 1; end <= layers - (stages - 1 - stage); ++end) {
        for (int begin = stage; begin < (stage == 0 ? 1 : end); ++begin) {
          const double rest = stage == 0 ? 0.0 : best[s - 1][static_cast<std::size_t>(begin)];
          const double value = join(rest, cost_of(stage, begin, end));
          if (value >= best[s][static_cast<std::size_t>(end)]) continue;
          best[s][static_cast<std::size_t>(end)] = value;
          from[s][static_cast<std::size_t>(end)] = begin;
        }
      }
    }
    return std::pair(best.back().back(), from);
  };
  const double largest = solve([](double rest, double cost) { return std::max(rest, cost); }).first;
  // Sums in another order differ in their last bits; without the allowance the optimum itself could be shut out.
  const double allowed = largest + 1e-12 * std::abs(largest);
  const auto from = solve([&](double rest, double cost) { return cost <= allowed ? rest + cost * cost : none; }).second;
  Partition partition(static_cast<std::size_t>(stages));
  int end = layers;
  for (int stage = stages - 1; stage >= 0; --stage) {
    const auto s = static_cast<std::size_t>(stage);
    const int begin = from[s][static_cast<std::size_t>(end)];
    partition[s] = {begin, end};
    end = begin;
  }
  return partition;
}

Partition partition_from_counts(std::span<const std::int64_t> counts, std::int64_t layers, int stages) {
  const std::string found = fmt::format("[{}]", fmt::join(counts, ", "));
  if (std::ssize(counts) != stages) {
    fail<ConfigError>("pipeline.layers: found {} numbers {}, accepted: one for each of {} virtual stages",
                      counts.size(), found, stages);
  }
  Partition partition;
  std::int64_t begin = 0;
  for (const std::int64_t count : counts) {
    if (count < 1 || count > layers) {
      fail<ConfigError>("pipeline.layers: found {}, accepted: numbers from 1 to {}", found, layers);
    }
    partition.push_back({begin, begin + count});
    begin += count;
  }
  if (begin != layers) {
    fail<ConfigError>("pipeline.layers: found {}, which add up to {}, accepted: a sum of {}", found, begin, layers);
  }
  return partition;
}

CostModel make_cost_model(const Partition& partition, std::span<const StageCost> layers, const StageCost& embedding,
                          const StageCost& head) {
  CostModel model;
  for (const LayerRange& range : partition) {
    require(range.begin >= 0 && range.end <= std::ssize(layers), "make_cost_model: the partition has other layers");
    StageCost sum;
    for (std::int64_t l = range.begin; l < range.end; ++l) sum += layers[static_cast<std::size_t>(l)];
    model.stages.push_back(sum);
  }
  require(!model.stages.empty(), "make_cost_model: empty partition");
  model.stages.front() += embedding;
  model.stages.back() += head;
  return model;
}

}  // namespace deltapipe::pipeline
