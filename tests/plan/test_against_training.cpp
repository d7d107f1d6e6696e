// The planned bytes of every arena and rank are those that a run takes.
#include "plan/plan.h"
#include "tests/comm/testing.h"
#include "tests/train/meshes.h"
#include "tests/train/shared_run.h"

#include <fmt/ranges.h>

namespace deltapipe {
namespace {

using testing::runtime;

TEST(PlanAgainstTraining, EveryArenaToTheByte) {
  const testing::SharedRun shared;
  for (const std::vector<std::string>& settings : testing::meshes_of(runtime().size())) {
    const Config config = shared.config(settings);
    const RunPlan plan = make_run_plan(shared.plan(config));
    const RunResult result = shared.run(config);
    const std::string mesh = fmt::format("{}", settings);
    ASSERT_EQ(std::ssize(plan.memory), runtime().size()) << mesh;
    ASSERT_EQ(result.memory.size(), plan.memory.size()) << mesh;
    for (std::size_t rank = 0; rank < plan.memory.size(); ++rank) {
      const RankMemory& planned = plan.memory[rank];
      ASSERT_EQ(result.memory[rank].size(), planned.arenas.size()) << mesh;
      std::size_t total = 0;
      for (std::size_t i = 0; i < planned.arenas.size(); ++i) {
        const ArenaUse& used = result.memory[rank][i];
        EXPECT_EQ(used.name, planned.arenas[i].first);
        EXPECT_EQ(used.planned_bytes, planned.arenas[i].second) << mesh << " rank " << rank << ": " << used.name;
        EXPECT_EQ(used.peak_bytes, planned.arenas[i].second) << mesh << " rank " << rank << ": " << used.name;
        total += used.peak_bytes;
      }
      EXPECT_EQ(total, planned.total());
      EXPECT_GT(total, 0u);
    }
    if (runtime().rank() != 0) continue;
    const nlohmann::json end = shared.metrics().back();
    ASSERT_EQ(end["memory"].size(), plan.memory.size());
    for (const auto& [name, bytes] : plan.memory.back().arenas) {
      EXPECT_EQ(end["memory"].back()[name]["planned"], bytes) << mesh << " " << name;
      EXPECT_EQ(end["memory"].back()[name]["peak"], bytes) << mesh << " " << name;
    }
  }
}

}  // namespace
}  // namespace deltapipe
