// Command lines and configurations that cannot work, and places that cannot be written to.
#include "tests/cli/workshop.h"

#include "core/file.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace deltapipe {
namespace {

namespace fs = std::filesystem;
using testing::expect_refusal;
using testing::fails_with;
using testing::Outcome;
using testing::run;
using testing::succeeds;
using testing::Workshop;
using testing::write_text;

TEST(BadSettings, WrongCommandLinesAreRefused) {
  const Workshop shop;
  shop.write_job(2, 2);
  expect_refusal(shop, 2, {"subcommand"}, {});
  expect_refusal(shop, 2, {"frobnicate"}, {"frobnicate"});
  expect_refusal(shop, 2, {"--frobnicate"}, {"train", "job.toml", "--frobnicate"});
  expect_refusal(shop, 2, {"extra"}, {"train", "job.toml", "extra"});
  expect_refusal(shop, 2, {"config"}, {"train"});
  expect_refusal(shop, 2, {"--out"}, {"export", "teacher"});
  expect_refusal(shop, 2, {"--set"}, {"train", "job.toml", "--set"});
  expect_refusal(shop, 2, {"--restart", "--resume"}, {"train", "job.toml", "--restart", "--resume", "auto"});
  expect_refusal(shop, 5, {"missing"}, {"train", "job.toml", "--resume", "missing"});
  expect_refusal(shop, 2, {"--data"}, {"eval", "teacher"});
  expect_refusal(shop, 2, {"float16"}, {"eval", "teacher", "--data", "validation.h5", "--dtype", "float16"});
  expect_refusal(shop, 2, {"float16"}, {"export", "teacher", "--out", "copy", "--dtype", "float16"});
  expect_refusal(shop, 2, {"not empty", "--overwrite"}, {"export", "teacher", "--out", "text"});
  expect_refusal(shop, 2, {"not a model folder"}, {"export", "teacher", "--out", "text", "--overwrite"});
  expect_refusal(shop, 2, {"text"}, {"export", "teacher", "--out", "copy", "--tokenizer", "text"});
  expect_refusal(shop, 5, {"none.json"}, {"export", "teacher", "--out", "copy", "--eval", "none.json"});
  expect_refusal(shop, 4, {"job.toml"}, {"export", "teacher", "--out", "copy", "--eval", "job.toml"});
  expect_refusal(shop, 2, {"--text", "--tokens"}, {"generate", "teacher"});
  expect_refusal(shop, 2, {"'2x'"}, {"generate", "teacher", "--tokens", "1,2x"});
  expect_refusal(shop, 4, {"258", "vocabulary"}, {"generate", "teacher", "--tokens", "1,258"});
  expect_refusal(shop, 4, {"-1", "vocabulary"}, {"logits", "teacher", "--tokens=-1", "--out", "z.npy"});
  expect_refusal(shop, 2, {"--tokens"}, {"logits", "teacher", "--out", "z.npy"});
}

TEST(BadSettings, WrongConfigurationsAreRefused) {
  const Workshop shop;
  shop.write_job(2, 2);
  const auto train = [](const std::string& set) { return std::vector<std::string>{"train", "job.toml", "--set", set}; };
  expect_refusal(shop, 3, {"run.sede", "seed"}, train("run.sede=1"));
  expect_refusal(shop, 3, {"--set run.seed"}, train("run.seed"));
  expect_refusal(shop, 3, {"run.seed", "\"x\""}, train("run.seed='x'"));
  expect_refusal(shop, 3, {"microbatch_sequences = 3", "batch_sequences = 4"}, train("stage.0.microbatch_sequences=3"));
  expect_refusal(shop, 3, {"mixer_mse", "alone"}, train("stage.0.loss.kl=1"));
  expect_refusal(shop, 3, {"teacher.path"}, train("teacher.path=''"));
  expect_refusal(shop, 3, {"stage 'distill'", "trains nothing"}, train("stage.1.frozen=['.']"));
  expect_refusal(shop, 3, {"stage 'align'", "'nomatch'"}, train("stage.0.frozen=['nomatch']"));
  expect_refusal(shop, 3, {"train.h5", "fewer", "100000"}, train("stage.0.sequence_length=100000"));
  expect_refusal(shop, 3, {"validation.h5", "fewer", "100000"}, train("eval.sequence_length=100000"));
  expect_refusal(shop, 3, {"[5, 0]", "hidden_layers"}, train("stage.1.hidden_layers=[[5,0]]"));
  expect_refusal(shop, 3, {"cuda"}, train("run.device=cuda"));
  expect_refusal(shop, 3, {"bfloat16"}, train("run.dtype=bfloat16"));
  expect_refusal(shop, 3, {"data.train"}, train("data.train=''"));
  expect_refusal(shop, 5, {"other.toml"}, {"train", "other.toml"});
  write_text(shop / "broken.toml", "[run]\nname = 'x'\n[run\n");
  expect_refusal(shop, 3, {"broken.toml:3"}, {"train", "broken.toml"});
  write_text(shop / "stageless.toml", "[teacher]\npath = 'teacher'\n[data]\ntrain = 'train.h5'\n");
  expect_refusal(shop, 3, {"[[stage]]"}, {"train", "stageless.toml"});
  expect_refusal(shop, 3, {"eval.needle", "room for"},
                 {"eval", "teacher", "--data", "validation.h5", "--set", "eval.needle.lengths=[10]"});
  expect_refusal(shop, 3, {"eval.needle", "validation.h5"},
                 {"eval", "teacher", "--data", "validation.h5", "--set", "eval.needle.lengths=[100000]"});
}

TEST(BadSettings, RunsAreNotOverwritten) {
  const Workshop shop;
  shop.write_job(2, 2);
  ASSERT_TRUE(succeeds(shop.run({"train", "job.toml"})));
  expect_refusal(shop, 2, {"runs/job/checkpoints", "--resume auto", "--restart"}, {"train", "job.toml"});
  // A restart that cannot begin removes nothing either.
  expect_refusal(shop, 5, {"nowhere"}, {"train", "job.toml", "--restart", "--set", "teacher.path='nowhere'"});
  // Another student cannot go on from these weights, and other trained parameters have no moments there.
  expect_refusal(shop, 3, {"step-00000004", "another model"},
                 {"train", "job.toml", "--resume", "auto", "--set", "student.mixers=['nope','kda']"});
}

TEST(BadSettings, UnwritablePlacesAreNamed) {
  const Workshop shop;
  shop.write_job(2, 2);
  write_text(shop / "file", "not a folder");
  expect_refusal(shop, 5, {"file/below"}, {"train", "job.toml", "--set", "run.dir=file/below"});
  expect_refusal(shop, 5, {"file/below"}, {"train", "job.toml", "--resume", "auto", "--set", "run.dir=file/below"});
  expect_refusal(shop, 5, {"file/below"}, {"init", "job.toml", "--out", "file/below"});
  expect_refusal(shop, 5, {"file/below"}, {"export", "teacher", "--out", "file/below"});
  expect_refusal(shop, 2, {"file"}, {"export", "teacher", "--out", "file"});
  expect_refusal(shop, 5, {"file/below.h5"}, {"data", "text", "--out", "file/below.h5"});
  expect_refusal(shop, 5, {"file/below.npy"}, {"logits", "teacher", "--tokens", "1", "--out", "file/below.npy"});
  const Outcome o = shop.run({"eval", "teacher", "--data", "validation.h5", "--json", "file/below.json"});
  EXPECT_EQ(o.code, 5) << o;
  EXPECT_NE(o.err.find("error: cannot create file/below.json"), std::string::npos) << o;
}

// ---------------------------------------------------------------------------------------------------------- full disks

/// What may stand in a run's folder after a failed write: never a part of a checkpoint.
void expect_no_parts(const std::vector<std::string>& names, const Outcome& o) {
  for (const std::string& name : names) {
    EXPECT_EQ(name.find(".partial"), std::string::npos) << name << "\n" << o;
    EXPECT_EQ(name.find(".tmp."), std::string::npos) << name << "\n" << o;
    EXPECT_EQ(name.find("step-"), std::string::npos) << name << "\n" << o;
  }
}

TEST(FullDisk, LeavesNothingHalfWritten) {
  const Workshop shop;
  shop.write_job(2, 2);
  testing::ProcessOptions limited = shop.here();
  limited.file_size_limit = 10'000;  // less than any of the files below
  const testing::Listing before = testing::list_files(shop.path());
  EXPECT_TRUE(fails_with(5, {"out.h5"}, run({"data", "text", "--out", "out.h5"}, limited)));
  EXPECT_TRUE(fails_with(5, {"copy"}, run({"export", "teacher", "--out", "copy"}, limited)));
  EXPECT_TRUE(fails_with(5, {"student-init"}, run({"init", "job.toml"}, limited)));
  EXPECT_EQ(testing::list_files(shop.path()), before);
  const Outcome train = run({"train", "job.toml"}, limited);
  EXPECT_TRUE(fails_with(5, {"runs/job"}, train));
  std::vector<std::string> names;
  for (const auto& [name, content] : testing::list_files(shop / "runs")) names.push_back(name);
  expect_no_parts(names, train);
  // With room again, the run begins as if nothing had been.
  ASSERT_TRUE(succeeds(shop.run({"train", "job.toml", "--resume", "auto"})));
}

TEST(FullDisk, OfASmallFileSystem) {
  const Workshop shop;
  shop.write_job(2, 2);
  fs::create_directories(shop / "disk");
  testing::ProcessOptions small = shop.here();
  small.small_disk = shop / "disk";
  small.small_disk_bytes = 32768;  // no room for weights, nor for a checkpoint beside config.toml
  const std::vector<std::vector<std::string>> commands{{"data", "text", "--out", "disk/out.h5"},
                                                       {"export", "teacher", "--out", "disk/copy"},
                                                       {"train", "job.toml", "--set", "run.dir=disk/job"}};
  for (const auto& command : commands) {
    const Outcome o = run(command, small);
    if (o.code == 77) GTEST_SKIP() << "mounting a file system takes root";
    EXPECT_TRUE(fails_with(5, {"disk/"}, o));
    std::vector<std::string> names;
    for (std::size_t at = o.out.find("entry "); at != std::string::npos; at = o.out.find("entry ", at + 1)) {
      names.push_back(o.out.substr(at + 6, o.out.find('\n', at) - at - 6));
    }
    expect_no_parts(names, o);
    EXPECT_TRUE(command[0] == "train" || names.empty()) << o;
  }
}

}  // namespace
}  // namespace deltapipe
