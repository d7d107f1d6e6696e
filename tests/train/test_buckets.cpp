// Buckets of gradients and the optimizer's shards of them: everything once, for any sizes and any number of ranks.
#include "tests/distill/tiny.h"
#include "train/optimizer.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

namespace deltapipe {
namespace {

using Trained = std::function<bool(const ParameterSpec&)>;

/// Odd sizes of every kind, from a single element to some that no shard boundary fits.
ModelSpec odd_student(bool tied) {
  ModelSpec teacher = testing::tiny_teacher(Mlp::gated_silu, tied, 5);
  teacher.vocabulary = 131;
  teacher.hidden = 13;
  teacher.intermediate = 29;
  return testing::tiny_student(teacher, {"kda", "nope", "kda", "kda", "nope"});
}

void expect_buckets(const ParameterTable& table, const Trained& trained, int shards) {
  constexpr std::int64_t aligned = 64;
  std::int64_t next = 0;
  for (const GradientBucket& b : table.buckets()) {
    EXPECT_EQ(b.begin, next) << "buckets follow each other without a gap";
    EXPECT_GT(b.end, b.begin) << "no bucket is empty";
    EXPECT_EQ((b.end - b.begin) % (aligned * shards), 0);
    next = b.end;
  }
  EXPECT_EQ(next, table.flat_gradients() ? table.flat_gradients().numel() : 0);
  std::map<std::int64_t, std::size_t> bucket_of_layer;
  std::vector<std::int64_t> used(table.buckets().size());  // end of the last parameter of each bucket
  for (std::size_t i = 0; i < used.size(); ++i) used[i] = table.buckets()[i].begin;
  for (const Parameter& p : table.all()) {
    ASSERT_EQ(static_cast<bool>(p.gradient_memory), trained(p.spec)) << p.spec.name;
    if (!p.gradient_memory) continue;
    const GradientBucket& b = table.buckets().at(p.bucket);
    EXPECT_EQ(b.layer, p.spec.layer) << p.spec.name;
    EXPECT_EQ(bucket_of_layer.try_emplace(p.spec.layer, p.bucket).first->second, p.bucket) << p.spec.name;
    EXPECT_GE(p.gradient_offset, used[p.bucket]) << p.spec.name << " overlaps the one before";
    EXPECT_EQ(p.gradient_offset % aligned, 0) << p.spec.name;
    used[p.bucket] = p.gradient_offset + p.gradient_memory.numel();
    EXPECT_LE(used[p.bucket], b.end) << p.spec.name;
    EXPECT_EQ(p.gradient_memory.data, table.flat_gradients().rows(p.gradient_offset, p.gradient_offset + 1).data);
  }
  EXPECT_EQ(bucket_of_layer.size(), table.buckets().size());
}

/// The ranks' slices of every trained parameter, put side by side, are the parameter.
void expect_shards(ParameterTable& table, int shards) {
  std::map<const Parameter*, std::int64_t> covered;
  for (int rank = 0; rank < shards; ++rank) {
    Arena arena = Arena::measuring("optimizer");
    const Optimizer optimizer(OptimizerConfig(), table, arena, {{rank, shards}, 0, nullptr});
    const Parameter* before = nullptr;
    for (const Optimizer::State& s : optimizer.state()) {
      EXPECT_NE(s.parameter, before) << "two slices of " << s.parameter->spec.name << " on rank " << rank;
      before = s.parameter;
      EXPECT_EQ(s.begin, covered[s.parameter]) << s.parameter->spec.name << " rank " << rank;
      EXPECT_GT(s.end, s.begin) << s.parameter->spec.name << " rank " << rank;
      covered[s.parameter] = s.end;
      // The slice lies in what a reduce-scatter of the bucket leaves on this rank.
      const auto [begin, end] = table.buckets()[s.parameter->bucket].shard(rank, shards);
      EXPECT_GE(s.parameter->gradient_offset + s.begin, begin);
      EXPECT_LE(s.parameter->gradient_offset + s.end, end);
    }
  }
  for (const Parameter& p : table.all()) {
    EXPECT_EQ(covered[&p], p.gradient_memory ? p.gradient_memory.numel() : 0) << p.spec.name;
  }
}

TEST(Buckets, CoverEveryTrainedParameterOnceOnAnyNumberOfRanks) {
  const auto has = [](const ParameterSpec& p, const char* text) { return p.name.find(text) != std::string::npos; };
  const std::vector<std::pair<std::string, Trained>> choices{
      {"all", [](const ParameterSpec&) { return true; }},
      {"none", [](const ParameterSpec&) { return false; }},
      {"mixers", [&](const ParameterSpec& p) { return has(p, "self_attn"); }},
      {"without layers 1 and 2", [](const ParameterSpec& p) { return p.layer != 1 && p.layer != 2; }},
      {"ends alone", [&](const ParameterSpec& p) { return p.layer == embedding_layer || p.layer == 5; }},
      {"one of three elements", [&](const ParameterSpec& p) { return p.name == "model.layers.3.self_attn.A_log"; }}};
  for (const bool tied : {false, true}) {
    const ModelSpec spec = odd_student(tied);
    for (const LayerRange& range : {whole_model(spec), LayerRange{0, 2}, LayerRange{2, 3}, LayerRange{3, 5}}) {
      for (const auto& [name, trained] : choices) {
        for (const int shards : {1, 2, 3, 4, 5, 7, 8, 13, 64}) {
          SCOPED_TRACE(fmt::format("{}, layers {} to {}, {} ranks{}", name, range.first, range.last, shards,
                                   tied ? ", tied" : ""));
          Arena arena = Arena::measuring("parameters");
          ParameterTable table(parameters_of(spec, range), DType::f32, arena);
          table.allocate_gradients(arena, trained, shards);
          expect_buckets(table, trained, shards);
          expect_shards(table, shards);
        }
      }
    }
  }
}

TEST(Buckets, AnotherNumberOfShardsIsRefused) {
  Arena arena = Arena::measuring("parameters");
  ParameterTable table(parameters_of(odd_student(false)), DType::f32, arena);
  table.allocate_gradients(
      arena, [](const ParameterSpec&) { return true; }, 1);
  EXPECT_THROW(table.buckets().front().shard(0, 60), InternalError);
}

}  // namespace
}  // namespace deltapipe
