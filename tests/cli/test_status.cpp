// `deltapipe status`: the line by which launch scripts decide whether a run is finished.
#include "tests/cli/workshop.h"

#include <gtest/gtest.h>

#include <string>

namespace deltapipe {
namespace {

using testing::Outcome;
using testing::succeeds;
using testing::Workshop;

std::string status(const Workshop& shop, std::vector<std::string> more = {}) {
  std::vector<std::string> command{"status", "job.toml"};
  command.insert(command.end(), more.begin(), more.end());
  const Outcome o = shop.run(std::move(command));
  EXPECT_TRUE(succeeds(o));
  return o.out;
}

TEST(Status, FollowsTheRun) {
  const Workshop shop;
  shop.write_job(4, 3, "[checkpoint]\nevery_steps = 2\nkeep = 100\n");
  EXPECT_EQ(status(shop), "unfinished 0/7 -\n");
  ASSERT_TRUE(succeeds(shop.run({"train", "job.toml"})));
  EXPECT_EQ(status(shop), "finished 7/7 runs/job/checkpoints/step-00000007\n");
  // More steps than the run has done; and all steps of a stage that is not the last.
  EXPECT_EQ(status(shop, {"--set", "stage.1.steps=4"}), "unfinished 7/8 runs/job/checkpoints/step-00000007\n");
  for (const char* name : {"step-00000007", "step-00000006"}) {
    ASSERT_GT(std::filesystem::remove_all(shop / "runs/job/checkpoints" / name), 0u);
  }
  EXPECT_EQ(status(shop), "unfinished 4/7 runs/job/checkpoints/step-00000004\n");
  EXPECT_EQ(status(shop, {"--set", "run.dir=elsewhere"}), "unfinished 0/7 -\n");
}

TEST(Status, LeavesEverythingAsItWas) {
  const Workshop shop;
  testing::expect_refusal(shop, 5, {"nowhere.toml"}, {"status", "nowhere.toml"});
  testing::expect_refusal(shop, 3, {"run.nonsense"}, {"status", "teacher.toml", "--set", "run.nonsense=1"});
}

}  // namespace
}  // namespace deltapipe
