// Jobs that cannot work: meshes that fit neither ranks nor models, and ranks that are not alike. One line and one exit
// status for the whole job, and nothing left behind.
#include "core/file.h"
#include "tests/cli/mpi_job.h"

#include <fmt/format.h>

#include <fstream>

namespace deltapipe {
namespace {

namespace fs = std::filesystem;
using testing::Job;
using testing::job_fails_with;
using testing::mpirun;
using testing::Outcome;
using testing::settings;
using testing::Words;

class JobRefusals : public testing::JobTest {
 protected:
  JobRefusals() { prepare(4, 4, 1); }

  void refuse(int code, std::initializer_list<std::string_view> parts, const Words& launcher, const Words& command) {
    const Outcome o = Job(launcher, command, folder("run")).wait();
    EXPECT_TRUE(job_fails_with(code, parts, o));
    EXPECT_TRUE(testing::list_files(folder("run")).empty()) << "something was left\n" << o;
  }
  void refuse_mesh(int ranks, std::initializer_list<std::string_view> parts, std::initializer_list<std::string> mesh) {
    refuse(3, parts, mpirun(ranks), train(settings(mesh)));
  }
  /// Rank 1 of two gets `more` on its command line.
  void refuse_other(int code, std::initializer_list<std::string_view> parts, const std::string& more) {
    refuse(code, parts, mpirun(2, 1, "set -- \"$@\" " + more), train());
  }
};

TEST_F(JobRefusals, MeshesThatDoNotFit) {
  refuse_mesh(4, {"mesh.pipeline = 3", "must divide", "4"}, {"mesh.pipeline=3"});
  refuse_mesh(2, {"mesh.sequence = 4", "number of ranks started, 2"}, {"mesh.sequence=4", "mesh.pipeline=2"});
  refuse_mesh(2, {"mesh.data = 1", "must be", "2"}, {"mesh.data=1"});
  refuse_mesh(1, {"needs 4 ranks", "mpirun -n 4"}, {"mesh.pipeline=2", "mesh.sequence=2"});
  refuse_mesh(2, {"mesh.pipeline", "sequence = 0", "at most one 0"}, {"mesh.pipeline=0", "mesh.sequence=0"});
  refuse_mesh(4, {"'align'", "sequence_length = 36", "multiple of 8"},
              {"mesh.sequence=4", "stage.0.sequence_length=36"});
  refuse_mesh(4, {"'distill'", "sequence_length = 8", "at least 3 tokens"},
              {"mesh.sequence=4", "mesh.layout=contiguous", "stage.1.sequence_length=8"});
  refuse_mesh(2, {"evaluation", "33"}, {"mesh.sequence=2", "eval.sequence_length=33"});
  refuse_mesh(4, {"'align'", "batch_sequences = 4", "2 x 4"}, {"mesh.data=4"});
  refuse_mesh(5, {"mesh.pipeline = 5", "5 layers", "has 4"}, {"mesh.pipeline=5"});
}

TEST_F(JobRefusals, PipelinesThatDoNotFit) {
  refuse_mesh(2, {"pipeline.layers", "[1, 1]", "a sum of 4"}, {"mesh.pipeline=2", "pipeline.layers=[1,1]"});
  refuse_mesh(2, {"pipeline.layers", "[2, 1, 1]", "2 virtual stages"}, {"mesh.pipeline=2", "pipeline.layers=[2,1,1]"});
  refuse_mesh(2, {"pipeline.layers.1", "integer 0"}, {"mesh.pipeline=2", "pipeline.layers=[4,0]"});
  refuse_mesh(2, {"pipeline.chunks", "interleaved"}, {"mesh.pipeline=2", "pipeline.chunks=2"});
  refuse_mesh(2, {"pipeline.chunks = 2", "mesh.pipeline of 2 or more"},
              {"pipeline.chunks=2", "pipeline.schedule=interleaved"});
  refuse_mesh(2, {"zero_bubble", "mesh.pipeline of 2 or more"}, {"pipeline.schedule=zero_bubble"});
  refuse_mesh(2, {"mesh.pipeline = 2 x pipeline.chunks = 3", "6 layers"},
              {"mesh.pipeline=2", "pipeline.schedule=interleaved", "pipeline.chunks=3"});
  refuse_mesh(2, {"hidden_layers", "different stages"}, {"mesh.pipeline=2", "stage.1.hidden_layers=[[0,3]]"});
}

TEST_F(JobRefusals, WrongCommandLinesAndFiles) {
  refuse(2, {"--frobnicate"}, mpirun(3), train({"--frobnicate"}));
  refuse(2, {"config"}, mpirun(2), {"train"});
  refuse(2, {"eval", "one process, 2 were started"}, mpirun(2), {"eval", "teacher", "--data", "validation.h5"});
  refuse(3, {"frob"}, mpirun(3), train(settings({"frob=1"})));
  refuse(5, {"nowhere"}, mpirun(3), train(settings({"teacher.path=nowhere"})));
  refuse(2, {"--restart", "--resume"}, mpirun(2), train({"--restart"}));
  refuse(5, {"missing"}, mpirun(2), {"train", shop.text("job.toml"), "--resume", "missing"});
}

TEST_F(JobRefusals, RanksThatDiffer) {
  refuse_other(8, {"rank 1", "another configuration than rank 0"}, "--set run.seed=5");
  refuse_other(8, {"rank 1", "another configuration than rank 0"}, "--set mesh.sequence=2");
  refuse_other(2, {"--frobnicate"}, "--frobnicate");
  refuse_other(3, {"frob"}, "--set frob=1");
  // The program with another version in it.
  std::string other = read_file(DELTAPIPE_BINARY);
  const std::string version = DELTAPIPE_VERSION;
  std::string next = version;
  next.front() = '9';
  std::size_t found = 0;
  for (std::size_t at = other.find(version); at != other.npos; at = other.find(version, at), ++found) {
    other.replace(at, version.size(), next);
  }
  ASSERT_GT(found, 0u);
  testing::write_text(shop / "other-deltapipe", other);
  fs::permissions(shop / "other-deltapipe", fs::perms::owner_all);
  refuse(8, {"rank 1 runs version " + next, "rank 0 version " + version},
         mpirun(2, 1, "shift; set -- " + shop.text("other-deltapipe") + " \"$@\""), train());
}

TEST_F(JobRefusals, FilesThatOneRankCannotRead) {
  // Each rank reads its working directory's files.
  const auto local = [&](const char* key, const char* file) {
    return train(settings({fmt::format("{}={}", key, file), "run.dir=" + shop.text("elsewhere")}));
  };
  const fs::path own = folder("own");
  fs::copy(shop / "teacher", own / "teacher");
  fs::copy(shop / "train.h5", own / "train.h5");
  const auto on_rank_1 = [&](const std::string& damage) { return mpirun(2, 1, damage); };
  const auto refuse_local = [&](int code, std::initializer_list<std::string_view> parts, const std::string& first,
                                const Words& command) {
    const Outcome o = Job(on_rank_1(first), command, own).wait();
    EXPECT_TRUE(job_fails_with(code, parts, o));
    EXPECT_FALSE(fs::exists(shop / "elsewhere")) << o;
  };
  const std::string bad = folder("bad").string();
  refuse_local(5, {"train.h5"}, "cd " + bad, local("data.train", "train.h5"));
  testing::write_text(shop / "bad/train.h5", read_file(shop / "train.h5").substr(0, 3000));
  refuse_local(4, {"train.h5"}, "cd " + bad, local("data.train", "train.h5"));
  fs::copy(shop / "teacher", shop / "bad/teacher");
  fs::resize_file(shop / "bad/teacher/model.safetensors", 1000);
  refuse_local(4, {"teacher"}, "cd " + bad, local("teacher.path", "teacher"));
}

TEST_F(JobRefusals, TwoJobsInOneFolder) {
  prepare(300000, 4, 0);  // longer than this test, whatever the machine
  const fs::path where = folder("run");
  Job first(2, train(settings({"mesh.sequence=2"})), where);
  ASSERT_TRUE(first.wait_until([&] { return steps_done(where) >= 1; }));
  const Words impatient = train(settings({"mesh.sequence=2", "mesh.timeout_s=2"}));
  EXPECT_TRUE(job_fails_with(2, {"runs/job", "in use by another job"}, Job(2, impatient, where).wait()));
  EXPECT_TRUE(testing::fails_with(2, {"in use by another job"},
                                  testing::run(train(settings({"mesh.timeout_s=1"})), {.folder = where})));
  ASSERT_TRUE(first.kill(0, SIGTERM));
  EXPECT_TRUE(testing::succeeds(first.wait()));
}

}  // namespace
}  // namespace deltapipe
