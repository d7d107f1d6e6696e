// The configurations that come with the program: `deltapipe config` reads them and prints what it would read again.
#include "core/config.h"
#include "tests/cli/process.h"
#include "tests/data/testing.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <string>
#include <vector>

namespace deltapipe {
namespace {

namespace fs = std::filesystem;
using testing::Outcome;
using testing::run;
using testing::succeeds;

std::vector<fs::path> config_files() {
  std::vector<fs::path> files;
  for (const auto& e : fs::directory_iterator(DELTAPIPE_CONFIGS)) {
    if (e.path().extension() == ".toml") files.push_back(e.path());
  }
  return files;
}

TEST(ConfigFiles, PrintAndReadBackEqual) {
  const testing::TemporaryFolder folder;
  const auto files = config_files();
  ASSERT_GE(files.size(), 3u);
  for (const fs::path& file : files) {
    const Outcome first = run({"config", file.string()});
    ASSERT_TRUE(succeeds(first));
    EXPECT_EQ(first.err, "") << first;
    EXPECT_EQ(parse_config(first.out, "printed"), load_config(file)) << file;
    const Outcome second = run({"config", testing::write_text(folder / "printed.toml", first.out).string()});
    ASSERT_TRUE(succeeds(second));
    EXPECT_EQ(second.out, first.out) << file;
  }
}

TEST(ConfigFiles, OverridesShowInWhatIsPrinted) {
  for (const fs::path& file : config_files()) {
    const Outcome o = run({"config", file.string(), "--set", "run.seed=41", "--set", "stage.0.learning_rate=0.125"});
    ASSERT_TRUE(succeeds(o));
    const Config config = parse_config(o.out, "printed");
    EXPECT_EQ(config.run.seed, 41);
    EXPECT_EQ(config.stages[0].learning_rate, 0.125);
    EXPECT_NE(o.out.find("\nseed = 41\n"), std::string::npos) << o;
  }
}

// What the recipes are: a change here is a decision.
TEST(ConfigFiles, HoldTheRecipes) {
  const Config afm = load_config(fs::path(DELTAPIPE_CONFIGS) / "afm-4.5b-kda-nope.toml");
  EXPECT_EQ(afm.student.mixers, (std::vector<std::string>{"kda", "kda", "kda", "nope"}));
  ASSERT_EQ(afm.stages.size(), 2u);
  EXPECT_EQ(afm.stages[0].sequence_length, 2048);
  EXPECT_EQ(afm.stages[1].sequence_length, 32768);
  EXPECT_EQ(afm.stages[0].frozen.size(), 5u);
  EXPECT_TRUE(afm.stages[1].frozen.empty());
  for (const StageConfig& s : afm.stages) {
    EXPECT_EQ(s.loss.ce, 0.2);
    EXPECT_EQ(s.loss.kl, 0.2);
    EXPECT_EQ(s.loss.hidden_cosine, 0.6);
    EXPECT_EQ(s.temperature, 2.0);
  }
  const Config quick = load_config(fs::path(DELTAPIPE_CONFIGS) / "quickstart.toml");
  ASSERT_EQ(quick.stages.size(), 2u);
  EXPECT_EQ(quick.stages[0].loss.mixer_mse, 1.0);
  EXPECT_EQ(quick.stages[1].loss.kl, 1.0);
}

}  // namespace
}  // namespace deltapipe
