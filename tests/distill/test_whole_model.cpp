// Whole students: gradients of every recipe's loss along random directions, packed documents against documents alone,
// recompute, tied embeddings, microbatches. All in float64.
#include "tests/distill/tiny.h"

#include "core/random.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <ostream>

namespace deltapipe {
namespace {

using testing::tiny_student;
using testing::tiny_teacher;
using testing::TinyJob;

Objective end_to_end(const ModelSpec& student) {
  Objective o;
  o.head.ce = 0.2f;
  o.head.kl = 0.3f;
  o.head.reverse_kl = 0.1f;
  o.head.jsd = 0.15f;
  o.head.temperature = 2.0f;
  o.hidden_cosine = 0.6;
  o.hidden_mse = 0.05;
  for (std::int64_t l = 0; l < student.layers(); ++l) o.hidden_layers.emplace_back(l, l);
  return o;
}

Objective cross_entropy() {
  Objective o;
  o.head.ce = 1.0f;
  return o;
}

Objective alignment() {
  Objective o;
  o.mixer_mse = 1.0;
  return o;
}

std::vector<double> copy_gradients(ParameterTable& table) {
  std::vector<double> all;
  for (const Parameter& p : table.all()) {
    const double* g = p.gradient_memory.as<double>();
    all.insert(all.end(), g, g + p.gradient_memory.numel());
  }
  return all;
}

/// d loss / d direction from gradients, and by differences, for one random direction over all parameters.
std::pair<double, double> along_random_direction(TinyJob& job, std::uint64_t seed) {
  double analytic = 0;
  std::vector<std::vector<double>> direction;
  job.loss_and_gradients();
  for (const Parameter& p : job.parameters().all()) {
    RandomStream r(seed, p.spec.name);
    auto& d = direction.emplace_back();
    for (std::int64_t i = 0; i < p.value.numel(); ++i) {
      d.push_back(r.next_normal());
      analytic += d.back() * p.gradient_memory.as<double>()[i];
    }
  }
  const auto move = [&](double h) {
    std::size_t k = 0;
    for (const Parameter& p : job.parameters().all()) {
      for (std::int64_t i = 0; i < p.value.numel(); ++i) {
        p.value.as<double>()[i] += h * direction[k][static_cast<std::size_t>(i)];
      }
      ++k;
    }
  };
  const auto central = [&](double h) {
    move(h);
    const double up = job.loss();
    move(-2 * h);
    const double down = job.loss();
    move(h);
    return (up - down) / (2 * h);
  };
  // KDA's norms make the loss curve sharply: one step of Richardson extrapolation removes the h^2 term, and h is small
  // enough for the h^4 one while rounding, 1e-15 / h, stays near 1e-8.
  const double h = 1e-7;
  return {analytic, (4 * central(h / 2) - central(h)) / 3};
}

struct Case {
  const char* name;
  Mlp mlp;
  bool tied;
  std::vector<std::string> mixers;
  double gate_lower_bound;
  int objective;  // 0 end to end, 1 cross-entropy, 2 alignment
  friend void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }
};

class WholeModel : public ::testing::TestWithParam<Case> {};

TEST_P(WholeModel, GradientAlongRandomDirectionsMatchesFiniteDifferences) {
  const Case& k = GetParam();
  const ModelSpec teacher = tiny_teacher(k.mlp, k.tied);
  const ModelSpec student = tiny_student(teacher, k.mixers, k.gate_lower_bound);
  const Objective o = k.objective == 0 ? end_to_end(student) : k.objective == 1 ? cross_entropy() : alignment();
  TinyJob job(student, &teacher, 2, 37, o);
  job.randomize(5);
  job.fill_tokens(7, {0, 9, 10, 37, 60});
  for (std::uint64_t seed = 1; seed <= 3; ++seed) {
    const auto [analytic, numeric] = along_random_direction(job, seed);
    EXPECT_NEAR(analytic, numeric, 1e-6 * std::max(1.0, std::abs(numeric))) << k.name << " direction " << seed;
    EXPECT_GT(std::abs(numeric), 1e-4) << "a direction that moves nothing proves nothing";
  }
}

INSTANTIATE_TEST_SUITE_P(
    Students, WholeModel,
    ::testing::Values(Case{"hybrid", Mlp::squared_relu, false, {"kda", "kda", "kda", "nope"}, 0.0, 0},
                      Case{"bounded_gate", Mlp::squared_relu, false, {"kda", "nope"}, -5.0, 0},
                      Case{"kda_only", Mlp::squared_relu, false, {"kda"}, 0.0, 0},
                      Case{"llama_tied", Mlp::gated_silu, true, {"kda", "rope"}, 0.0, 0},
                      Case{"cross_entropy", Mlp::squared_relu, true, {"kda", "kda", "kda", "nope"}, 0.0, 1},
                      Case{"attention_only", Mlp::gated_silu, false, {"nope", "rope"}, 0.0, 0},
                      Case{"alignment", Mlp::squared_relu, false, {"kda", "kda", "kda", "nope"}, 0.0, 2}),
    [](const auto& test) { return std::string(test.param.name); });

// The same documents packed into one sequence, and each in a sequence of its own.
TEST(PackedDocuments, EqualSeparateDocumentsInLossAndGradients) {
  const ModelSpec teacher = tiny_teacher();
  const ModelSpec student = tiny_student(teacher, {"kda", "kda", "rope", "nope"});
  const std::vector<std::int64_t> starts{0, 1, 17, 64, 70, 131};
  const std::int64_t total = 150;
  for (const bool align : {false, true}) {
    const Objective o = align ? alignment() : end_to_end(student);
    TinyJob packed(student, &teacher, 1, total, o);
    packed.randomize(3);
    packed.fill_tokens(4, starts);
    const double weight = 1.0 / static_cast<double>(packed.batch().count_unmasked());
    const double loss = packed.loss_and_gradients();
    const std::vector<double> gradients = copy_gradients(packed.parameters());
    double sum = 0;
    std::vector<double> added(gradients.size(), 0.0);
    for (std::size_t d = 0; d < starts.size(); ++d) {
      const std::int64_t begin = starts[d], end = d + 1 < starts.size() ? starts[d + 1] : total;
      TinyJob alone(student, &teacher, 1, end - begin, o);
      alone.randomize(3);
      alone.token_weight = weight;
      const SequenceSpans from = packed.batch().spans(0), to = alone.batch().spans(0);
      for (std::int64_t i = begin; i < end; ++i) {
        const auto a = static_cast<std::size_t>(i), b = static_cast<std::size_t>(i - begin);
        to.tokens[b] = from.tokens[a];
        to.labels[b] = from.labels[a];
        to.start[b] = 0;
        to.positions[b] = static_cast<std::int32_t>(i - begin);
      }
      if (end - begin > 1) sum += alone.loss_and_gradients();
      if (end - begin == 1) alone.loss_and_gradients();  // a document of one token: no label, no loss
      const std::vector<double> g = copy_gradients(alone.parameters());
      for (std::size_t i = 0; i < g.size(); ++i) added[i] += g[i];
    }
    EXPECT_NEAR(loss, sum, 1e-12 * std::abs(loss));
    double error = 0, norm = 0;
    for (std::size_t i = 0; i < added.size(); ++i) {
      error += (added[i] - gradients[i]) * (added[i] - gradients[i]);
      norm += gradients[i] * gradients[i];
    }
    // Double sums in another order.
    EXPECT_LT(std::sqrt(error / norm), 1e-10) << (align ? "alignment" : "end to end");
  }
}

TEST(Recompute, GivesTheSameBits) {
  const ModelSpec teacher = tiny_teacher();
  const ModelSpec student = tiny_student(teacher, {"kda", "nope"});
  TinyJob kept(student, &teacher, 2, 33, end_to_end(student), false);
  TinyJob recomputed(student, &teacher, 2, 33, end_to_end(student), true);
  for (TinyJob* j : {&kept, &recomputed}) {
    j->randomize(1);
    j->fill_tokens(2, {0, 20, 33});
  }
  EXPECT_EQ(kept.loss_and_gradients(), recomputed.loss_and_gradients());
  EXPECT_EQ(copy_gradients(kept.parameters()), copy_gradients(recomputed.parameters()));
  EXPECT_LT(recomputed.arenas().activations.capacity(), kept.arenas().activations.capacity());
}

TEST(LossBlocks, DoNotChangeTheLoss) {
  const ModelSpec teacher = tiny_teacher();
  const ModelSpec student = tiny_student(teacher, {"kda", "nope"});
  std::vector<double> first;
  double loss = 0;
  for (const std::int64_t block : {1, 13, 66, 1000}) {
    TinyJob job(student, &teacher, 2, 33, end_to_end(student), false, block);
    job.randomize(1);
    job.fill_tokens(2, {0, 33});
    const double l = job.loss_and_gradients();
    const std::vector<double> g = copy_gradients(job.parameters());
    if (first.empty()) {
      first = g;
      loss = l;
    }
    EXPECT_NEAR(l, loss, 1e-12 * std::abs(loss)) << block;
    for (std::size_t i = 0; i < g.size(); ++i) ASSERT_NEAR(g[i], first[i], 1e-12) << block;
  }
}

// A frozen weight gets no gradient, and freezing changes no other gradient.
TEST(Frozen, LeavesOtherGradientsAlone) {
  const ModelSpec teacher = tiny_teacher();
  const ModelSpec student = tiny_student(teacher, {"kda", "nope"});
  TinyJob job(student, &teacher, 1, 40, end_to_end(student));
  job.randomize(1);
  job.fill_tokens(2, {0});
  job.loss_and_gradients();
  const std::vector<double> all = copy_gradients(job.parameters());
  for (Parameter& p : job.parameters().all()) p.trainable = p.spec.name.find("self_attn") != std::string::npos;
  job.loss_and_gradients();
  const std::vector<double> some = copy_gradients(job.parameters());
  std::size_t i = 0;
  for (const Parameter& p : job.parameters().all()) {
    for (std::int64_t k = 0; k < p.value.numel(); ++k, ++i) ASSERT_EQ(some[i], p.trainable ? all[i] : 0.0);
  }
}

}  // namespace
}  // namespace deltapipe
