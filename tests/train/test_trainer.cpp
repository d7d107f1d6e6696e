// One training step of a tiny job: microbatches, frozen weights, stages, and the memory it takes.
#include "train/trainer.h"

#include "core/error.h"
#include "core/parallel.h"
#include "tests/data/testing.h"
#include "tests/distill/tiny.h"
#include "tests/train/count_allocations.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace deltapipe {
namespace {

using testing::tiny_student;
using testing::tiny_teacher;

using Contents = std::map<std::string, std::vector<std::byte>>;

std::vector<std::byte> bits(const Tensor& t) {
  std::vector<std::byte> copy(t.bytes());
  std::memcpy(copy.data(), t.data, t.bytes());
  return copy;
}

/// A stage as TOML; `more` are further lines of [[stage]], `loss` those of its loss.
std::string stage(const std::string& name, const std::string& loss, const std::string& more = "") {
  return fmt::format(
      "[[stage]]\nname = '{}'\nsteps = 20\nsequence_length = 24\nbatch_sequences = 8\nmicrobatch_sequences = 2\n"
      "learning_rate = 1e-2\nschedule = 'constant'\n{}\n[stage.loss]\n{}\n",
      name, more, loss);
}

const std::string end_to_end = "ce = 0.2\nkl = 0.3\nreverse_kl = 0.1\nhidden_cosine = 0.6\nhidden_mse = 0.05";
const std::string alignment = "mixer_mse = 1.0";

/// A plan for tiny models of vocabulary 23. `settings`: lines before the first stage, in tables of their own.
TrainingPlan plan_of(const std::string& stages, const std::string& settings = "[run]\ndtype = 'float64'\n",
                     bool with_teacher = true, const std::vector<std::string>& mixers = {"kda", "kda", "kda", "nope"},
                     bool tied = false) {
  const ModelSpec teacher = tiny_teacher(Mlp::squared_relu, tied);
  const ModelSpec student = tiny_student(teacher, mixers);
  const std::string from = with_teacher ? "[teacher]\npath = '-'\n" : "[student]\ninit = 'folder'\npath = '-'\n";
  const Config config = parse_config(from + "[data]\ntrain = '-'\nvalidation = '-'\n" + settings + stages, "test.toml");
  return make_training_plan(config, student, with_teacher ? &teacher : nullptr);
}

/// After its configuration was changed: schedules and all else follow from that.
TrainingPlan planned_again(const TrainingPlan& plan) {
  return make_training_plan(plan.config, plan.student, plan.teacher_spec());
}

/// A trainer in memory of measured size, with random weights and random documents to train on.
class TinyTraining {
 public:
  explicit TinyTraining(const TrainingPlan& the_plan) : plan(the_plan) {
    testing::write_dataset(folder_ / "tokens.h5", {"tiny", "none", 23, -1, 22},
                           testing::random_documents(5, 300, 40, 23));
    data_.emplace(folder_ / "tokens.h5");
    measured = Trainer::measure(plan, mesh, Device());
    arenas = measured.reserve();
    trainer = std::make_unique<Trainer>(plan, mesh, arenas, Stream::cpu());
    testing::randomize(trainer->models().student_parameters(), 1, "student ");
    if (auto* teacher = trainer->models().teacher_parameters()) testing::randomize(*teacher, 1, "teacher ");
    trainer->optimizer().capture_weights(Stream::cpu());
    for (const StageConfig& s : plan.config.stages) {
      loaders_.push_back(std::make_unique<SequenceLoader>(*data_, s.sequence_length, 1, true));
    }
    validation.emplace(*data_, plan.evaluation_length(), true);
    begin_stage(0);
  }

  void begin_stage(std::size_t stage) {
    stage_ = stage;
    trainer->begin_stage(stage);
  }
  StepReport step(std::int64_t n) { return trainer->step(loaders_[stage_].get(), n); }
  ParameterTable& parameters() { return trainer->models().student_parameters(); }
  Contents weights() {
    Contents all;
    for (const Parameter& p : parameters().all()) all[p.spec.name] = bits(p.value);
    return all;
  }
  std::vector<double> gradients() {
    std::vector<double> all;
    for (const Parameter& p : parameters().all()) {
      if (!p.gradient_memory) continue;
      const double* g = p.gradient_memory.as<double>();
      all.insert(all.end(), g, g + p.gradient_memory.numel());
    }
    return all;
  }

