// `deltapipe plan` as a user meets it, and the numbers behind it.
#include "plan/plan.h"

#include "core/file.h"
#include "tests/cli/workshop.h"
#include "tests/distill/tiny.h"

#include <nlohmann/json.hpp>

namespace deltapipe {
namespace {

using nlohmann::json;
using testing::fails_with;
using testing::Outcome;
using testing::succeeds;
using testing::Workshop;

TrainingPlan tiny_plan(const MeshShape& mesh, const std::string& settings = "") {
  const ModelSpec teacher = testing::tiny_teacher();
  const Config config = parse_config(
      "[teacher]\npath = '-'\n[[stage]]\nname = 's'\nsteps = 10\nsequence_length = 48\nbatch_sequences = 8\n"
      "learning_rate = 1e-3\n[stage.loss]\nkl = 1.0\n" +
          settings,
      "test.toml");
  return make_training_plan(config, testing::tiny_student(teacher, {"kda", "kda", "kda", "nope"}), &teacher, mesh);
}

TEST(RunPlan, SharesAndMemoryOfEveryRank) {
  const RunPlan plan = make_run_plan(tiny_plan({2, 2, 2}));
  double shares = 0;
  for (const double s : plan.stage_shares) shares += s;
  EXPECT_NEAR(shares, 1.0, 1e-12);  // a few roundings of doubles
  ASSERT_EQ(plan.memory.size(), 8u);
  for (int rank = 0; rank < 8; ++rank) {
    const RankMemory& m = plan.memory[static_cast<std::size_t>(rank)];
    EXPECT_EQ(m.rank, rank);
    EXPECT_EQ(m.at, plan.training.mesh.coordinate_of(rank));
    EXPECT_GT(m.total(), 0u);
  }
  // Both ranks of a pair over the data axis hold the same layers, and half of the optimizer's states each.
  const auto optimizer = [](const RunPlan& p, std::size_t rank) { return p.memory[rank].arenas[3]; };
  ASSERT_EQ(optimizer(plan, 0).first, "optimizer");
  const RunPlan alone = make_run_plan(tiny_plan({1, 2, 2}));
  EXPECT_LT(optimizer(plan, 0).second, optimizer(alone, 0).second);
}

// Of four layers on two ranks: weights' gradients of both layers of a rank put off, or of one.
TEST(RunPlan, PuttingOffFewerLayersTakesLessMemoryAndFillsLessOfTheBubbles) {
  const auto plan = [](const std::string& schedule) {
    return make_run_plan(tiny_plan({1, 2, 1}, "[memory]\nrecompute = true\n[pipeline]\n" + schedule));
  };
  const RunPlan all = plan("schedule = 'zero_bubble'\n"), one = plan("schedule = 'zero_bubble'\nput_off_layers = 1\n"),
                two = plan("schedule = 'zero_bubble'\nput_off_layers = 2\n"), none = plan("");
  for (std::size_t rank = 0; rank < 2; ++rank) {
    EXPECT_LT(one.memory[rank].total(), all.memory[rank].total());
    EXPECT_GT(one.memory[rank].total(), none.memory[rank].total());
    EXPECT_EQ(two.memory[rank].total(), all.memory[rank].total());
  }
  const auto bubble = [](const RunPlan& p) { return p.times.front().simulation.bubble; };
  EXPECT_GT(bubble(one), bubble(all));
  EXPECT_LT(bubble(one), bubble(none));
}

TEST(RunPlan, TimeFollowsTheDevice) {
  const TrainingPlan training = tiny_plan({1, 2, 1});
  DeviceSpeed slow, fast;
  fast.compute = {slow.compute.flops * 4, slow.compute.bandwidth * 4};
  fast.link_bytes_s = slow.link_bytes_s * 4;
  const StageTime a = make_run_plan(training, slow).times.front(), b = make_run_plan(training, fast).times.front();
  EXPECT_NEAR(a.simulation.step_s, 4 * b.simulation.step_s, 1e-9 * a.simulation.step_s);  // roundings of doubles
  EXPECT_NEAR(4 * a.tokens_per_second(), b.tokens_per_second(), 1e-9 * b.tokens_per_second());
  EXPECT_EQ(a.tokens, 8 * 48);
  EXPECT_EQ(a.steps, 10);
  EXPECT_GT(a.simulation.update_s, 0);
  // With slower links messages and gradients take longer, and nothing else.
  slow.link_bytes_s /= 1e3;
  EXPECT_GT(make_run_plan(training, slow).times.front().simulation.step_s, a.simulation.step_s);
}

TEST(RunPlan, MeshesWithoutAGivenNumberOfRanks) {
  const auto config_of = [](const std::string& mesh) {
    return parse_config("[student]\ninit = 'folder'\npath = '-'\n[mesh]\n" + mesh, "test.toml");
  };
  EXPECT_EQ(plan_mesh(config_of("pipeline = 4\nsequence = 2"), 0), (MeshShape{1, 4, 2}));
  EXPECT_EQ(plan_mesh(config_of("pipeline = 4\nsequence = 2"), 24), (MeshShape{3, 4, 2}));
  EXPECT_THROW(plan_mesh(config_of("pipeline = 4\nsequence = 2"), 12), ConfigError);
}

class PlanCommand : public ::testing::Test {
 protected:
  PlanCommand() { shop.write_job(4, 6); }
  std::vector<std::string> command(std::vector<std::string> more) const {
    more.insert(more.begin(), {"plan", "job.toml"});
    return more;
  }
  Workshop shop;
};

TEST_F(PlanCommand, TellsMeshLayersMemoryAndTime) {
  const testing::Listing before = testing::list_files(shop.path());
  const Outcome outcome =
      shop.run(command({"--nodes", "1", "--gpus-per-node", "4", "--set", "mesh.pipeline=2", "--set", "mesh.sequence=2",
                        "--set", "pipeline.teacher=ahead", "--json", "plan.json", "--timeline", "step.svg"}));
  ASSERT_TRUE(succeeds(outcome));
  for (const char* part : {"4 ranks: data 1 x pipeline 2 x sequence 2 (zigzag)", "float32 on cpu", "one H100",
                           "not measured", "workspace", "align, teacher ahead", "1f1b, teacher ahead", "tokens/s",
                           "rank 1 |", "drawn in step-align.svg", "drawn in step-distill.svg"}) {
    EXPECT_NE(outcome.out.find(part), std::string::npos) << part << "\n" << outcome;
  }
  const json plan = json::parse(read_file(shop / "plan.json"));
  EXPECT_EQ(plan["mesh"], (json{{"data", 1}, {"pipeline", 2}, {"sequence", 2}, {"layout", "zigzag"}}));
  EXPECT_EQ(plan["partition"].size(), 2u);
  ASSERT_EQ(plan["memory"].size(), 4u);
  EXPECT_EQ(plan["memory"][3]["pipeline"], 1);
  EXPECT_EQ(plan["stages"].size(), 2u);
  EXPECT_EQ(plan["stages"][1]["tokens_per_step"], 4 * 48);
  for (const char* file : {"step-align.svg", "step-distill.svg"}) {
    const std::string svg = read_file(shop / file);
    EXPECT_EQ(svg.rfind("<svg", 0), 0u);
    EXPECT_EQ(svg.substr(svg.size() - 7), "</svg>\n");
  }
  testing::Listing after = testing::list_files(shop.path());
  for (const char* file : {"plan.json", "step-align.svg", "step-distill.svg"}) after.erase(file);
  EXPECT_EQ(after, before) << "more was written than asked for";
}

TEST_F(PlanCommand, NeedsNeitherWeightsNorData) {
  std::filesystem::remove(shop / "teacher/model.safetensors");
  std::filesystem::remove(shop / "train.h5");
  std::filesystem::remove(shop / "validation.h5");
  EXPECT_TRUE(succeeds(shop.run(command({}))));
}

TEST_F(PlanCommand, PlansAStudentOfTheDatasVocabulary) {
  const std::vector<std::string> own{"plan", "teacher.toml", "--set", "student.model.vocabulary=0"};
  EXPECT_TRUE(succeeds(shop.run(own)));
  std::filesystem::remove(shop / "train.h5");
  EXPECT_TRUE(fails_with(5, {"train.h5"}, shop.run(own)));
}

TEST_F(PlanCommand, ImpossibleMeshesAreTrainingsErrors) {
  const auto refused = [&](std::vector<std::string> more, std::initializer_list<std::string_view> parts) {
    testing::expect_refusal(shop, 3, parts, command(std::move(more)));
  };
  refused({"--ranks", "3", "--set", "mesh.pipeline=2"}, {"mesh.pipeline = 2", "number of ranks", "3"});
  refused({"--ranks", "4", "--set", "mesh.pipeline=4"}, {"mesh.pipeline = 4", "4 layers", "2"});
  refused({"--set", "mesh.sequence=5"}, {"stage 'align'", "sequence_length = 32", "multiple of 10"});
  refused({"--set", "mesh.data=3"}, {"stage 'align'", "batch_sequences = 4", "2 x 3"});
  refused({"--set", "mesh.pipeline=2", "--set", "pipeline.layers=[1,2]"}, {"[1, 2]", "sum of 2"});
  refused({"--set", "run.device=cuda"}, {"CPU-only"});
  // In one process both come to the same end.
  for (const char* setting : {"pipeline.schedule=zero_bubble", "stage.1.frozen=['nothing like it']"}) {
    const Outcome planned = shop.run(command({"--set", setting}));
    const Outcome trained = shop.run({"train", "job.toml", "--set", setting});
    EXPECT_TRUE(fails_with(3, {}, planned));
    EXPECT_EQ(planned.err, trained.err);
  }
}

TEST_F(PlanCommand, WrongOptions) {
  EXPECT_TRUE(fails_with(2, {"--gpus-per-node"}, shop.run(command({"--nodes", "2"}))));
  EXPECT_TRUE(fails_with(2, {"--ranks"}, shop.run(command({"--ranks", "0"}))));
  EXPECT_TRUE(fails_with(2, {"--ranks"}, shop.run(command({"--ranks", "2", "--nodes", "1", "--gpus-per-node", "2"}))));
  EXPECT_TRUE(fails_with(2, {"--tflops"}, shop.run(command({"--tflops", "-1"}))));
}

}  // namespace
}  // namespace deltapipe
