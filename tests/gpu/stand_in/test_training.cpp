// `deltapipe train` with device = "cuda": whole jobs, their checkpoints and what follows from them.
#include "checkpoints/training_checkpoint.h"
#include "tests/cli/process.h"
#include "tests/data/testing.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <ostream>
#include <set>
#include <string>
#include <tuple>
#include <vector>

namespace deltapipe {
namespace {

namespace fs = std::filesystem;
using testing::Outcome;
using Words = std::vector<std::string>;

constexpr const char* models =
    "[student.model]\nvocabulary = 258\nhidden = 128\nlayers = 4\nintermediate = 192\nheads = 2\nkv_heads = 1\n"
    "head_dim = 64\nmax_positions = 256\nrope_factor = 4.0\nrope_original_max_positions = 64\n";
constexpr const char* stages =
    "[[stage]]\nname = 'align'\nsteps = 2\nsequence_length = 64\nbatch_sequences = 4\nmicrobatch_sequences = 1\n"
    "learning_rate = 1e-2\nfrozen = ['layernorm']\n[stage.loss]\nmixer_mse = 1.0\n"
    "[[stage]]\nname = 'distill'\nsteps = 3\nsequence_length = 96\nbatch_sequences = 4\nmicrobatch_sequences = 1\n"
    "learning_rate = 5e-3\n[stage.loss]\nkl = 1.0\nhidden_cosine = 0.5\n";

Words preloaded() { return {"env", std::string("LD_PRELOAD=") + DELTAPIPE_STAND_IN}; }
Words mpirun(int ranks) {
  return {DELTAPIPE_MPIEXEC,
          "--allow-run-as-root",
          "--oversubscribe",
          "-n",
          std::to_string(ranks),
          "env",
          std::string("LD_PRELOAD=") + DELTAPIPE_STAND_IN};
}

using Values = std::map<std::string, std::vector<float>>;

/// Weights and optimizer states of a checkpoint, by group and name.
Values read_checkpoint(const fs::path& folder) {
  CheckpointReader reader(folder);
  Values all;
  for (const TensorInfo& t : reader.tensors()) {
    std::vector<std::byte> memory(static_cast<std::size_t>(t.shape.numel()) * size_of(t.dtype));
    const Tensor tensor(memory.data(), t.dtype, {t.shape.numel()});
    reader.read(t.group, t.name, 0, t.shape.numel(), tensor);
    std::vector<float>& values = all[t.group + " " + t.name];
    for (std::int64_t i = 0; i < t.shape.numel(); ++i) {
      values.push_back(t.dtype == DType::f32 ? tensor.as<float>()[i] : to_float(tensor.as<BFloat16>()[i]));
    }
  }
  return all;
}

/// A folder with data, a teacher and a job.
class Training : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string text;
    for (int i = 0; i < 400; ++i) text += fmt::format("{} the gate decays the state of head {}.\n", i, i % 7);
    for (int i = 0; i < 8; ++i)
      testing::write_text(folder_ / fmt::format("text/{}.txt", i), text.substr(200 * i, 1500));
    prepare({"data", "text", "--out", "train.h5", "--validation", "validation.h5", "--validation-fraction", "0.3"});
    const std::string data = "[data]\ntrain = 'train.h5'\nvalidation = 'validation.h5'\n";
    const std::string rest = "[eval]\nevery_steps = 4\ntokens = 192\n[checkpoint]\nevery_steps = 2\n";
    testing::write_text(folder_ / "teacher.toml",
                        std::string("[run]\nname = 'teacher'\n[student]\ninit = 'random'\n") + models + data +
                            "[[stage]]\nname = 'pretrain'\nsteps = 1\nsequence_length = 48\nbatch_sequences = 4\n"
                            "learning_rate = 1e-2\n[stage.loss]\nce = 1.0\n" +
                            rest);
    prepare({"init", "teacher.toml", "--out", "teacher"});
    testing::write_text(folder_ / "job.toml",
                        "[run]\nname = 'job'\ndevice = 'cuda'\n[teacher]\npath = 'teacher'\n[student]\n"
                        "mixers = ['kda', 'nope']\n" +
                            data + stages + rest);
  }

  void prepare(const Words& words) const {
    const Outcome outcome = testing::run(words, {.folder = folder_.path()});
    ASSERT_TRUE(testing::succeeds(outcome));
  }

  /// Trains to the end; nothing may be refused on the way.
  void train(const Words& launcher, const Words& settings = {}) const {
    Words words{"train", "job.toml", "--resume", "auto"};
    for (const std::string& s : settings) words.insert(words.end(), {"--set", s});
    const Outcome outcome = testing::run(words, {.folder = folder_.path(), .launcher = launcher});
    EXPECT_TRUE(testing::succeeds(outcome));
    EXPECT_EQ(outcome.err.find("stand-in"), std::string::npos) << outcome;
    ASSERT_TRUE(fs::exists(last_checkpoint() / "manifest.json")) << outcome;
  }
  fs::path last_checkpoint() const { return folder_ / "runs/job/checkpoints/step-00000005"; }
  nlohmann::json trace() const {
    std::ifstream file(folder_ / "runs/job/trace.json");
    return nlohmann::json::parse(file);
  }

 private:
  testing::TemporaryFolder folder_;
};

TEST_F(Training, GoesOnFromACheckpoint) {
  train(preloaded());
  const Values first = read_checkpoint(last_checkpoint());
  fs::remove_all(last_checkpoint());
  train(preloaded());
  EXPECT_EQ(read_checkpoint(last_checkpoint()), first);
}

