// The same job on every mesh against one rank: loss, each gradient tensor, ten steps of training, evaluation.
#include "core/error.h"
#include "tests/comm/testing.h"
#include "tests/train/mesh_job.h"

#include <gtest/gtest.h>

#include <cmath>
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

Result run(const MeshCase& which, Mesh& mesh, std::int64_t layers) {
  MeshJob job(which, mesh, DType::f32, layers);
  Result r;
  StepReport report = job.accumulate(0);
  r.names = job.names();
  r.gradients = job.gradients();
  r.gradient_norm = report.gradient_norm;
  job.trainer().update(report);
  r.losses.push_back(report.losses.total);
  for (std::int64_t n = 1; n < testing::mesh_job_steps; ++n) r.losses.push_back(job.step(n).losses.total);
  r.weights = job.weights();
  r.evaluation = job.trainer().evaluate(&job.validation());
  return r;
}

/// What one rank makes of the job; every rank computes it by itself, once.
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
        for (const auto& [schedule, chunks] : std::vector<std::pair<std::string, int>>{
                 {"1f1b", 1}, {"interleaved", 2}, {"zero_bubble", 1}}) {
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

/// Every mesh with every student, recomputing or not; unless DELTAPIPE_WHOLE_MATRIX is set, each mesh with one of them,
/// in turn.
std::vector<MeshCase> cases_of(int ranks) {
  const bool whole = std::getenv("DELTAPIPE_WHOLE_MATRIX") != nullptr;
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
  std::vector<MeshCase> list;
  std::size_t turn = 0;
  for (const MeshCase& mesh : meshes_of(ranks)) {
    for (std::size_t i = 0; i < (whole ? jobs.size() : 1); ++i) {
      MeshCase c = mesh;
      const MeshCase& job = jobs[whole ? i : turn++ % jobs.size()];
      c.student = job.student;
      c.aligns = job.aligns;
      c.recompute = job.recompute;
      list.push_back(c);
    }
  }
  return list;
}

TEST(Meshes, EqualOneRank) {
  const std::vector<MeshCase> cases = cases_of(testing::runtime().size());
  ASSERT_FALSE(cases.empty());
  double worst_loss = 0, worst_gradient = 0, worst_training = 0;
  for (const MeshCase& c : cases) {
    if (const char* only = std::getenv("DELTAPIPE_ONLY_MESHES"); only && c.name().find(only) == std::string::npos) continue;
    SCOPED_TRACE(c.name());
    if (std::getenv("DELTAPIPE_VERBOSE") != nullptr && testing::runtime().rank() == 0) std::printf("%s\n", c.name().c_str()), std::fflush(stdout);
    Mesh mesh(testing::runtime(), c.shape);
    const Result& one = on_one_rank(c);
    const Result many = run(c, mesh, c.layers());
    worst_loss = std::max(worst_loss, std::abs(many.losses[0] / one.losses[0] - 1));
    EXPECT_NEAR(many.losses[0], one.losses[0], 1e-6 * one.losses[0]);
    EXPECT_NEAR(many.gradient_norm, one.gradient_norm, 1e-5 * one.gradient_norm);
    for (std::size_t i = 0; i < one.gradients.size(); ++i) {
      const double size = norm(one.gradients[i]), error = distance(many.gradients[i], one.gradients[i]);
      if (size > 0) worst_gradient = std::max(worst_gradient, error / size);
      EXPECT_LE(error, 1e-5 * size) << one.names[i];
    }
    double moved = 0, all = 0;
    for (std::size_t i = 0; i < one.weights.size(); ++i) {
      moved += std::pow(distance(many.weights[i], one.weights[i]), 2);
      all += std::pow(norm(one.weights[i]), 2);
    }
    EXPECT_LT(std::sqrt(moved / all), 1e-4);
    for (std::size_t n = 0; n < one.losses.size(); ++n) {
      worst_training = std::max(worst_training, std::abs(many.losses[n] / one.losses[n] - 1));
      EXPECT_NEAR(many.losses[n], one.losses[n], 1e-4 * one.losses[n]) << "step " << n;
    }
    EXPECT_EQ(many.evaluation.tokens, one.evaluation.tokens);
    EXPECT_NEAR(many.evaluation.student_perplexity, one.evaluation.student_perplexity,
                1e-4 * one.evaluation.student_perplexity);
    EXPECT_NEAR(many.evaluation.teacher->kl, one.evaluation.teacher->kl, 1e-4);
    // A pipeline alone changes the order of no sum but those over its stages, of losses and norms.
    // Tied embeddings take their two parts in another order.
    if (c.shape.data * c.shape.sequence == 1 && c.student != "llama") {
      EXPECT_TRUE(many.gradients == one.gradients) << "not bitwise equal";
    }
  }
  if (testing::runtime().rank() == 0) {
    std::printf("%zu meshes: loss %.1e, gradients %.1e, losses of ten steps %.1e\n", cases.size(), worst_loss,
                worst_gradient, worst_training);
  }
}

}  // namespace
}  // namespace deltapipe
