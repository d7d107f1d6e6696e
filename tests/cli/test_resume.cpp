// A run that is stopped and goes on ends in the very bits of one that was never stopped.
#include "checkpoints/training_checkpoint.h"
#include "core/random.h"
#include "tests/cli/workshop.h"

#include <gtest/gtest.h>

#include <chrono>
#include <csignal>
#include <string>
#include <thread>

namespace deltapipe {
namespace {

namespace fs = std::filesystem;
using testing::expect_same_checkpoint;
using testing::Outcome;
using testing::Process;
using testing::read_metrics;
using testing::run;
using testing::succeeds;
using testing::Workshop;

std::uint64_t fresh_seed() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch().count();
  return static_cast<std::uint64_t>(now);
}

fs::path metrics_of(const fs::path& folder) { return folder / "runs/job/metrics.jsonl"; }
fs::path checkpoints_of(const fs::path& folder) { return folder / "runs/job/checkpoints"; }

class Resume : public ::testing::Test {
 protected:
  Workshop shop;
  const std::string job = shop.text("job.toml");

  /// The uninterrupted run, in its own working directory.
  fs::path run_whole(const std::vector<std::string>& more = {}) const {
    const fs::path folder = shop / "whole";
    fs::create_directories(folder);
    std::vector<std::string> command{"train", job};
    command.insert(command.end(), more.begin(), more.end());
    EXPECT_TRUE(succeeds(run(command, {.folder = folder})));
    return folder;
  }

  void expect_same_run(const fs::path& a, const fs::path& b) const {
    expect_same_checkpoint(newest_checkpoint(checkpoints_of(a)).value(), newest_checkpoint(checkpoints_of(b)).value());
    EXPECT_EQ(read_metrics(metrics_of(a)), read_metrics(metrics_of(b)));
  }

