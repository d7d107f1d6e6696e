// A whole small job, command after command.
#include "core/file.h"
#include "tests/cli/workshop.h"

#include <nlohmann/json.hpp>

#include <cmath>
#include <limits>
#include <string>

namespace deltapipe {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using testing::fails_with;
using testing::Outcome;
using testing::succeeds;
using testing::Workshop;

TEST(Job, FromTextToAnExportThatIsTheCheckpoint) {
  const Workshop shop;
  // A teacher that has learnt something.
  ASSERT_TRUE(succeeds(shop.run({"train", "teacher.toml", "--set", "stage.0.steps=80"})));
  ASSERT_TRUE(succeeds(shop.run({"export", "runs/teacher/checkpoints/latest", "--out", "teacher", "--overwrite"})));
  shop.write_job(20, 30);
  const Outcome init = shop.run({"init", "job.toml"});
  ASSERT_TRUE(succeeds(init));
  EXPECT_NE(init.out.find("runs/job/student-init"), std::string::npos) << init;
  const auto eval = [&](const std::string& model, const std::string& file) {
    const Outcome o = shop.run({"eval", model, "--config", "job.toml", "--set", "eval.tokens=480", "--json", file});
    EXPECT_TRUE(succeeds(o));
    return json::parse(read_file(shop / file));
  };
  const json start = eval("runs/job/student-init", "start.json");

  const Outcome train = shop.run({"train", "job.toml"});
  ASSERT_TRUE(succeeds(train));
  EXPECT_EQ(train.out, "") << "what a run says goes to standard error";
  EXPECT_NE(train.err.find("finished after 50 steps"), std::string::npos) << train;
  const auto metrics = testing::read_metrics(shop / "runs/job/metrics.jsonl");
  // Before the first step, every five steps; step 20 ends a stage and is a fifth one at the same time.
  const auto evaluations = std::count_if(metrics.begin(), metrics.end(),
                                         [](const std::string& line) { return line.find("\"eval\"") != line.npos; });
  EXPECT_EQ(evaluations, 1 + 10);
  EXPECT_EQ(metrics.size(), 50u + 11u);
  const json first_step = json::parse(metrics[1]), last_step = json::parse(metrics[metrics.size() - 2]);
  EXPECT_EQ(first_step["stage"], "align");
  EXPECT_EQ(last_step["stage"], "distill");
  EXPECT_EQ(last_step["tokens"], 20 * 4 * 32 + 30 * 4 * 48);
  EXPECT_EQ(last_step["skipped"], 0);

  const json trained = eval("runs/job/checkpoints/latest", "trained.json");
  EXPECT_LT(trained["kl"].get<double>(), 0.5 * start["kl"].get<double>());
  EXPECT_EQ(trained["teacher_perplexity"], start["teacher_perplexity"]);
  // Twelve bits a letter or so would be no learning: the teacher beats a uniform guess of 258 by far.
  EXPECT_LT(trained["teacher_perplexity"].get<double>(), 60.0);

  ASSERT_TRUE(
      succeeds(shop.run({"export", "runs/job/checkpoints/latest", "--out", "student", "--eval", "trained.json"})));
  json loaded = eval("student", "loaded.json"), wanted = trained;
  loaded.erase("model");
  wanted.erase("model");
  EXPECT_EQ(loaded, wanted) << "the export computes other numbers than the checkpoint";
  for (const char* file :
       {"config.json", "model.safetensors", "README.md", "tokenizer.json", "modeling_arcee_kda.py"}) {
    EXPECT_TRUE(fs::exists(shop / "student" / file)) << file;
  }
  for (const std::string path : {"train.h5", "student", "runs/job/checkpoints", "runs/job/checkpoints/latest"}) {
    const Outcome o = shop.run({"inspect", path});
    EXPECT_TRUE(succeeds(o));
    EXPECT_NE(o.out, "") << o;
  }
  const Outcome text = shop.run({"generate", "student", "--text", "the gate", "--count", "7"});
  EXPECT_TRUE(succeeds(text));
  EXPECT_LE(text.out.size(), 8u) << text;
}

TEST(Job, StopsWhenNothingIsFiniteAnyMore) {
  const Workshop shop;
  shop.write_job(6, 6, "[checkpoint]\nevery_steps = 2\n");
  const auto train = [&](const std::string& resume) {
    return shop.run({"train", "job.toml", "--resume", resume, "--set", "stage.1.learning_rate=1e30", "--set",
                     "optimizer.max_skipped_steps=3", "--set", "stage.1.warmup=0", "--set", "stage.1.steps=30"});
  };
  const Outcome o = train("none");
  EXPECT_TRUE(fails_with(7, {"not finite", "3 steps in a row", "stage 'distill'"}, o));
  EXPECT_NE(o.err.find("SKIPPED"), std::string::npos) << o;
  std::vector<json> steps;
  for (const std::string& line : testing::read_metrics(shop / "runs/job/metrics.jsonl")) {
    if (line.find("stage_step") != line.npos) steps.push_back(json::parse(line));
  }
  ASSERT_GE(steps.size(), 6u + 1u + 3u) << o;
  const std::size_t n = steps.size();
  for (std::size_t i = 0; i < n; ++i) {
    const bool skipped = i + 3 >= n;
    EXPECT_EQ(steps[i]["skipped"], skipped ? static_cast<int>(i + 4 - n) : 0) << steps[i];
    EXPECT_EQ(steps[i]["gradient_norm"].is_null(), skipped) << steps[i];
  }
  // Resuming does not forget how many were skipped in a row.
  const std::string last = fs::path(testing::run({"inspect", shop.text("runs/job/checkpoints")}).out).string();
  EXPECT_NE(last.find("skipped steps"), std::string::npos);
  EXPECT_TRUE(fails_with(7, {"not finite", "3 steps in a row"}, train("auto")));
}

}  // namespace
}  // namespace deltapipe
