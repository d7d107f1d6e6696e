// What travels between the ranks that hold the same layers: the buckets that a stage of the recipe trains.
#include "tests/comm/testing.h"
#include "tests/train/count_allocations.h"
#include "tests/train/mesh_job.h"
#include "train/patterns.h"

#include <gtest/gtest.h>

namespace deltapipe {
namespace {

using testing::MeshCase;
using testing::MeshJob;

/// `pipeline` stages, each on so many ranks that share the batch, of 8 sequences, where it can be shared, or else its
/// sequences.
MeshCase case_of(const std::string& student, int pipeline) {
  const int peers = testing::runtime().size() / pipeline;
  MeshCase c;
  c.student = student;
  c.shape = 8 % peers == 0 ? MeshShape{peers, pipeline, 1} : MeshShape{1, pipeline, peers};
  return c;
}

const std::vector<std::string> frozen_later{"embed_tokens", "lm_head", "model\\.norm", "layers\\.[12]\\."};

/// A second stage like the first, with some layers frozen.
void add_frozen_stage(TrainingPlan& plan) {
  plan.config.stages.push_back(plan.config.stages.front());
  plan.config.stages.back().name = "frozen";
  plan.config.stages.back().frozen = frozen_later;
  plan.objectives.push_back(plan.objectives.front());
  plan.schedules.push_back(plan.schedules.front());
}

/// Bytes that this rank sends for sums or gathers of the buckets with a trainable parameter.
std::uint64_t bytes_of_trained(const ParameterTable& table, int peers) {
  std::uint64_t bytes = 0;
  for (std::size_t i = 0; i < table.buckets().size(); ++i) {
    bool trained = false;
    for (const Parameter& p : table.all()) trained |= p.trainable && p.bucket == i;
    const auto [begin, end] = table.buckets()[i].shard(0, peers);
    if (trained) bytes += static_cast<std::uint64_t>((peers - 1) * (end - begin)) * sizeof(float);
  }
  return bytes;
}

TEST(BucketExchange, BucketsThatAStageDoesNotTrainSendNothing) {
  const int pipeline = testing::runtime().size() % 2 == 0 ? 2 : 1;
  const MeshCase c = case_of("hybrid", pipeline);
  Mesh mesh(testing::runtime(), c.shape);
  MeshJob job(c, mesh, DType::f32, 4, add_frozen_stage);
  ParameterTable& table = job.trainer().models().student_parameters();
  Communicator& peers = mesh[Axis::data_sequence];
  const auto frozen = compile_patterns(frozen_later);
  std::uint64_t before = 0;
  for (const std::size_t stage : {0, 1}) {
    job.trainer().begin_stage(stage);
    peers.reset_traffic();
    const auto weights = job.weights();
    ASSERT_TRUE(job.step(0).applied);
    const std::uint64_t expected = peers.size() == 1 ? 0 : bytes_of_trained(table, peers.size());
    EXPECT_EQ(peers.traffic(Purpose::gradients).bytes, expected) << "stage " << stage;
    EXPECT_EQ(peers.traffic(Purpose::weights).bytes, expected) << "stage " << stage;
    if (stage == 1 && peers.size() > 1) {
      EXPECT_LT(expected, before);
      EXPECT_GT(expected, 0u);
    }
    before = expected;
    const auto names = job.names();
    const auto now = job.weights();
    for (std::size_t i = 0; i < names.size(); ++i) {
      EXPECT_EQ(now[i] == weights[i], stage == 1 && matches_any(frozen, names[i])) << names[i];
    }
    // Every rank has gathered the weights that the shards' owners have made.
    for (std::size_t i = 0; i < names.size(); ++i) {
      const Parameter* p = table.find(names[i]);
      if (p == nullptr) continue;
      for (std::size_t k = 0; k < now[i].size(); ++k) {
        ASSERT_EQ(static_cast<double>(p->value.as<float>()[k]), now[i][k]) << names[i] << " " << k;
      }
    }
  }
}

TEST(BucketExchange, AStepOnManyRanksAllocatesNothing) {
  for (const char* student : {"hybrid", "llama"}) {
    const MeshCase c = case_of(student, 1);
    Mesh mesh(testing::runtime(), c.shape);
    MeshJob job(c, mesh, DType::f32, 4);
    for (std::int64_t n = 0; n < 2; ++n) job.step(n);  // lists take their memory once
    const std::int64_t before = testing::heap_allocations();
    for (std::int64_t n = 2; n < 4; ++n) job.step(n);
    EXPECT_EQ(testing::heap_allocations() - before, 0) << student;
  }
}

}  // namespace
}  // namespace deltapipe