  TrainingPlan plan;
  Mesh mesh;
  ArenaSet measured = ArenaSet::measuring(Device());
  ArenaSet arenas = ArenaSet::measuring(Device());
  std::unique_ptr<Trainer> trainer;
  std::optional<WindowReader> validation;

 private:
  testing::TemporaryFolder folder_;
  std::optional<TokenDataset> data_;
  std::vector<std::unique_ptr<SequenceLoader>> loaders_;
  std::size_t stage_ = 0;
};

double relative_rms(const std::vector<double>& a, const std::vector<double>& b) {
  double error = 0, norm = 0;
  for (std::size_t i = 0; i < b.size(); ++i) {
    error += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  return std::sqrt(error / norm);
}

TEST(Trainer, MicrobatchesAddUpToTheBatch) {
  for (const std::string& loss : {end_to_end, alignment}) {
    TrainingPlan plan = plan_of(stage("s", loss));
    TinyTraining four(plan);
    plan.config.stages[0].microbatch_sequences = 8;
    TinyTraining one(planned_again(plan));
    const StepReport a = four.step(3), b = one.step(3);
    ASSERT_TRUE(a.applied && b.applied);
    // The same sums of doubles in another order.
    EXPECT_NEAR(a.losses.total, b.losses.total, 1e-12 * b.losses.total);
    EXPECT_EQ(a.losses.tokens, b.losses.tokens);
    EXPECT_NEAR(a.gradient_norm, b.gradient_norm, 1e-11 * b.gradient_norm);
    EXPECT_LT(relative_rms(four.gradients(), one.gradients()), 1e-11);
  }
}

TEST(Trainer, TheLossIsAMeanOverUnmaskedTokensOfTheWholeBatch) {
  TinyTraining t(plan_of(stage("s", "ce = 1.0")));
  const StepReport all = t.step(0);
  // Microbatches hold different numbers of unmasked tokens: a mean of their means would be another number.
  EXPECT_LT(all.losses.tokens, 8 * 24);
  EXPECT_GT(all.losses.tokens, 8 * 12);
  EXPECT_EQ(all.losses.total, all.losses.ce);
  double sum = 0, tokens = 0;
  TrainingPlan single = plan_of(stage("s", "ce = 1.0"));
  single.config.stages[0].batch_sequences = single.config.stages[0].microbatch_sequences = 1;
  TinyTraining alone(planned_again(single));
  const Contents start = alone.weights();
  for (int i = 0; i < 8; ++i) {
    for (Parameter& p : alone.parameters().all())
      std::memcpy(p.value.data, start.at(p.spec.name).data(), p.value.bytes());
    const StepReport r = alone.step(i);
    sum += r.losses.ce * r.losses.tokens;
    tokens += r.losses.tokens;
  }
  EXPECT_EQ(tokens, all.losses.tokens);
  EXPECT_NEAR(sum / tokens, all.losses.ce, 1e-12 * all.losses.ce);
}

TEST(Trainer, FrozenWeightsRestAndTakeNoMemory) {
  TinyTraining t(plan_of(stage("first", end_to_end, "frozen = ['embed_tokens', '\\.mlp\\.', 'lm_head']") +
                         stage("second", end_to_end, "frozen = ['embed_tokens', 'o_proj']")));
  const auto frozen_in = [&](const std::string& name, int stage) {
    const auto has = [&](const char* part) { return name.find(part) != std::string::npos; };
    return has("embed_tokens") || (stage == 0 ? has(".mlp.") || has("lm_head") : has("o_proj"));
  };
  for (const Parameter& p : t.parameters().all()) {
    EXPECT_EQ(static_cast<bool>(p.gradient_memory), p.spec.name.find("embed_tokens") == std::string::npos)
        << p.spec.name;
  }
  EXPECT_EQ(t.trainer->optimizer().state().size(), t.parameters().all().size() - 1);
  for (int stage = 0; stage < 2; ++stage) {
    t.begin_stage(static_cast<std::size_t>(stage));
    const Contents before = t.weights();
    ASSERT_TRUE(t.step(0).applied);
    for (const auto& [name, content] : t.weights()) {
      EXPECT_EQ(content == before.at(name), frozen_in(name, stage)) << name << " stage " << stage;
    }
  }
}

TEST(Trainer, EveryStageStartsItsOwnOptimization) {
  const TrainingPlan plan = plan_of(stage("first", "kl = 1.0") + stage("second", end_to_end));
  TinyTraining t(plan);
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(t.step(i).applied);
  const Contents before = t.weights();
  t.begin_stage(1);
  EXPECT_EQ(t.weights(), before);
  EXPECT_EQ(t.trainer->optimizer().updates(), 0);
  for (const Optimizer::State& s : t.trainer->optimizer().state()) {
    for (const Tensor& moment : {s.exp_avg, s.exp_avg_sq}) {
      EXPECT_EQ(bits(moment), std::vector<std::byte>(moment.bytes())) << s.parameter->spec.name;
    }
  }
  // From here on as if nothing but the weights had been before.
  TinyTraining fresh(plan);
  for (Parameter& p : fresh.parameters().all())
    std::memcpy(p.value.data, before.at(p.spec.name).data(), p.value.bytes());
  fresh.trainer->optimizer().capture_weights(Stream::cpu());
  fresh.begin_stage(1);
  for (int i = 0; i < 2; ++i) EXPECT_EQ(t.step(i).losses.total, fresh.step(i).losses.total);
  EXPECT_EQ(t.weights(), fresh.weights());
}

TEST(Trainer, AlignmentTrainsMixersAndTheirNormsOnly) {
  TinyTraining t(plan_of(stage("align", alignment)));
  const auto in_mixer = [](const std::string& name) {
    return name.find(".self_attn.") != std::string::npos || name.ends_with(".input_layernorm.weight");
  };
  const Contents before = t.weights();
  ASSERT_TRUE(t.step(0).applied);
  for (const auto& [name, content] : t.weights()) EXPECT_EQ(content != before.at(name), in_mixer(name)) << name;
  for (const Parameter& p : t.parameters().all()) {
    EXPECT_EQ(static_cast<bool>(p.gradient_memory), in_mixer(p.spec.name)) << p.spec.name;
  }
}

TEST(Trainer, LearnsAFixedBatch) {
  for (const std::string& loss : {end_to_end, alignment}) {
    TinyTraining t(plan_of(stage("s", loss)));
    const double first = t.step(0).losses.total;
    double last = first;
    for (int i = 0; i < 30; ++i) last = t.step(0).losses.total;
    EXPECT_LT(last, 0.7 * first) << loss;
  }
}

TEST(Trainer, ANonFiniteLossChangesNothing) {
  TinyTraining t(plan_of(stage("s", end_to_end)));
  ASSERT_TRUE(t.step(0).applied);
  t.parameters().at("model.norm.weight").value.as<double>()[2] = std::numeric_limits<double>::quiet_NaN();
  const Contents before = t.weights();
  const auto moment = bits(t.trainer->optimizer().state()[0].exp_avg);
  const StepReport r = t.step(1);
  EXPECT_FALSE(r.applied);
  EXPECT_FALSE(std::isfinite(r.losses.total));
  EXPECT_FALSE(std::isfinite(r.gradient_norm));
  EXPECT_EQ(t.weights(), before);
  EXPECT_EQ(bits(t.trainer->optimizer().state()[0].exp_avg), moment);
  EXPECT_EQ(t.trainer->optimizer().updates(), 1);
}

void expect_refusal(const std::function<void()>& f, std::initializer_list<const char*> parts) {
  try {
    f();
    ADD_FAILURE() << "accepted";
  } catch (const ConfigError& e) {
    const std::string message = e.what();
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    for (const char* part : parts) EXPECT_NE(message.find(part), std::string::npos) << part << " not in: " << message;
  }
}

TEST(TrainingPlan, RefusesStagesThatTrainNothing) {
  expect_refusal([] { plan_of(""); }, {"[[stage]]"});
  expect_refusal([] { plan_of(stage("fine", "ce = 1") + stage("idle", "kl = 1", "frozen = ['.']")); }, {"'idle'"});
  // What alignment reaches is frozen; the rest it would not train anyway.
  expect_refusal([] { plan_of(stage("idle", alignment, "frozen = ['self_attn', 'input_layernorm']")); }, {"'idle'"});
  expect_refusal([] { plan_of(stage("typo", "ce = 1", "frozen = ['embed_tokens', 'self_atn']")); },
                 {"'typo'", "'self_atn'"});
}

// ------------------------------------------------------------------------------------------------------------- memory

struct Recipe {
  const char* name;
  std::string stages, settings;
  bool teacher = true;
  std::vector<std::string> mixers{"kda", "kda", "kda", "nope"};
  bool tied = false;
};

std::vector<Recipe> recipes() {
  const std::string f32 = "[run]\ndtype = 'float32'\n", f64 = "[run]\ndtype = 'float64'\n";
  const std::string odd = "[memory]\nloss_block_tokens = 31\n";
  return {{"distillation", stage("s", end_to_end), f64},
          {"float32", stage("s", end_to_end), f32},
          {"recompute", stage("s", end_to_end), f32 + "[memory]\nrecompute = true\nloss_block_tokens = 7\n"},
          {"alignment, then distillation", stage("a", alignment) + stage("s", "kl = 1"), f32 + odd},
          {"cross-entropy alone", stage("s", "ce = 1"), f32 + odd, false, {"rope"}},
          {"hidden states alone", stage("s", "hidden_mse = 1", "hidden_layers = [[1, 3]]"), f32},
          {"tied, KDA alone, long evaluation",
           stage("s", "jsd = 1"),
           f32 + "[eval]\nsequence_length = 131\n",
           true,
           {"kda"},
           true}};
}

TEST(TrainerMemory, MeasuredPeaksAreTheRealOnes) {
  for (const Recipe& r : recipes()) {
    TinyTraining t(plan_of(r.stages, r.settings, r.teacher, r.mixers, r.tied));
    for (std::size_t s = 0; s < t.plan.config.stages.size(); ++s) {
      t.begin_stage(s);
      for (int i = 0; i < 2; ++i) ASSERT_TRUE(t.step(i).applied) << r.name;
    }
    t.trainer->evaluate(&*t.validation);
    const auto measured = t.measured.all(), real = t.arenas.all();
    for (std::size_t a = 0; a < real.size(); ++a) {
      EXPECT_EQ(real[a]->peak(), measured[a]->peak()) << r.name << ": " << real[a]->name();
      EXPECT_EQ(real[a]->capacity(), measured[a]->peak()) << r.name << ": " << real[a]->name();
    }
    EXPECT_EQ(t.arenas.peak_bytes(), t.measured.peak_bytes()) << r.name;
    EXPECT_EQ(t.arenas.activations.used(), 0u) << r.name;
    EXPECT_EQ(t.arenas.workspace.used(), 0u) << r.name;
  }
}

TEST(TrainerMemory, AStepAllocatesNothing) {
  for (const Recipe& r : recipes()) {
    TinyTraining t(plan_of(r.stages, r.settings, r.teacher, r.mixers, r.tied));
    for (std::size_t s = 0; s < t.plan.config.stages.size(); ++s) {
      t.begin_stage(s);
      t.step(0);  // lists take their memory once
      const std::int64_t before = testing::heap_allocations();
      for (int i = 1; i < 4; ++i) t.step(i);
      EXPECT_EQ(testing::heap_allocations() - before, 0) << r.name << ", stage " << s;
    }
    t.trainer->evaluate(&*t.validation);
    const std::int64_t before = testing::heap_allocations();
    t.trainer->evaluate(&*t.validation);
    EXPECT_EQ(testing::heap_allocations() - before, 0) << r.name << ", evaluation";
  }
  const std::int64_t before = testing::heap_allocations();
  const auto counted = std::make_unique<std::vector<int>>(100);
  EXPECT_EQ(testing::heap_allocations() - before, counted->empty() ? 1 : 2) << "the counter does not count";
}

}  // namespace
}  // namespace deltapipe