  /// Starts the job, sends `signal` once its metrics show `steps` steps. False when it ended before.
  bool run_and_signal(const fs::path& folder, int steps, int signal, Outcome& outcome) const {
    Process process({"train", job, "--resume", "auto"}, {.folder = folder});
    while (!process.has_ended() && testing::count_steps(metrics_of(folder)) < steps) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    const bool running = !process.has_ended();
    process.kill(signal);
    outcome = process.wait();
    return running;
  }
};

// From a checkpoint of every kind of place, with another number of threads.
TEST_F(Resume, FromAnyStepIsBitwiseTheWholeRun) {
  constexpr int align = 6, distill = 5;
  shop.write_job(align, distill, "[checkpoint]\nevery_steps = 1\nkeep = 100\n");
  const fs::path whole = run_whole();
  RandomStream random(fresh_seed(), "steps");
  for (const int step : {1, align - 1, align, align + 1, align + distill - 1, align + distill,
                         2 + static_cast<int>(random.next_below(align + distill - 3))}) {
    const fs::path folder = shop / ("from-" + std::to_string(step));
    fs::create_directories(checkpoints_of(folder));
    fs::copy_file(metrics_of(whole), metrics_of(folder), fs::copy_options::overwrite_existing);
    const std::string name = checkpoint_name(step);
    fs::copy(checkpoints_of(whole) / name, checkpoints_of(folder) / name, fs::copy_options::recursive);
    const Outcome o = run({"train", job, "--resume", "auto", "--set", "run.threads=1"}, {.folder = folder});
    ASSERT_TRUE(succeeds(o));
    EXPECT_EQ(o.err.find("warning"), std::string::npos) << o;
    expect_same_run(whole, folder);
    fs::remove_all(folder);
  }
}

// Checkpoints of later steps would be what --resume auto goes on from: they are in the way, and go when told to.
TEST_F(Resume, FromAnOlderCheckpointThanTheNewest) {
  shop.write_job(2, 3, "[checkpoint]\nevery_steps = 1\nkeep = 100\n");
  const fs::path whole = run_whole(), folder = shop / "older", older = checkpoints_of(folder) / checkpoint_name(3);
  fs::copy(whole, folder, fs::copy_options::recursive);
  const std::vector<std::string> command{"train", job, "--resume", older.string()};
  EXPECT_TRUE(
      testing::fails_with(2, {checkpoint_name(5), checkpoint_name(3), "--restart"}, run(command, {.folder = folder})));
  expect_same_run(whole, folder);  // nothing has changed

  std::vector<std::string> shorter = command;
  shorter.insert(shorter.end(), {"--restart", "--set", "stage.1.steps=2"});
  ASSERT_TRUE(succeeds(run(shorter, {.folder = folder})));
  EXPECT_EQ(newest_checkpoint(checkpoints_of(folder)), checkpoints_of(folder) / checkpoint_name(4));
  EXPECT_TRUE(fs::exists(older));

  std::vector<std::string> again = command;
  again.push_back("--restart");
  ASSERT_TRUE(succeeds(run(again, {.folder = folder})));
  expect_same_run(whole, folder);
}

// SIGTERM, SIGINT and SIGUSR1 at random steps of both stages: each leaves a checkpoint and exit status 0.
TEST_F(Resume, AfterSignalsIsBitwiseTheWholeRun) {
  constexpr int align = 25, distill = 25;
  shop.write_job(align, distill);
  const fs::path whole = run_whole();
  RandomStream random(fresh_seed(), "signals");
  const auto within = [&](int begin, int end) {
    return begin + static_cast<int>(random.next_below(static_cast<std::uint64_t>(end - begin)));
  };
  const fs::path folder = shop / "stopped";
  fs::create_directories(folder);
  int stopped = 0;
  const std::pair<int, int> plan[] = {
      {within(1, 12), SIGTERM}, {within(13, 20), SIGINT}, {align, SIGUSR1}, {within(align + 2, align + 18), SIGTERM}};
  for (const auto& [steps, signal] : plan) {
    Outcome o;
    const bool running = run_and_signal(folder, steps, signal, o);
    ASSERT_TRUE(succeeds(o));
    if (!running) break;
    ++stopped;
    EXPECT_NE(o.err.find("stopped by signal"), std::string::npos) << o;
    EXPECT_GE(read_state(newest_checkpoint(checkpoints_of(folder)).value()).step, steps) << o;
  }
  EXPECT_GE(stopped, 1) << "the run was always over before the signal came";
  ASSERT_TRUE(succeeds(run({"train", job, "--resume", "auto"}, {.folder = folder})));
  expect_same_run(whole, folder);
  // Nothing is left to do: the same again changes nothing.
  ASSERT_TRUE(succeeds(run({"train", job, "--resume", "auto"}, {.folder = folder})));
  expect_same_run(whole, folder);
}

TEST_F(Resume, AfterSigkillGoesOnFromTheLastCheckpoint) {
  constexpr int align = 15, distill = 15;
  shop.write_job(align, distill, "[checkpoint]\nevery_steps = 4\n");
  const fs::path whole = run_whole();
  RandomStream random(fresh_seed(), "kills");
  const fs::path folder = shop / "killed";
  fs::create_directories(folder);
  int killed = 0;
  for (const int begin : {1, 9, 17}) {
    Outcome o;
    if (!run_and_signal(folder, begin + static_cast<int>(random.next_below(6)), SIGKILL, o)) break;
    killed += o.signal == SIGKILL;
  }
  EXPECT_GE(killed, 1) << "the run was always over before the signal came";
  ASSERT_TRUE(succeeds(run({"train", job, "--resume", "auto"}, {.folder = folder})));
  expect_same_run(whole, folder);
  for (const auto& [name, content] : testing::list_files(checkpoints_of(folder))) {
    EXPECT_EQ(name.find(".partial"), std::string::npos) << name;
  }
}

TEST_F(Resume, RestartBeginsAnew) {
  shop.write_job(4, 3);
  const fs::path whole = run_whole();
  const auto metrics = read_metrics(metrics_of(whole));
  const fs::path last = newest_checkpoint(checkpoints_of(whole)).value();
  fs::copy(last, shop / "kept", fs::copy_options::recursive);
  const Outcome o = run({"train", job, "--restart"}, {.folder = whole});
  ASSERT_TRUE(succeeds(o));
  EXPECT_EQ(o.err.find("resumed"), std::string::npos) << o;
  EXPECT_EQ(read_metrics(metrics_of(whole)), metrics) << "lines of the run before are left";
  expect_same_checkpoint(last, shop / "kept");
}

TEST_F(Resume, OtherSettingsAreWarnedOf) {
  shop.write_job(4, 3, "[checkpoint]\nevery_steps = 2\n");
  const fs::path whole = run_whole();
  for (const char* change : {"run.seed=4", "stage.1.learning_rate=1e-3"}) {
    const Outcome o = run({"train", job, "--resume", "auto", "--set", change}, {.folder = whole});
    EXPECT_TRUE(succeeds(o));
    EXPECT_NE(o.err.find("warning"), std::string::npos) << o;
  }
  const Outcome same = run({"train", job, "--resume", "auto", "--set", "log.every_steps=2", "--set", "run.threads=1"},
                           {.folder = whole});
  EXPECT_EQ(same.err.find("warning"), std::string::npos) << same;
}

}  // namespace
}  // namespace deltapipe
