// A job of several ranks that is asked to stop, by a signal to any rank or to all of them.
#include "checkpoints/training_checkpoint.h"
#include "tests/cli/mpi_job.h"

#include <csignal>
#include <string>

namespace deltapipe {
namespace {

namespace fs = std::filesystem;
using testing::Job;
using testing::Outcome;
using testing::settings;
using testing::succeeds;

constexpr int every_rank = -1;
struct Stop {
  int after_steps, rank, signal;
};

class JobSignals : public testing::JobTest {
 protected:
  /// Stops the run where `stops` say, resumes it each time, and compares it with one that was never stopped.
  void stop_and_resume(int ranks, const testing::Words& mesh, std::initializer_list<Stop> stops) const {
    const fs::path whole = run_whole(ranks, mesh), stopped = folder("stopped");
    int count = 0;
    for (const Stop& stop : stops) {
      Job job(ranks, train(mesh), stopped);
      if (!job.wait_until([&] { return steps_done(stopped) >= stop.after_steps; })) break;
      for (int rank = 0; rank < ranks; ++rank) {
        const bool meant = stop.rank == rank || stop.rank == every_rank;
        ASSERT_TRUE(!meant || job.kill(rank, stop.signal));
      }
      const Outcome o = job.wait();
      ASSERT_TRUE(succeeds(o));
      const std::string line = "stopped by signal " + std::to_string(stop.signal);
      if (o.err.find("finished after") != o.err.npos) break;
      EXPECT_NE(o.err.find(line), o.err.npos) << o;
      EXPECT_GE(read_state(testing::last_checkpoint(run_of(stopped))).step, stop.after_steps) << o;
      ++count;
    }
    EXPECT_GE(count, 1) << "the run was always over before the signal came";
    ASSERT_TRUE(succeeds(Job(ranks, train(mesh), stopped).wait()));
    expect_same_run(whole, stopped);
  }
};

TEST_F(JobSignals, AtAnyRankOrAll) {
  prepare(20, 20, 0);
  stop_and_resume(4, settings({"mesh.pipeline=2", "mesh.sequence=2"}),
                  {{1, 3, SIGTERM},
                   {5, 1, SIGUSR1},
                   {10, 0, SIGUSR1},
                   {15, 2, SIGTERM},
                   {22, every_rank, SIGTERM},
                   {27, every_rank, SIGUSR1}});
}

// What the teacher has done for the next step is dropped, and done again.
TEST_F(JobSignals, WhileTheTeacherIsAhead) {
  prepare(14, 20, 0);
  stop_and_resume(4, settings({"mesh.pipeline=4", "pipeline.schedule=zero_bubble", "pipeline.teacher=ahead"}),
                  {{3, 2, SIGUSR1}, {18, 3, SIGTERM}});
}

}  // namespace
}  // namespace deltapipe
