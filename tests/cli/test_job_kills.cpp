// A job whose ranks are killed, at any moment, ends by itself; restarted, it ends in the bits of an undisturbed one.
#include "core/random.h"
#include "tests/cli/mpi_job.h"

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <iostream>
#include <thread>

namespace deltapipe {
namespace {

namespace fs = std::filesystem;
using testing::Job;
using testing::Outcome;
using testing::settings;
using testing::succeeds;

constexpr int ranks = 4;
constexpr double longest_end_s =
    60;  // of a job with a killed rank: mpirun gives the others seconds, a busy machine more

class JobKills : public testing::JobTest {
 protected:
  static bool is_writing(const fs::path& run) {
    std::error_code error;
    for (const auto& e : fs::directory_iterator(run / "checkpoints", error)) {
      if (e.path().filename().string().ends_with(".partial")) return true;
    }
    return false;
  }

  /// Kills a random rank while it starts, computes, or a checkpoint is being written.
  static void kill_once(Job& job, const fs::path& where, RandomStream& random) {
    const auto pause = [&](std::uint64_t most_us) {
      std::this_thread::sleep_for(std::chrono::microseconds(random.next_below(most_us)));
    };
    const int first = steps_done(where);
    switch (random.next_below(4)) {
      case 0: pause(400'000); break;  // MPI starts, files are opened
      case 1:
        job.wait_until([&] { return steps_done(where) > first + 1; });
        pause(50'000);
        break;
      default:  // checkpoints are where files could be left half written
        job.wait_until([&] { return steps_done(where) > first; });
        job.wait_until([&] { return is_writing(run_of(where)); });
        pause(4'000);
    }
    job.kill(static_cast<int>(random.next_below(ranks)), SIGKILL);
  }

  void kill_and_restart(int kills, std::uint64_t seed) {
    prepare(8, 8, 1);
    const testing::Words mesh = settings({"mesh.pipeline=2", "mesh.sequence=2", "checkpoint.keep=3"});
    const fs::path whole = run_whole(ranks, mesh), killed = folder("killed");
    RandomStream random(seed, "kills");
    int done = 0;
    for (int attempt = 0; done < kills; ++attempt) {
      ASSERT_LT(attempt, 4 * kills) << "the run was over before the kill again and again";
      Job job(ranks, train(mesh), killed);
      kill_once(job, killed, random);
      const Outcome o = job.wait();
      EXPECT_LT(job.seconds(), longest_end_s) << o;
      testing::expect_whole_checkpoints(run_of(killed));
      if (o.code != 0) {
        ++done;
        EXPECT_TRUE(testing::error_lines(o).empty()) << "a killed rank is mpirun's to tell of\n" << o;
        continue;
      }
      expect_same_run(whole, killed);  // it was over: once more from the start
      fs::remove_all(run_of(killed));
    }
    ASSERT_TRUE(succeeds(Job(ranks, train(mesh), killed).wait()));
    expect_same_run(whole, killed);
    for (const auto& e : fs::directory_iterator(run_of(killed) / "checkpoints")) {
      EXPECT_TRUE(e.path().filename().string().starts_with("step-")) << "left over: " << e.path();
    }
  }
};

TEST_F(JobKills, SixRandomRanks) { kill_and_restart(6, 7); }

// Other moments each time: the seed is printed, and taken from the environment to see a failure again.
TEST_F(JobKills, ThirtyRandomRanks) {
  const char* given = std::getenv("DELTAPIPE_KILLS_SEED");
  const std::uint64_t seed =
      given != nullptr ? std::strtoull(given, nullptr, 10)
                       : static_cast<std::uint64_t>(std::chrono::system_clock::now().time_since_epoch().count());
  std::cout << "DELTAPIPE_KILLS_SEED=" << seed << std::endl;
  kill_and_restart(30, seed);
}

TEST_F(JobKills, WhileMpiStarts) {
  prepare(2, 2, 1);
  const testing::Words mesh = settings({"mesh.pipeline=2"});
  for (const int wait_ms : {0, 20, 80}) {
    Job job(2, train(mesh), folder("killed"));
    ASSERT_GT(job.pid_of(1), 0);
    std::this_thread::sleep_for(std::chrono::milliseconds(wait_ms));
    job.kill(1, SIGKILL);
    const Outcome o = job.wait();
    EXPECT_NE(o.code, 0) << o;
    EXPECT_LT(job.seconds(), longest_end_s) << o;
  }
  // A rank that is gone before it reaches the program.
  const Outcome o = Job(testing::mpirun(2, 1, "kill -KILL $$"), train(mesh), folder("killed")).wait();
  EXPECT_NE(o.code, 0) << o;
  const fs::path whole = run_whole(2, mesh);
  ASSERT_TRUE(succeeds(Job(2, train(mesh), folder("killed")).wait()));
  expect_same_run(whole, folder("killed"));
}

}  // namespace
}  // namespace deltapipe
