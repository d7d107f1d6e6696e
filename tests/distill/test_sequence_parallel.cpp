// Whole students with their sequences cut over ranks: loss and every gradient against one rank.
#include "comm/sequence_parallel.h"
#include "tests/comm/testing.h"
#include "tests/distill/tiny.h"

#include <gtest/gtest.h>

#include <cmath>

namespace deltapipe {
namespace {

using testing::tiny_student;
using testing::tiny_teacher;
using testing::TinyJob;

Objective end_to_end(const ModelSpec& student) {
  Objective o;
  o.head.ce = 0.2f;
  o.head.kl = 0.3f;
  o.head.tvd = 0.1f;
  o.head.temperature = 2.0f;
  o.hidden_cosine = 0.6;
  o.hidden_mse = 0.05;
  for (std::int64_t l = 0; l < student.layers(); ++l) o.hidden_layers.emplace_back(l, l);
  return o;
}

Objective alignment() {
  Objective o;
  o.mixer_mse = 1.0;
  return o;
}

struct Case {
  const char* name;
  Mlp mlp;
  bool tied;
  std::vector<std::string> mixers;
  bool align;
  bool recompute;
  std::vector<std::int64_t> starts;  // in the concatenation of two sequences of 96 tokens
};

const std::vector<Case>& cases() {
  static const std::vector<Case> list{
      {"hybrid", Mlp::squared_relu, false, {"kda", "kda", "kda", "nope"}, false, false, {0, 96}},
      {"hybrid, packed",
       Mlp::squared_relu,
       false,
       {"kda", "kda", "kda", "nope"},
       false,
       true,
       {0, 5, 24, 31, 32, 33, 47, 48, 90, 96, 97, 143, 160}},
      {"kda only, packed", Mlp::squared_relu, false, {"kda"}, false, false, {0, 40, 96, 120, 121}},
      {"llama, tied, rope", Mlp::gated_silu, true, {"kda", "rope"}, false, false, {0, 50, 96}},
      {"alignment", Mlp::squared_relu, false, {"kda", "nope"}, true, false, {0, 17, 96, 150}},
  };
  return list;
}

/// Largest over the parameters of |a - b| / |b|, Euclidean norms a tensor.
template <class T>
double worst_gradient_error(ParameterTable& a, ParameterTable& b) {
  double worst = 0;
  for (const Parameter& p : b.all()) {
    const T* x = a.at(p.spec.name).gradient_memory.as<T>();
    const T* y = p.gradient_memory.as<T>();
    double error = 0, norm = 0;
    for (std::int64_t i = 0; i < p.gradient_memory.numel(); ++i) {
      const double d = static_cast<double>(x[i]) - static_cast<double>(y[i]);
      error += d * d;
      norm += static_cast<double>(y[i]) * static_cast<double>(y[i]);
    }
    if (norm == 0 && error == 0) continue;  // e.g. the last layer's weights under alignment of others
    worst = std::max(worst, std::sqrt(error / norm));
  }
  return worst;
}

/// Decays as flash-linear-attention starts them: steps of 0.001 to 0.1. With states that fade within a few tokens the
/// outputs are small, and the norm after them blows up rounding, on one rank as on many.
void slow_decays(ParameterTable& parameters) {
  for (Parameter& p : parameters.all()) {
    if (!p.spec.name.ends_with("dt_bias")) continue;
    const RandomStream r(7, p.spec.name);
    for (std::int64_t i = 0; i < p.value.numel(); ++i) {
      const double x = -4.0 + 0.5 * r.normal(static_cast<std::uint64_t>(i));
      if (p.value.dtype == DType::f64) {
        p.value.as<double>()[i] = x;
      } else {
        p.value.as<float>()[i] = static_cast<float>(x);
      }
    }
  }
}

template <class T>
void compare_with_one_rank(double loss_tolerance, double gradient_tolerance) {
  Communicator& world = testing::runtime().world();
  const int ranks = world.size();
  for (const LayoutKind kind : {LayoutKind::contiguous, LayoutKind::zigzag}) {
    const SequenceParallel sequence(world, kind);
    for (const Case& k : cases()) {
      SCOPED_TRACE(std::string(k.name) + ", " + std::string(name_of(kind)) + ", ranks " + std::to_string(ranks));
      const ModelSpec teacher = tiny_teacher(k.mlp, k.tied);
      const ModelSpec student = tiny_student(teacher, k.mixers);
      const Objective o = k.align ? alignment() : end_to_end(student);
      // 96 tokens divide by 1, 2, 3, 4 and 6 ranks in both layouts; segments of 8 tokens at the least.
      TinyJob one(student, &teacher, 2, 96, o, false, 7, dtype_of<T>);
      TinyJob many(student, &teacher, 2, 96, o, k.recompute, 5, dtype_of<T>, &sequence);
      for (TinyJob* job : {&one, &many}) {
        job->randomize(3);
        slow_decays(job->parameters());
        job->fill_tokens(4, k.starts);
      }
      const double expected = one.loss_and_gradients();
      double loss = many.loss_and_gradients();
      const Stream stream = Stream::cpu();
      Arena workspace("workspace", std::size_t{1} << 22);
      world.all_reduce_sum(stream, Tensor(&loss, DType::f64, {1}), Purpose::control, workspace);
      world.all_reduce_sum(stream, many.parameters().flat_gradients(), Purpose::gradients, workspace);
      EXPECT_NEAR(loss, expected, loss_tolerance * std::abs(expected));
      if (gradient_tolerance > 0) {
        EXPECT_LT(worst_gradient_error<T>(many.parameters(), one.parameters()), gradient_tolerance);
      }
    }
  }
}

// Double sums in another order.
TEST(SequenceParallelStudents, EqualOneRankInDouble) { compare_with_one_rank<double>(1e-12, 1e-9); }
// The loss alone: in float32 the norms of these tiny heads blow up rounding in single gradients, on one rank as on
// many.
TEST(SequenceParallelStudents, EqualOneRankInFloat) { compare_with_one_rank<float>(1e-6, 0); }

// "Longer than one device can hold is the point": what a rank keeps for backward goes with T / N.
TEST(SequenceParallelStudents, ActivationsShrinkWithTheRanks) {
  const ModelSpec teacher = tiny_teacher();
  const ModelSpec student = tiny_student(teacher, {"kda"});
  Communicator& world = testing::runtime().world();
  const SequenceParallel sequence(world, LayoutKind::contiguous);
  const std::int64_t tokens = 1536;
  TinyJob one(student, &teacher, 1, tokens, end_to_end(student));
  TinyJob many(student, &teacher, 1, tokens, end_to_end(student), false, 7, DType::f64, &sequence);
  // Beside T / N there are states and halos: a fixed size a rank, a twentieth of this job.
  const auto share = static_cast<double>(one.arenas().activations.capacity()) / world.size();
  EXPECT_LT(static_cast<double>(many.arenas().activations.capacity()),
            share + 0.05 * static_cast<double>(one.arenas().activations.capacity()));
}

}  // namespace
}  // namespace deltapipe
