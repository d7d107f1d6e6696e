// A job's checkpoint resumed on the same mesh goes on bit by bit; on any other mesh to within rounding.
#include "checkpoints/training_checkpoint.h"
#include "tests/cli/mpi_job.h"

#include <nlohmann/json.hpp>

#include <cmath>

namespace deltapipe {
namespace {

namespace fs = std::filesystem;
using testing::Job;
using testing::Outcome;
using testing::settings;
using testing::succeeds;
using testing::Words;

class JobMeshes : public testing::JobTest {
 protected:
  /// `to` begins with the checkpoint and the metrics that `from` had at `step`.
  void copy_until(int step, const fs::path& from, const fs::path& to) const {
    const std::string name = checkpoint_name(step);
    fs::create_directories(run_of(to) / "checkpoints");
    fs::copy(run_of(from) / "checkpoints" / name, run_of(to) / "checkpoints" / name, fs::copy_options::recursive);
    fs::copy(run_of(from) / "metrics.jsonl", run_of(to) / "metrics.jsonl");
  }
};

TEST_F(JobMeshes, SavedAndResumedOnTheSameAreBitwise) {
  prepare(5, 5, 1);
  const std::pair<int, Words> meshes[] = {
      {4, settings({"mesh.pipeline=2", "mesh.sequence=2"})},
      {2, settings({"mesh.data=2"})},
      {4, settings({"mesh.sequence=4", "mesh.layout=contiguous"})},
      {4, settings({"mesh.pipeline=4", "pipeline.schedule=zero_bubble", "pipeline.teacher=ahead"})},
      {2, settings({"mesh.pipeline=2", "pipeline.schedule=interleaved", "pipeline.chunks=2", "memory.recompute=true"})},
  };
  int number = 0;
  for (const auto& [ranks, mesh] : meshes) {
    const std::string name = "mesh-" + std::to_string(number++);
    const Words kept = testing::join(mesh, settings({"checkpoint.keep=100"}));
    const fs::path whole = run_whole(ranks, kept, name);
    for (const int step : {2, 5, 7}) {
      const fs::path resumed = folder(name + "-from-" + std::to_string(step));
      copy_until(step, whole, resumed);
      const Outcome o = Job(ranks, train(kept), resumed).wait();
      ASSERT_TRUE(succeeds(o));
      EXPECT_NE(o.err.find("at step " + std::to_string(step)), o.err.npos) << o;
      EXPECT_EQ(o.err.find("warning"), o.err.npos) << o;
      expect_same_run(whole, resumed);
    }
  }
}

TEST_F(JobMeshes, ResumedOnAnotherGivesTheSameLosses) {
  prepare(4, 6, 1);
  constexpr int step = 6;
  const fs::path whole = run_whole(4, settings({"mesh.pipeline=2", "mesh.sequence=2", "checkpoint.keep=100"}));
  const auto losses = [&](const fs::path& folder) {
    std::vector<double> list;
    for (const std::string& line : testing::read_metrics(run_of(folder) / "metrics.jsonl")) {
      const auto j = nlohmann::json::parse(line);
      if (j.contains("loss") && j["step"] > step) list.push_back(j["loss"].get<double>());
    }
    return list;
  };
  const std::vector<double> wanted = losses(whole);
  ASSERT_EQ(wanted.size(), 4u);
  const std::pair<int, Words> meshes[] = {
      {1, {}},
      {2, settings({"mesh.data=2"})},
      {4, settings({"mesh.sequence=4"})},
      {4, settings({"mesh.pipeline=4", "pipeline.schedule=zero_bubble", "pipeline.teacher=ahead"})},
  };
  int number = 0;
  for (const auto& [ranks, mesh] : meshes) {
    const fs::path resumed = folder("mesh-" + std::to_string(number++));
    copy_until(step, whole, resumed);
    const Outcome o = Job(ranks, train(mesh), resumed).wait();
    ASSERT_TRUE(succeeds(o));
    EXPECT_NE(o.err.find("at step 6"), o.err.npos) << o;
    EXPECT_EQ(o.err.find("warning"), o.err.npos) << "loading onto another mesh is normal\n" << o;
    const std::vector<double> got = losses(resumed);
    ASSERT_EQ(got.size(), wanted.size()) << o;
    // float32 sums in another order: a few 1e-8 a loss, and four steps of training carry it on.
    for (std::size_t i = 0; i < got.size(); ++i) {
      EXPECT_NEAR(got[i], wanted[i], 1e-6 * std::abs(wanted[i])) << "step " << step + 1 + i << "\n" << o;
    }
    // The next checkpoint says which mesh wrote it.
    EXPECT_EQ(read_state(testing::last_checkpoint(run_of(resumed))).mesh.ranks(), ranks);
  }
}

}  // namespace
}  // namespace deltapipe
