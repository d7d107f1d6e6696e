// A flipped byte anywhere in a checkpoint is seen by every command that reads it.
#include "checkpoints/training_checkpoint.h"
#include "core/file.h"
#include "core/random.h"
#include "tests/cli/workshop.h"

#include <string>
#include <vector>

namespace deltapipe {
namespace {

namespace fs = std::filesystem;
using testing::expect_refusal;
using testing::Outcome;
using testing::succeeds;
using testing::Workshop;
using testing::write_text;

class BadCheckpoints : public ::testing::Test {
 protected:
  BadCheckpoints() {
    shop.write_job(2, 2);
    EXPECT_TRUE(succeeds(shop.run({"train", "job.toml"})));
  }
  Workshop shop;
  const std::string folder = "runs/job/checkpoints";
  const std::string checkpoint = folder + "/step-00000004";
};

TEST_F(BadCheckpoints, AFlippedByteIsSeenByEveryReader) {
  for (const std::string file : {"rank-00000.h5", "checkpoint.h5", "manifest.json"}) {
    const fs::path path = shop / checkpoint / file;
    const std::string good = read_file(path);
    RandomStream random(20, file);
    const std::uint64_t places[] = {0, random.next_below(good.size()), random.next_below(good.size()), good.size() - 1};
    std::size_t reader = 0;  // the commands take turns over the places; each meets every file
    for (const std::uint64_t place : places) {
      SCOPED_TRACE(file + " byte " + std::to_string(place));
      std::string bad = good;
      bad[place] = static_cast<char>(bad[place] ^ (1 << random.next_below(8)));
      write_text(path, bad);
      // `auto` looks for any whole checkpoint: what is wrong with this one is told in a warning.
      switch (reader++) {
        case 0:
          expect_refusal(shop, 4, {folder, "none of them is whole"}, {"train", "job.toml", "--resume", "auto"});
          break;
        case 1: expect_refusal(shop, 4, {checkpoint}, {"train", "job.toml", "--resume", checkpoint}); break;
        case 2: expect_refusal(shop, 4, {checkpoint}, {"eval", checkpoint, "--without-teacher"}); break;
        default: expect_refusal(shop, 4, {checkpoint}, {"export", checkpoint, "--out", "copy"});
      }
    }
    write_text(path, good);
  }
  EXPECT_TRUE(succeeds(shop.run({"export", checkpoint, "--out", "copy"}))) << "every byte was put back";
}

TEST_F(BadCheckpoints, MissingAndCutFilesAreSeen) {
  for (const std::string file : {"rank-00000.h5", "checkpoint.h5", "manifest.json"}) {
    SCOPED_TRACE(file);
    const fs::path path = shop / checkpoint / file;
    const std::string good = read_file(path);
    write_text(path, std::string_view(good).substr(0, good.size() / 2));
    expect_refusal(shop, 4, {checkpoint}, {"export", checkpoint, "--out", "copy"});
    expect_refusal(shop, 4, {"none of them is whole"}, {"train", "job.toml", "--resume", "auto"});
    expect_refusal(shop, 5, {"no whole checkpoint"}, {"eval", folder + "/latest", "--without-teacher"});
    fs::remove(path);
    expect_refusal(shop, file == "manifest.json" ? 5 : 4, {checkpoint}, {"export", checkpoint, "--out", "copy"});
    write_text(path, good);
  }
}

// An older whole one is taken, and it is said why.
TEST_F(BadCheckpoints, AutoPassesOverDamagedOnes) {
  ASSERT_TRUE(succeeds(shop.run({"train", "job.toml", "--restart", "--set", "checkpoint.every_steps=2"})));
  const fs::path path = shop / checkpoint / "rank-00000.h5";
  const std::string good = read_file(path);
  std::string flipped = good;
  flipped[good.size() / 2] = static_cast<char>(flipped[good.size() / 2] ^ 4);
  for (const std::string& bad : {good.substr(0, good.size() / 2), flipped}) {
    write_text(path, bad);
    const Outcome o = shop.run({"train", "job.toml", "--resume", "auto"});
    EXPECT_TRUE(succeeds(o));
    EXPECT_NE(o.err.find("passed over"), std::string::npos) << o;
    EXPECT_NE(o.err.find("resumed from runs/job/checkpoints/step-00000002"), std::string::npos) << o;
    EXPECT_NO_THROW(CheckpointReader(shop / checkpoint)) << "the run has written it anew";
  }
}

}  // namespace
}  // namespace deltapipe
