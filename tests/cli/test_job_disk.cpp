// A disk that is full for one rank of a job.
#include "tests/cli/mpi_job.h"

namespace deltapipe {
namespace {

namespace fs = std::filesystem;
using testing::Job;
using testing::job_fails_with;
using testing::Outcome;
using testing::settings;
using testing::succeeds;
using testing::Words;

class JobDisk : public testing::JobTest {
 protected:
  /// The rank's files may not grow beyond `bytes` after some steps.
  void fill_and_resume(const std::string& name, int rank, const Words& mesh, std::string_view file,
                       std::uint64_t bytes) const {
    const fs::path where = folder(name), run = run_of(where);
    Job job(4, train(mesh), where);
    ASSERT_TRUE(job.wait_until([&] { return steps_done(where) >= 6; }));
    job.limit_file_size(rank, bytes);
    const Outcome o = job.wait();
    EXPECT_TRUE(job_fails_with(5, {"runs/job", file, "File too large"}, o));
    testing::expect_whole_checkpoints(run);
    int whole = 0;
    for (const auto& e : fs::directory_iterator(run / "checkpoints")) {
      const bool is_step = e.path().filename().string().starts_with("step-");
      EXPECT_TRUE(is_step) << "left over: " << e.path() << "\n" << o;
      whole += is_step;
    }
    EXPECT_GE(whole, 1) << o;
    ASSERT_TRUE(succeeds(Job(4, train(mesh), where).wait()));
    expect_same_run(shop / "whole", where);
  }
};

TEST_F(JobDisk, FullForOneRank) {
  prepare(20, 10, 1);
  const Words mesh = settings({"mesh.pipeline=2", "mesh.sequence=2"});
  run_whole(4, mesh);
  fill_and_resume("rank-3", 3, mesh, "rank-00003.h5", 4000);
  fill_and_resume("rank-0", 0, mesh, "", 2000);  // whichever of its files comes first
}

// With messages of the next step under way.
TEST_F(JobDisk, FullWhileTheTeacherIsAhead) {
  prepare(20, 10, 1);
  const Words mesh = settings({"mesh.pipeline=4", "pipeline.schedule=zero_bubble", "pipeline.teacher=ahead"});
  run_whole(4, mesh);
  fill_and_resume("rank-2", 2, mesh, "rank-00002.h5", 4000);
}

}  // namespace
}  // namespace deltapipe
