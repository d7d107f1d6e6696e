// Training on CUDA: against the CPU, against itself, and on ranks that share one GPU against one rank.
//
// Tolerances. Every operation rounds its result to bfloat16, relative error 2^-9 at most and 0.0011 in the mean square.
// From a weight's gradient back to the input there are about a hundred such roundings in these models of four layers
// (forward, teacher, backward), independent, so that about 100^0.5 x 0.0011 = 0.011 of a gradient is noise; single
// tensors whose parts cancel show several times that (0.037 is the most seen on an H100). Losses are sums over
// thousands of tokens, where the noise averages out.
#include "comm/nccl_communicator.h"
#include "kernels/settings.h"
#include "tests/comm/testing.h"
#include "tests/train/mesh_job.h"
#include "train/mesh_checkpoint.h"
#include "train/snapshot.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

namespace deltapipe {
namespace {

using testing::MeshCase;
using testing::MeshJob;
using testing::runtime;
using Values = std::vector<std::vector<double>>;

/// This rank's: its own where there are enough, else shared.
Device gpu() { return {Device::Kind::cuda, runtime().local_rank() % std::max(1, cuda_device_count())}; }
constexpr double loss_tolerance = 0.001;
constexpr double whole_gradient_tolerance = 0.03;
constexpr double tensor_tolerance = 0.06;

double squared_norm(const std::vector<double>& x) {
  double sum = 0;
  for (const double v : x) sum += v * v;
  return sum;
}

double squared_distance(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return sum;
}

struct FirstStep {
  std::vector<std::string> names;
  double loss = 0;
  Values gradients;
};

FirstStep first_step(const MeshCase& which, Mesh& mesh, DType dtype) {
  MeshJob job(which, mesh, dtype, which.layers());
  FirstStep s;
  s.loss = job.accumulate(0).losses.total;
  s.names = job.names();
  s.gradients = job.gradients();
  job.trainer().stop();
  return s;
}

/// A tensor may be off by its share of the tolerance, or where next to nothing flows into it, of the largest one's.
void compare(const FirstStep& got, const FirstStep& wanted, const std::string& what) {
  SCOPED_TRACE(what);
  EXPECT_TRUE(std::isfinite(got.loss));
  EXPECT_NEAR(got.loss, wanted.loss, loss_tolerance * wanted.loss);
  double error = 0, size = 0, worst = 0;
  std::string worst_name;
  for (const auto& g : wanted.gradients) size += squared_norm(g);
  for (std::size_t i = 0; i < wanted.gradients.size(); ++i) {
    const double e = squared_distance(got.gradients[i], wanted.gradients[i]);
    const double n = squared_norm(wanted.gradients[i]);
    error += e;
    const double floor = 1e-6 * size;  // a thousandth of the whole gradient
    if (n > floor && std::sqrt(e / n) > worst) {
      worst = std::sqrt(e / n);
      worst_name = wanted.names[i];
    }
    EXPECT_LE(std::sqrt(e), tensor_tolerance * std::sqrt(std::max(n, floor))) << wanted.names[i];
  }
  EXPECT_LE(std::sqrt(error / size), whole_gradient_tolerance);
  std::printf("%s: loss %.1e, gradient %.4f, worst tensor %.3f (%s)\n", what.c_str(),
              std::abs(got.loss / wanted.loss - 1), std::sqrt(error / size), worst, worst_name.c_str());
}

MeshCase job_of(const std::string& student, bool aligns, bool recompute) {
  MeshCase c;
  c.student = student;
  c.aligns = aligns;
  c.recompute = recompute;
  c.device = gpu();
  return c;
}

class TrainingOnCuda : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    if (cuda_device_count() == 0) return;
    if (runtime().local_size() > cuda_device_count()) let_ranks_share_a_device(runtime().rank());
    set_device(gpu());
    kernels::settings().deterministic = true;
  }
  void SetUp() override {
    if (cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  }
};

class OnOneRank : public TrainingOnCuda {
 protected:
  void SetUp() override {
    TrainingOnCuda::SetUp();
    if (runtime().size() > 1) GTEST_SKIP() << "the same on every number of ranks";
  }
};

TEST_F(OnOneRank, EqualsTheCpu) {
  for (const char* student : {"hybrid", "kda", "llama"}) {
    for (const bool aligns : {false, true}) {
      if (aligns && std::string(student) == "llama") continue;
      MeshCase c = job_of(student, aligns, std::string(student) == "hybrid");
      Mesh mesh;
      const FirstStep got = first_step(c, mesh, DType::bf16);
      c.device = {};
      c.large = c.rounded = true;
      compare(got, first_step(c, mesh, DType::f32), std::string(student) + (aligns ? ", alignment" : ""));
    }
  }
}

/// How optimizer states are kept.
struct States {
  const char* name;
  StateDType dtype;
  OptimizerPlace place;
};
constexpr States all_states[] = {{"float32", StateDType::float32, OptimizerPlace::device},
                                 {"float32 on the host", StateDType::float32, OptimizerPlace::host},
                                 {"bfloat16", StateDType::bfloat16, OptimizerPlace::device},
                                 {"bfloat16 on the host", StateDType::bfloat16, OptimizerPlace::host}};
constexpr std::int64_t steps = 4, saved_after = 2;

struct Training {
  std::vector<double> losses;
  Values weights;
};

MeshJob::Change with(const States& states) {
  return [states](TrainingPlan& plan) {
    plan.config.optimizer.state = states.dtype;
    plan.config.memory.optimizer = states.place;
  };
}

Training train(const MeshCase& c, Mesh& mesh, const States& states, const std::string& checkpoints = "") {
  MeshJob job(c, mesh, DType::bf16, c.layers(), with(states));
  Training t;
  for (std::int64_t n = 0; n < steps; ++n) {
    if (n == saved_after && !checkpoints.empty()) {
      MeshCheckpointWriter writer(runtime(), checkpoints, 1);
      TrainingState state;
      state.step = saved_after;
      state.values["optimizer_updates"] = static_cast<double>(job.trainer().optimizer().updates());
      const auto slices = snapshot_slices(
          job.trainer().models().student_parameters(), job.trainer().optimizer(),
          [&](const ParameterSpec& p) { return job.trainer().owns(p); }, mesh[Axis::data_sequence].rank() == 0);
      writer.write(state, slices, job.stream());
      writer.finish();
    }
    t.losses.push_back(job.step(n).losses.total);
  }
  job.trainer().stop();
  t.weights = job.weights();
  return t;
}

Training resume(const MeshCase& c, Mesh& mesh, const States& states, const std::string& checkpoints) {
  MeshJob job(c, mesh, DType::bf16, c.layers(), with(states));
  CheckpointReader reader(*newest_checkpoint(checkpoints));
  restore_snapshot(reader, job.trainer().models().student_parameters(), job.trainer().optimizer(), job.stream());
  job.trainer().gather_weights(true);
  Training t;
  for (std::int64_t n = saved_after; n < steps; ++n) t.losses.push_back(job.step(n).losses.total);
  job.trainer().stop();
  t.weights = job.weights();
  return t;
}

TEST_F(OnOneRank, RepeatsAndResumesBitwise) {
  const MeshCase c = job_of("hybrid", false, true);
  Mesh mesh;
  Training on_device;
  for (const States& states : all_states) {
    SCOPED_TRACE(states.name);
    const testing::TemporaryFolder folder;
    const Training first = train(c, mesh, states, folder.path().string());
    EXPECT_LT(first.losses.back(), first.losses.front());
    const Training second = train(c, mesh, states);
    EXPECT_TRUE(first.losses == second.losses && first.weights == second.weights) << "another run, other bits";
    const Training resumed = resume(c, mesh, states, folder.path().string());
    EXPECT_TRUE(std::equal(resumed.losses.begin(), resumed.losses.end(), first.losses.begin() + saved_after));
    EXPECT_TRUE(resumed.weights == first.weights) << "resumed, other bits";
    if (states.place == OptimizerPlace::device) {
      on_device = first;
    } else {
      EXPECT_TRUE(first.weights == on_device.weights) << "states on the host, other bits";
    }
  }
}

/// Meshes of that many ranks: each axis, both layouts, every schedule, the teacher inline and ahead.
std::vector<MeshCase> meshes_of(int ranks) {
  std::vector<MeshCase> list;
  const auto add = [&](MeshShape shape, LayoutKind layout, const char* schedule, int chunks, const char* teacher,
                       const char* student) {
    MeshCase c = job_of(student, false, true);
    c.shape = shape;
    c.layout = layout;
    c.schedule = schedule;
    c.chunks = chunks;
    c.teacher = teacher;
    list.push_back(c);
  };
  constexpr auto contiguous = LayoutKind::contiguous, zigzag = LayoutKind::zigzag;
  add({1, 1, ranks}, contiguous, "1f1b", 1, "inline", "kda");
  add({1, 1, ranks}, zigzag, "1f1b", 1, "inline", "hybrid");
  add({1, ranks, 1}, contiguous, "1f1b", 1, "ahead", "hybrid");
  add({1, ranks, 1}, contiguous, "zero_bubble", 1, "inline", "llama");
  if (ranks == 2) add({1, 2, 1}, contiguous, "interleaved", 2, "ahead", "hybrid");
  add({2, ranks / 2, 1}, contiguous, "1f1b", 1, "inline", "hybrid");
  if (ranks >= 4) {
    add({1, 2, ranks / 2}, zigzag, "1f1b", 1, "ahead", "hybrid");
    add({2, 1, ranks / 2}, zigzag, "1f1b", 1, "inline", "llama");
  }
  return list;
}

TEST_F(TrainingOnCuda, EveryMeshEqualsOneRank) {
  const int ranks = runtime().size();
  if (ranks == 1) GTEST_SKIP() << "needs several ranks";
  const bool first = runtime().rank() == 0;
  for (const MeshCase& c : meshes_of(ranks)) {
    Mesh mesh(runtime(), c.shape, gpu());
    const FirstStep many = first_step(c, mesh, DType::bf16);
    if (!first) continue;
    MeshCase alone = job_of(c.student, c.aligns, c.recompute);
    Mesh one;
    compare(many, first_step(alone, one, DType::bf16), c.name());
  }
}

TEST_F(TrainingOnCuda, AMeshRepeatsAndResumesBitwise) {
  const int ranks = runtime().size();
  if (ranks == 1) GTEST_SKIP() << "needs several ranks";
  MeshCase c = job_of("hybrid", false, true);
  c.shape = {1, ranks / 2, 2};
  c.layout = LayoutKind::zigzag;
  const testing::TemporaryFolder own;
  std::array<char, 512> folder{};
  own.path().string().copy(folder.data(), folder.size() - 1);
  runtime().world().broadcast(Stream::cpu(), Tensor(folder.data(), DType::u8, {512}), 0, Purpose::control);
  Mesh mesh(runtime(), c.shape, gpu());
  const States& states = all_states[2];
  const Training first = train(c, mesh, states, folder.data());
  const Training second = train(c, mesh, states);
  EXPECT_TRUE(first.losses == second.losses && first.weights == second.weights) << "another run, other bits";
  const Training resumed = resume(c, mesh, states, folder.data());
  EXPECT_TRUE(std::equal(resumed.losses.begin(), resumed.losses.end(), first.losses.begin() + saved_after));
  EXPECT_TRUE(resumed.weights == first.weights) << "resumed, other bits";
}

}  // namespace
}  // namespace deltapipe
