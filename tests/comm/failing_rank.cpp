// A test that fails on rank 1 alone: test_faults.sh checks that mpi_main.cpp says so and fails the job.
#include "tests/comm/testing.h"

namespace deltapipe {
namespace {

TEST(FailingRank, One) { EXPECT_NE(testing::runtime().rank(), 1); }

}  // namespace
}  // namespace deltapipe
