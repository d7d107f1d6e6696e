// same_checkpoint FOLDER FOLDER: exit status 0 when two checkpoints hold the same bits. For tests written in shell.
#include "tests/cli/workshop.h"

#include <gtest/gtest.h>

#include <cstdio>

namespace {

char** folders = nullptr;

TEST(Checkpoints, AreTheSame) { deltapipe::testing::expect_same_checkpoint(folders[0], folders[1]); }

}  // namespace

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  if (argc != 3) {
    std::fprintf(stderr, "usage: same_checkpoint FOLDER FOLDER\n");
    return 2;
  }
  folders = argv + 1;
  return RUN_ALL_TESTS();
}