struct Way {
  const char* name;
  int ranks;
  Words settings;
  friend void PrintTo(const Way& w, std::ostream* out) { *out << w.name; }
};

class Ways : public Training, public ::testing::WithParamInterface<Way> {};

// Nothing computes: moments stay zero. What the host has not waited for would be NaN.
TEST_P(Ways, AJobRunsToItsEnd) {
  train(GetParam().ranks == 1 ? preloaded() : mpirun(GetParam().ranks), GetParam().settings);
  for (const auto& [name, values] : read_checkpoint(last_checkpoint())) {
    const bool is_moment = name.starts_with("exp_avg");
    for (const float x : values) ASSERT_TRUE(is_moment ? x == 0 : std::isfinite(x)) << name << ": " << x;
  }
}

/// Spans of a rank's track: within each other or apart.
struct Nesting {
  std::vector<double> ends;
  bool takes(double begin, double end) {
    constexpr double rounding_us = 0.002;
    while (!ends.empty() && ends.back() <= begin + rounding_us) ends.pop_back();
    const bool fits = ends.empty() || end <= ends.back() + rounding_us;
    ends.push_back(end);
    return fits;
  }
};

class Traces : public Training, public ::testing::WithParamInterface<Way> {};

// What ran has the device's times: tasks and what holds them up on the compute stream, messages on their own streams,
// each of which is one track; calls are the host's. Messages add up to what the calls sent.
TEST_P(Traces, HaveATrackForEveryStream) {
  Words settings = GetParam().settings;
  settings.push_back("trace.steps=[3, 5]");
  train(mpirun(2), settings);
  std::map<std::pair<int, int>, std::string> names;
  std::map<std::pair<int, int>, Nesting> tracks;
  std::map<std::string, int> categories;
  using Sent = std::map<std::tuple<int, int, std::string>, std::uint64_t>;  // rank, step, purpose
  Sent called, transferred;
  const nlohmann::json all = trace();
  EXPECT_EQ(all.at("otherData").at("dropped_events"), 0);
  for (const auto& e : all.at("traceEvents")) {
    if (e.at("name") == "thread_name") names[{e.at("pid"), e.at("tid")}] = e.at("args").at("name");
  }
  for (const auto& e : all.at("traceEvents")) {
    if (e.at("ph") != "X") continue;
    const std::pair<int, int> track{e.at("pid"), e.at("tid")};
    const std::string category = e.at("cat"), name = e.at("name");
    const double begin = e.at("ts"), length = e.at("dur");
    ++categories[category];
    EXPECT_GE(begin, 0);
    EXPECT_GE(length, 0);
    EXPECT_TRUE(tracks[track].takes(begin, begin + length)) << name << " on " << names[track];
    const bool is_compute = category == "task" || category == "optimizer" || category == "communication";
    const bool is_transfer = category == "transfer";
    const std::string kind = is_compute ? "tasks" : is_transfer ? "communication: " : "host";
    EXPECT_EQ(names[track].substr(0, kind.size()), kind) << name << " on " << names[track];
    if (category != "call" && !is_transfer) continue;
    const auto& a = e.at("args");
    if (a.at("axis") == "world") continue;  // host memory, too, whose messages are no transfers
    const std::uint64_t bytes = a.at("bytes");
    if (bytes > 0) (is_transfer ? transferred : called)[{track.first, a.at("step"), a.at("purpose")}] += bytes;
  }
  for (const char* category : {"step", "task", "optimizer", "communication", "transfer", "call", "checkpoint"}) {
    EXPECT_GT(categories[category], 0) << category;
  }
  std::erase_if(called, [](const auto& entry) { return std::get<2>(entry.first) == "control"; });
  std::erase_if(transferred, [](const auto& entry) { return std::get<2>(entry.first) == "control"; });
  EXPECT_FALSE(called.empty());
  EXPECT_EQ(transferred, called);
}

INSTANTIATE_TEST_SUITE_P(Jobs, Traces,
                         ::testing::Values(Way{"data", 2, {"mesh.data=2"}},
                                           Way{"pipeline", 2, {"mesh.pipeline=2", "pipeline.teacher=ahead"}},
                                           Way{"sequence", 2, {"mesh.sequence=2"}}),
                         [](const auto& test) { return std::string(test.param.name); });

INSTANTIATE_TEST_SUITE_P(
    Jobs, Ways,
    ::testing::Values(
        Way{"optimizer_on_host", 1, {"memory.optimizer=host", "memory.recompute=true"}},
        Way{"optimizer_in_bfloat16", 1, {"optimizer.state=bfloat16"}},
        Way{"deterministic", 1, {"run.deterministic=true"}}, Way{"data", 2, {"mesh.data=2", "memory.optimizer=host"}},
        Way{"pipeline", 2, {"mesh.pipeline=2", "pipeline.schedule=zero_bubble", "pipeline.teacher=ahead"}},
        Way{"interleaved", 2, {"mesh.pipeline=2", "pipeline.schedule=interleaved", "pipeline.chunks=2"}},
        Way{"sequence", 2, {"mesh.sequence=2"}},
        Way{"zigzag", 2, {"mesh.sequence=2", "mesh.layout=zigzag", "optimizer.state=bfloat16"}}),
    [](const auto& test) { return std::string(test.param.name); });

}  // namespace
}  // namespace deltapipe
