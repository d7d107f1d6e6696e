// The same job on every mesh against one rank: loss, each gradient tensor, ten steps of training, evaluation.
#include "core/random.h"
#include "tests/comm/testing.h"
#include "tests/train/mesh_job.h"
#include "train/mesh_checkpoint.h"
#include "train/snapshot.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>

namespace deltapipe {
namespace {

using testing::MeshCase;
using testing::MeshJob;
using Values = std::vector<std::vector<double>>;

double norm(const std::vector<double>& x) {
  double sum = 0;
  for (const double v : x) sum += v * v;
  return std::sqrt(sum);
}

double distance(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return std::sqrt(sum);
}

struct Result {
  std::vector<std::string> names;
  Values gradients;            // of the first step
  std::vector<double> losses;  // of every step
  double gradient_norm = 0;    // of the first step
  Values weights;              // after the last step
  DivergenceResult evaluation;
};

constexpr std::int64_t saved_step = 4;  // steps done when the checkpoint is written

std::vector<TensorSlice> slices_of(MeshJob& job, Mesh& mesh) {
  return snapshot_slices(
      job.trainer().models().student_parameters(), job.trainer().optimizer(),
      [&](const ParameterSpec& p) { return job.trainer().owns(p); }, mesh[Axis::data_sequence].rank() == 0);
}

/// All steps; a checkpoint on the way when `checkpoints` names a folder that all ranks share.
Result run(const MeshCase& which, Mesh& mesh, std::int64_t layers, const std::string& checkpoints = "") {
  MeshJob job(which, mesh, DType::f32, layers);
  Result r;
  StepReport report = job.accumulate(0);
  r.names = job.names();
  r.gradients = job.gradients();
  r.gradient_norm = report.gradient_norm;
  job.trainer().update(report);
  r.losses.push_back(report.losses.total);
  for (std::int64_t n = 1; n < testing::mesh_job_steps; ++n) {
    if (n == saved_step && !checkpoints.empty()) {
      MeshCheckpointWriter writer(testing::runtime(), checkpoints, 1);
      TrainingState state;
      state.step = saved_step;
      state.values["optimizer_updates"] = static_cast<double>(job.trainer().optimizer().updates());
      writer.write(state, slices_of(job, mesh));
      writer.finish();
    }
    r.losses.push_back(job.step(n).losses.total);
  }
  r.weights = job.weights();
  r.evaluation = job.trainer().evaluate(&job.validation());
  return r;
}

/// The steps after the checkpoint, in a new trainer, `most` of them.
Result resume(const MeshCase& which, Mesh& mesh, std::int64_t layers, const std::string& checkpoints,
              std::int64_t most) {
  MeshJob job(which, mesh, DType::f32, layers);
  CheckpointReader reader(*newest_checkpoint(checkpoints));
  restore_snapshot(reader, job.trainer().models().student_parameters(), job.trainer().optimizer(), Stream::cpu());
  job.trainer().gather_weights(true);
  Result r;
  for (std::int64_t n = saved_step; n < std::min(saved_step + most, testing::mesh_job_steps); ++n) {
    r.losses.push_back(job.step(n).losses.total);
  }
  r.weights = job.weights();
  return r;
}

/// What rank 0 makes of the job by itself, once.
const Result& on_one_rank(const MeshCase& which) {
  static std::map<std::string, Result> done;
  MeshCase alone;
  alone.student = which.student;
  alone.aligns = which.aligns;
  const std::string key = alone.name() + std::to_string(which.layers());
  const auto found = done.find(key);
  if (found != done.end()) return found->second;
  Mesh mesh;
  return done.emplace(key, run(alone, mesh, which.layers())).first->second;
}

/// Meshes of `ranks` ranks with their schedules, layouts and the teacher's timing.
std::vector<MeshCase> meshes_of(int ranks) {
  std::vector<MeshCase> list;
  for (int pipeline = 1; pipeline <= 4; ++pipeline) {
    for (int sequence = 1; sequence <= 4; ++sequence) {
      if (ranks % (pipeline * sequence) != 0 || ranks / (pipeline * sequence) > 2) continue;
      MeshCase c;
      c.shape = {ranks / (pipeline * sequence), pipeline, sequence};
      for (const LayoutKind layout : {LayoutKind::contiguous, LayoutKind::zigzag}) {
        if (layout == LayoutKind::zigzag && sequence == 1) continue;
        c.layout = layout;
        for (const auto& [schedule, chunks] :
             std::vector<std::pair<std::string, int>>{{"1f1b", 1}, {"interleaved", 2}, {"zero_bubble", 1}}) {
          if (pipeline == 1 && schedule != "1f1b") continue;
          c.schedule = schedule;
          c.chunks = chunks;
          for (const char* teacher : {"inline", "ahead"}) {
            if (pipeline == 1 && std::string(teacher) == "ahead") continue;
            c.teacher = teacher;
            list.push_back(c);
          }
        }
      }
    }
  }
  return list;
}

/// With DELTAPIPE_WHOLE_MATRIX every mesh with every student, recomputing or not; otherwise at most 6 meshes, evenly
/// spaced, each with one student, in turn. DELTAPIPE_MESHES=TEXT keeps the cases with that text in their name.
std::vector<MeshCase> cases_of(int ranks) {
  const bool whole = std::getenv("DELTAPIPE_WHOLE_MATRIX") != nullptr;
  const char* only = std::getenv("DELTAPIPE_MESHES");
  std::vector<MeshCase> jobs;
  for (const char* student : {"hybrid", "kda", "llama"}) {
    for (const bool aligns : {false, true}) {
      for (const bool recompute : {false, true}) {
        if (aligns && (recompute || std::string(student) == "llama")) continue;
        MeshCase c;
        c.student = student;
        c.aligns = aligns;
        c.recompute = recompute;
        jobs.push_back(c);
      }
    }
  }
  constexpr std::size_t sample = 6;
  const std::vector<MeshCase> meshes = meshes_of(ranks);
  std::vector<MeshCase> list;
  for (std::size_t m = 0; m < meshes.size(); ++m) {
    const bool sampled = m * sample / meshes.size() != (m + 1) * sample / meshes.size() || meshes.size() <= sample;
    for (std::size_t i = 0; i < jobs.size(); ++i) {
      if (!whole && only == nullptr && (!sampled || i != (m + static_cast<std::size_t>(ranks)) % jobs.size())) continue;
      MeshCase c = meshes[m];
      c.student = jobs[i].student;
      c.aligns = jobs[i].aligns;
      c.recompute = jobs[i].recompute;
      if (only == nullptr || c.name().find(only) != std::string::npos) list.push_back(c);
    }
  }
  return list;
}

/// Largest differences seen, for the line at the end.
struct Worst {
  double loss = 0, gradient = 0, training = 0;
};

void compare(const MeshCase& c, const Result& many, const Result& one, Worst& worst) {
  worst.loss = std::max(worst.loss, std::abs(many.losses[0] / one.losses[0] - 1));
  EXPECT_NEAR(many.losses[0], one.losses[0], 1e-6 * one.losses[0]);
  EXPECT_NEAR(many.gradient_norm, one.gradient_norm, 1e-5 * one.gradient_norm);
  for (std::size_t i = 0; i < one.gradients.size(); ++i) {
    const double size = norm(one.gradients[i]), error = distance(many.gradients[i], one.gradients[i]);
    if (size > 0) worst.gradient = std::max(worst.gradient, error / size);
    EXPECT_LE(error, 1e-5 * size) << one.names[i];
  }
  double moved = 0, all = 0;
  for (std::size_t i = 0; i < one.weights.size(); ++i) {
    moved += std::pow(distance(many.weights[i], one.weights[i]), 2);
    all += std::pow(norm(one.weights[i]), 2);
  }
  EXPECT_LT(std::sqrt(moved / all), 1e-4);
  for (std::size_t n = 0; n < one.losses.size(); ++n) {
    worst.training = std::max(worst.training, std::abs(many.losses[n] / one.losses[n] - 1));
    EXPECT_NEAR(many.losses[n], one.losses[n], 1e-4 * one.losses[n]) << "step " << n;
  }
  EXPECT_EQ(many.evaluation.tokens, one.evaluation.tokens);
  EXPECT_NEAR(many.evaluation.student_perplexity, one.evaluation.student_perplexity,
              1e-4 * one.evaluation.student_perplexity);
  EXPECT_NEAR(many.evaluation.teacher->kl, one.evaluation.teacher->kl, 1e-4);
  // A pipeline alone changes the order of no sum but those over its stages, of losses and norms. Tied embeddings take
  // their two parts in another order.
  if (c.shape.data * c.shape.sequence == 1 && c.student != "llama") {
    EXPECT_TRUE(many.gradients == one.gradients) << "not bitwise equal";
  }
}

/// The folder of rank 0 on every rank.
std::string shared_folder(const testing::TemporaryFolder& own) {
  std::array<char, 512> text{};
  own.path().string().copy(text.data(), text.size() - 1);
  testing::runtime().world().broadcast(Stream::cpu(), Tensor(text.data(), DType::u8, {512}), 0, Purpose::control);
  return text.data();
}

TEST(Meshes, EqualOneRankAndResumeBitwise) {
  const std::vector<MeshCase> cases = cases_of(testing::runtime().size());
  ASSERT_FALSE(cases.empty());
  const bool first = testing::runtime().rank() == 0;
  Worst worst;
  for (const MeshCase& c : cases) {
    SCOPED_TRACE(c.name());
    const testing::TemporaryFolder own;
    const std::string checkpoints = shared_folder(own);
    Mesh mesh(testing::runtime(), c.shape);
    const Result many = run(c, mesh, c.layers(), checkpoints);
    const Result resumed = resume(c, mesh, c.layers(), checkpoints, testing::mesh_job_steps);
    EXPECT_TRUE(std::equal(resumed.losses.begin(), resumed.losses.end(), many.losses.begin() + saved_step));
    EXPECT_TRUE(resumed.weights == many.weights) << "resumed on the same mesh: not bitwise equal";
    if (!first) continue;
    compare(c, many, on_one_rank(c), worst);
    MeshCase alone = c;
    alone.shape = {};
    alone.schedule = "1f1b";
    alone.chunks = 1;
    Mesh one;
    const Result moved = resume(alone, one, c.layers(), checkpoints, 2);
    for (std::size_t n = 0; n < moved.losses.size(); ++n) {
      const double expected = many.losses[static_cast<std::size_t>(saved_step) + n];
      EXPECT_NEAR(moved.losses[n], expected, 1e-6 * expected) << "resumed on one rank, step " << n;
    }
  }
  if (first) {
    std::printf("%zu meshes: loss %.1e, gradients %.1e, losses of ten steps %.1e\n", cases.size(), worst.loss,
                worst.gradient, worst.training);
  }
}

/// Sent by all ranks of the mesh in one step.
std::map<std::pair<Axis, Purpose>, double> traffic_of(const MeshCase& c) {
  Mesh mesh(testing::runtime(), c.shape);
  MeshJob job(c, mesh, DType::f32, c.layers());
  constexpr Axis axes[] = {Axis::data, Axis::pipeline, Axis::sequence, Axis::data_sequence};
  for (const Axis a : axes) mesh[a].reset_traffic();
  job.step(0);
  std::map<std::pair<Axis, Purpose>, double> sent;
  Arena workspace("traffic", std::size_t{1} << 16);
  for (const Axis a : axes) {
    for (std::size_t p = 0; p < purpose_count; ++p) {
      double bytes = static_cast<double>(mesh[a].traffic(static_cast<Purpose>(p)).bytes);
      mesh[Axis::world].all_reduce_sum(Stream::cpu(), Tensor(&bytes, DType::f64, {1}), Purpose::control, workspace);
      if (bytes > 0) sent[{a, static_cast<Purpose>(p)}] = bytes;
    }
  }
  return sent;
}

// Along the sequence keys and values alone grow with its length; along the pipeline travel hidden states and their
// gradients, never logits.
TEST(Meshes, SendWhatTheyMustAndNoMore) {
  const int ranks = testing::runtime().size();
  MeshCase c;
  c.shape = ranks % 2 == 0 ? MeshShape{1, 2, ranks / 2} : MeshShape{1, 1, ranks};
  const auto once = traffic_of(c);
  c.length *= 2;
  const auto twice = traffic_of(c);
  ASSERT_EQ(once.size(), twice.size());
  for (const auto& [what, bytes] : once) {
    const auto& [axis, purpose] = what;
    SCOPED_TRACE(std::string(name_of(axis)) + ", " + std::string(name_of(purpose)));
    const bool grows =
        purpose == Purpose::attention_kv || purpose == Purpose::hidden_state || purpose == Purpose::hidden_gradient;
    EXPECT_EQ(twice.at(what), grows ? 2 * bytes : bytes);
  }
  if (c.shape.pipeline == 2) {
    // Teacher and student forward, gradient back: a hidden state of 8 sequences each, in float32.
    const double hidden = 8.0 * 96 * 64 * 4;
    EXPECT_EQ(once.at({Axis::pipeline, Purpose::hidden_state}), 2 * hidden);
    EXPECT_EQ(once.at({Axis::pipeline, Purpose::hidden_gradient}), hidden);
    for (const auto& [what, bytes] : once) {
      if (what.first == Axis::pipeline) {
        EXPECT_TRUE(what.second == Purpose::hidden_state || what.second == Purpose::hidden_gradient);
      }
    }
  }
}

// The executor runs any legal list: drawn at random, with the same results bit for bit.
TEST(Meshes, RandomLegalSchedulesChangeNothing) {
  const int ranks = testing::runtime().size();
  if (ranks > 4) GTEST_SKIP() << "no more layers than 4 for one chunk a rank";
  const bool whole = std::getenv("DELTAPIPE_WHOLE_MATRIX") != nullptr;
  const std::uint64_t draws = whole ? 60 : 6;
  MeshCase c;
  c.shape = {1, ranks, 1};
  for (std::uint64_t seed = 0; seed < draws; ++seed) {
    RandomStream random(seed, "random schedules");
    c.student = seed % 3 == 0 ? "kda" : "hybrid";
    c.aligns = seed % 4 == 3;
    c.chunks = ranks > 1 && ranks * 2 <= 4 && seed % 2 == 1 && !c.aligns ? 2 : 1;
    c.schedule = c.chunks == 2 ? "interleaved" : "1f1b";
    c.recompute = seed % 5 == 1;
    const auto teacher = seed % 2 == 0 && ranks > 1 ? pipeline::Teacher::ahead : pipeline::Teacher::in_line;
    const auto work = c.aligns                    ? pipeline::StudentWork::align
                      : random.next_below(2) == 0 ? pipeline::StudentWork::split_backward
                                                  : pipeline::StudentWork::whole_backward;
    SCOPED_TRACE(c.name() + ", random schedule " + std::to_string(seed));
    Mesh mesh(testing::runtime(), c.shape);
    const auto results = [&](bool drawn) {
      MeshJob job(c, mesh, DType::f32, 4, [&](TrainingPlan& plan) {
        if (!drawn) return;
        plan.schedules[0] = pipeline::random_legal_schedule(seed, ranks, c.chunks, 8, work, teacher);
        plan.config.pipeline.put_off_layers = static_cast<std::int64_t>(seed % 3);
      });
      std::vector<double> losses;
      for (std::int64_t n = 0; n < 3; ++n) losses.push_back(job.step(n).losses.total);
      job.trainer().stop();  // with teacher forwards of step 3 under way
      for (std::int64_t n = 3; n < 5; ++n) losses.push_back(job.step(n).losses.total);
      job.trainer().stop();
      return std::pair(losses, job.weights());
    };
    EXPECT_TRUE(results(true) == results(false));
  }
}

}  // namespace
}  // namespace deltapipe
