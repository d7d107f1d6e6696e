// From a stage's settings to losses: layer mappings, what needs which teacher, and the sums that become a report.
#include "distill/objective.h"

#include "core/error.h"
#include "tests/distill/tiny.h"

#include <gtest/gtest.h>

#include <functional>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

namespace deltapipe {
namespace {

using testing::tiny_student;
using testing::tiny_teacher;
using Pairs = std::vector<std::pair<std::int64_t, std::int64_t>>;

StageConfig stage_of(const LossConfig& loss, std::vector<LayerPair> layers = {}) {
  StageConfig s;
  s.name = "some-stage";
  s.loss = loss;
  s.hidden_layers = std::move(layers);
  s.temperature = 2.0;
  return s;
}

void expect_refusal(const std::function<void()>& f, std::initializer_list<const char*> parts) {
  try {
    f();
    ADD_FAILURE() << "accepted";
  } catch (const ConfigError& e) {
    const std::string message = e.what();
    for (const char* part : parts) EXPECT_NE(message.find(part), std::string::npos) << part << " not in: " << message;
  }
}

const LossConfig hidden_losses{.hidden_cosine = 0.6, .hidden_mse = 0.1};

TEST(Objective, ComparesEveryLayerWithItsOwnByDefault) {
  const ModelSpec teacher = tiny_teacher();
  const ModelSpec student = tiny_student(teacher, {"kda", "nope"});
  const Objective o = make_objective(stage_of(hidden_losses), student, &teacher);
  EXPECT_EQ(o.hidden_layers, (Pairs{{0, 0}, {1, 1}, {2, 2}, {3, 3}}));
  EXPECT_EQ(o.teacher_layer_of(3), 3);
  EXPECT_TRUE(o.needs_teacher());
  EXPECT_FALSE(o.needs_teacher_logits());
  EXPECT_FALSE(o.has_head_losses());
}

TEST(Objective, MapsLayersAsGiven) {
  const ModelSpec teacher = tiny_teacher(Mlp::squared_relu, false, 6);
  const ModelSpec student = tiny_student(tiny_teacher(Mlp::squared_relu, false, 3), {"kda"});
  const Objective o = make_objective(stage_of(hidden_losses, {{2, 5}, {0, 1}}), student, &teacher);
  EXPECT_EQ(o.hidden_layers, (Pairs{{2, 5}, {0, 1}}));
  EXPECT_EQ(o.teacher_layer_of(0), 1);
  EXPECT_EQ(o.teacher_layer_of(1), -1);
  EXPECT_EQ(o.teacher_layer_of(2), 5);
}

TEST(Objective, LeavesTheMappingOutWithoutHiddenLosses) {
  const ModelSpec teacher = tiny_teacher();
  const ModelSpec student = tiny_student(teacher, {"kda"});
  const Objective o = make_objective(stage_of({.ce = 0.2, .kl = 0.8}, {{0, 0}}), student, &teacher);
  EXPECT_TRUE(o.hidden_layers.empty());
  EXPECT_EQ(o.teacher_layer_of(0), -1);
  EXPECT_EQ(o.head.temperature, 2.0f);
  EXPECT_EQ(o.head.kl, 0.8f);
}

TEST(Objective, RefusesMappingsThatDoNotFit) {
  const ModelSpec teacher = tiny_teacher();
  const ModelSpec student = tiny_student(teacher, {"kda"});
  const auto make = [&](std::vector<LayerPair> layers) {
    make_objective(stage_of(hidden_losses, std::move(layers)), student, &teacher);
  };
  expect_refusal([&] { make({{0, 0}, {4, 3}}); }, {"some-stage", "[4, 3]", "student has 4"});
  expect_refusal([&] { make({{3, 4}}); }, {"some-stage", "[3, 4]", "teacher 4"});
  expect_refusal([&] { make({{-1, 0}}); }, {"some-stage", "[-1, 0]"});
  expect_refusal([&] { make({{1, 1}, {2, 2}, {1, 3}}); }, {"some-stage", "student layer 1 twice"});
}

TEST(Objective, RefusesTeachersThatDoNotFit) {
  const ModelSpec student = tiny_student(tiny_teacher(), {"kda"});
  const ModelSpec deeper = tiny_teacher(Mlp::squared_relu, false, 5);
  ModelSpec wider = tiny_teacher();
  wider.hidden = 24;
  ModelSpec other_vocabulary = tiny_teacher();
  other_vocabulary.vocabulary = 24;
  const LossConfig alignment{.mixer_mse = 1.0};
  const auto make = [&](const LossConfig& loss, const ModelSpec* teacher) {
    return make_objective(stage_of(loss), student, teacher);
  };
  expect_refusal([&] { make({.kl = 1}, nullptr); }, {"some-stage", "teacher.path"});
  expect_refusal([&] { make(hidden_losses, &deeper); }, {"some-stage", "5", "4", "hidden_layers"});
  expect_refusal([&] { make(alignment, &deeper); }, {"some-stage", "5", "4"});
  expect_refusal([&] { make(hidden_losses, &wider); }, {"some-stage", "24", "12"});
  expect_refusal([&] { make(alignment, &wider); }, {"some-stage", "24", "12"});
  expect_refusal([&] { make({.kl = 1}, &other_vocabulary); }, {"24", "23"});
  // Cross-entropy needs no teacher, and logits need no equal depth or width.
  EXPECT_NO_THROW(make({.ce = 1}, nullptr));
  EXPECT_NO_THROW(make({.kl = 1}, &deeper));
  EXPECT_NO_THROW(make({.kl = 1}, &wider));
}

TEST(Objective, ReportsMeansOverTokensAndLayers) {
  Objective o;
  o.head.ce = 0.5f;
  o.head.kl = 2.0f;
  o.hidden_cosine = 0.25;
  o.hidden_mse = 4.0;
  o.hidden_layers = {{0, 0}, {2, 2}};
  double sums[LossSums::count] = {};
  sums[kernels::LossSum::ce] = 30;
  sums[kernels::LossSum::kl] = 5;
  sums[kernels::LossSum::top1_agree] = 8;
  sums[LossSums::hidden_cosine] = 6;  // over two layers
  sums[LossSums::hidden_mse] = 2;
  const LossReport r = report_losses(o, sums, 3, 10);
  EXPECT_DOUBLE_EQ(r.ce, 3);
  EXPECT_DOUBLE_EQ(r.kl, 0.5);
  EXPECT_DOUBLE_EQ(r.top1_agreement, 0.8);
  EXPECT_DOUBLE_EQ(r.hidden_cosine, 0.3);
  EXPECT_DOUBLE_EQ(r.hidden_mse, 0.1);
  EXPECT_DOUBLE_EQ(r.total, 0.5 * 3 + 2 * 0.5 + 0.25 * 0.3 + 4 * 0.1);

  Objective align;
  align.mixer_mse = 2;
  double mixer[LossSums::count] = {};
  mixer[LossSums::mixer_mse] = 60;  // over three layers
  EXPECT_DOUBLE_EQ(report_losses(align, mixer, 3, 10).mixer_mse, 2);
  EXPECT_DOUBLE_EQ(report_losses(align, mixer, 3, 10).total, 4);
}

}  // namespace
}  // namespace deltapipe
