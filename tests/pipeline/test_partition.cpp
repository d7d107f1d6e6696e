#include "pipeline/partition.h"

#include "core/error.h"
#include "core/random.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

namespace deltapipe::pipeline {
namespace {

double largest_stage(const LayerCosts& costs, const Partition& partition) {
  double largest = 0;
  for (int s = 0; s < std::ssize(partition); ++s) largest = std::max(largest, stage_cost(costs, partition, s));
  return largest;
}
double sum_of_squares(const LayerCosts& costs, const Partition& partition) {
  double sum = 0;
  for (int s = 0; s < std::ssize(partition); ++s) sum += std::pow(stage_cost(costs, partition, s), 2);
  return sum;
}

void for_each_partition(int layers, int stages, const std::function<void(const Partition&)>& visit) {
  Partition partition(static_cast<std::size_t>(stages));
  const std::function<void(int, int)> extend = [&](int stage, int begin) {
    if (stage == stages - 1) {
      partition.back() = {begin, layers};
      visit(partition);
      return;
    }
    for (int end = begin + 1; end <= layers - (stages - 1 - stage); ++end) {
      partition[static_cast<std::size_t>(stage)] = {begin, end};
      extend(stage + 1, end);
    }
  };
  extend(0, 0);
}

TEST(Partition, AsGoodAsTheBestOfAll) {
  RandomStream random(50, "partition");
  for (int i = 0; i < 200; ++i) {
    const int layers = 1 + static_cast<int>(random.next_below(11));
    const int stages = 1 + static_cast<int>(random.next_below(static_cast<std::uint64_t>(layers)));
    LayerCosts costs;
    const bool whole = i % 2 == 0;  // whole numbers: many partitions are equally good
    const auto draw = [&] { return whole ? 1.0 + static_cast<double>(random.next_below(3)) : random.next_uniform(); };
    for (int l = 0; l < layers; ++l) costs.layers.push_back(draw());
    costs.embedding = draw();
    costs.head = 3 * draw();
    double largest = std::numeric_limits<double>::infinity();
    for_each_partition(layers, stages,
                       [&](const Partition& p) { largest = std::min(largest, largest_stage(costs, p)); });
    double squares = std::numeric_limits<double>::infinity();
    for_each_partition(layers, stages, [&](const Partition& p) {
      if (largest_stage(costs, p) <= largest * (1 + 1e-12)) squares = std::min(squares, sum_of_squares(costs, p));
    });
    const Partition found = partition_layers(costs, stages);
    std::int64_t next = 0;
    for (const LayerRange& range : found) {
      EXPECT_EQ(range.begin, next);
      EXPECT_GE(range.layers(), 1);
      next = range.end;
    }
    EXPECT_EQ(next, layers);
    // Sums in another order: a few of 2^-52 apart.
    EXPECT_NEAR(largest_stage(costs, found), largest, 1e-12 * largest);
    EXPECT_NEAR(sum_of_squares(costs, found), squares, 1e-12 * squares);
  }
}

// 36 even layers on 4 ranks; two vocabulary heads that cost four layers leave the last stage fewer.
TEST(Partition, HeadsTakeLayersAway) {
  LayerCosts costs{std::vector<double>(36, 1.0), 0.0, 4.0};
  const Partition found = partition_layers(costs, 4);
  const Partition expected{{0, 10}, {10, 20}, {20, 30}, {30, 36}};
  EXPECT_EQ(found, expected);
  costs.head = 100;  // a stage keeps at least one layer
  EXPECT_EQ(partition_layers(costs, 4).back(), (LayerRange{35, 36}));
}

TEST(Partition, TooFewLayers) {
  EXPECT_THROW(partition_layers({{1.0, 1.0}, 0, 0}, 3), ConfigError);
  EXPECT_THROW(partition_layers({{1.0, 1.0}, 0, 0}, 0), ConfigError);
}

TEST(Partition, ExplicitList) {
  const std::vector<std::int64_t> counts{9, 9, 12, 6};
  const Partition expected{{0, 9}, {9, 18}, {18, 30}, {30, 36}};
  EXPECT_EQ(partition_from_counts(counts, 36, 4), expected);
  const auto complaint = [](std::vector<std::int64_t> list) -> std::string {
    try {
      partition_from_counts(list, 36, 4);
    } catch (const ConfigError& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(complaint({9, 9, 9, 9}), "");
  EXPECT_EQ(complaint({12, 12, 12}),
            "pipeline.layers: found 3 numbers [12, 12, 12], accepted: one for each of 4 virtual stages");
  EXPECT_EQ(complaint({9, 9, 9, 8}), "pipeline.layers: found [9, 9, 9, 8], which add up to 35, accepted: a sum of 36");
  EXPECT_EQ(complaint({18, 0, 9, 9}), "pipeline.layers: found [18, 0, 9, 9], accepted: numbers from 1 to 36");
  EXPECT_EQ(complaint({20, -2, 9, 9}), "pipeline.layers: found [20, -2, 9, 9], accepted: numbers from 1 to 36");
}

TEST(Partition, CostModelAddsUp) {
  std::vector<StageCost> layers(5);
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const auto x = static_cast<double>(l + 1);
    layers[l] = {x, 2 * x, 3 * x, 4 * x, 5 * x, 6 * x, 7 * x, 8 * x};
  }
  const StageCost embedding{.1, .2, .3, .4, .5, .6, .7, .8}, head{10, 20, 30, 40, 50, 60, 70, 80};
  const CostModel model = make_cost_model({{0, 2}, {2, 4}, {4, 5}}, layers, embedding, head);
  ASSERT_EQ(model.stages.size(), 3u);
  const StageCost middle{7, 14, 21, 28, 35, 42, 49, 56};
  EXPECT_EQ(model.stages[1], middle);
  EXPECT_DOUBLE_EQ(model.stages[0].teacher_forward_s, 3.1);
  EXPECT_DOUBLE_EQ(model.stages[0].teacher_bytes, 24.8);
  EXPECT_DOUBLE_EQ(model.stages[2].backward_weight_s, 60);
  EXPECT_DOUBLE_EQ(model.stages[2].weight_part_bytes, 105);
  EXPECT_THROW(make_cost_model({{0, 6}}, layers, embedding, head), InternalError);
}

}  // namespace
}  // namespace deltapipe::pipeline
