// A rank that stands still, and a rank that never comes: the others end within mesh.timeout_s and say what they were
// waiting for.
#include "tests/cli/mpi_job.h"

#include <chrono>
#include <csignal>
#include <regex>
#include <thread>

namespace deltapipe {
namespace {

namespace fs = std::filesystem;
using testing::Job;
using testing::Outcome;
using testing::settings;

// mpirun leaves a second between SIGTERM and SIGKILL; the rest is for a busy machine.
constexpr double longest_after_timeout_s = 30;

class JobSilence : public testing::JobTest {
 protected:
  testing::Words with_timeout(const testing::Words& mesh, double seconds) const {
    return train(testing::join(mesh, settings({"mesh.timeout_s=" + std::to_string(seconds)})));
  }
};

TEST_F(JobSilence, OfAStoppedRank) {
  prepare(400, 20, 0);
  struct Case {
    int rank;
    testing::Words mesh;
  };
  const Case cases[] = {{0, settings({"mesh.pipeline=2", "mesh.sequence=2"})},
                        {3, settings({"mesh.pipeline=4", "pipeline.teacher=ahead"})}};
  for (const Case& c : cases) {
    const fs::path where = folder("rank-" + std::to_string(c.rank));
    Job job(4, with_timeout(c.mesh, 3), where);
    ASSERT_TRUE(job.wait_until([&] { return steps_done(where) >= 3; }));
    ASSERT_TRUE(job.kill(c.rank, SIGSTOP));
    const Outcome o = job.wait();
    EXPECT_EQ(o.code, 8) << o;
    EXPECT_LT(job.seconds(), 3 + longest_after_timeout_s) << o;
    const auto lines = testing::error_lines(o);
    ASSERT_GE(lines.size(), 1u) << o;
    bool named = false;
    for (const std::string& line : lines) {
      // OPERATION (PURPOSE) on axis AXIS, PLACE: world rank R has waited 3 s for world rank(s) ...
      const std::regex shape(
          R"(error: \w+ \(\w+\) on axis \w+, .*step \d+: world rank (\d) has waited 3 s for world ranks? ([\d, ]+))");
      std::smatch match;
      ASSERT_TRUE(std::regex_match(line, match, shape)) << line << "\n" << o;
      EXPECT_NE(match[1], std::to_string(c.rank)) << "the stopped rank was woken and blames others\n" << o;
      named |= match[2].str().find(std::to_string(c.rank)) != std::string::npos;
    }
    EXPECT_TRUE(named) << "no rank names the one that stands still\n" << o;
  }
}

TEST_F(JobSilence, WhileTheJobStarts) {
  prepare(400, 20, 0);
  for (const int wait_ms : {0, 30}) {
    Job job(2, with_timeout(settings({"mesh.sequence=2"}), 4), folder("start"));
    ASSERT_GT(job.pid_of(1), 0);
    std::this_thread::sleep_for(std::chrono::milliseconds(wait_ms));
    ASSERT_TRUE(job.kill(1, SIGSTOP));
    const Outcome o = job.wait();
    EXPECT_EQ(o.code, 8) << o;
    EXPECT_LT(job.seconds(), 4 + longest_after_timeout_s) << o;
    // mpirun wakes the stopped rank before it ends it: that rank may find its own time over and say so too.
    const auto lines = testing::error_lines(o);
    EXPECT_TRUE(lines.size() == 1 || lines.size() == 2) << o;
    for (const std::string& line : lines) EXPECT_NE(line.find("has waited 4 s for"), std::string::npos) << o;
  }
}

// mpirun takes a process that ends well without MPI for a finished one.
TEST_F(JobSilence, OfARankThatNeverStartsMpi) {
  prepare(4, 4, 0);
  const Outcome o =
      Job(testing::mpirun(2, 1, "exit 0"), with_timeout(settings({"mesh.sequence=2"}), 3), folder("missing")).wait();
  EXPECT_TRUE(testing::job_fails_with(8, {"MPI_Init has waited 3 s"}, o));
}

}  // namespace
}  // namespace deltapipe
