#include "cli/commands.h"

#include "core/error.h"
#include "data/token_dataset.h"
#include "tests/data/testing.h"

#include <CLI/CLI.hpp>

#include <algorithm>

namespace deltapipe {
namespace {

using testing::TemporaryFolder;
using testing::write_text;

std::string run(std::vector<std::string> arguments) {  // what it prints
  CLI::App app;
  add_data_command(app);
  std::reverse(arguments.begin(), arguments.end());  // the order that CLI11 takes them in
  ::testing::internal::CaptureStdout();
  try {
    app.parse(arguments);
  } catch (...) {
    ::testing::internal::GetCapturedStdout();
    throw;
  }
  return ::testing::internal::GetCapturedStdout();
}

TEST(CommandData, ReadsItsOptions) {
  const TemporaryFolder folder;
  write_text(folder / "in/a.txt", "one");
  write_text(folder / "in/b.rst", "four");
  write_text(folder / "in/c.bin", "no");
  const std::string extra = write_text(folder / "extra.jsonl", "{\"body\": \"three\"}\n{\"body\": \"\"}\n").string();
  const std::string in = (folder / "in").string(), out = (folder / "t.h5").string(), v = (folder / "v.h5").string();
  const std::string printed = run({"data", "--out", out, "--field", "body", "--suffix", ".txt,.rst", in, extra});
  EXPECT_EQ(printed, out + ": 3 documents, 15 tokens, 12 bytes\nfrom 3 files, 1 empty documents left out\n");
  EXPECT_EQ(TokenDataset(out).documents(), 3u);

  run({"data", in, "--suffix", ".txt", "--suffix", ".rst", "--out", out, "--validation", v, "--validation-fraction",
       "0.5", "--seed", "3"});
  EXPECT_EQ(TokenDataset(out).documents(), 1u);
  EXPECT_EQ(TokenDataset(v).documents(), 1u);
}

TEST(CommandData, LetsErrorsThrough) {
  const TemporaryFolder folder;
  const std::string out = (folder / "t.h5").string();
  EXPECT_THROW(run({"data", "--out", out, (folder / "missing").string()}), IoError);
  EXPECT_THROW(run({"data", "--out", out}), CLI::ParseError);
  EXPECT_THROW(run({"data", "--out", out, "--validation-fraction", "0.1", out}), CLI::ParseError);
}

}  // namespace
}  // namespace deltapipe
