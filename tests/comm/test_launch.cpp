#include "comm/mpi_runtime.h"

#include <gtest/gtest.h>

#include <map>
#include <string>

namespace deltapipe {
namespace {

Launch launch_of(const std::map<std::string, std::string>& environment) {
  return detect_launch([&](const char* name) {
    const auto it = environment.find(name);
    return it == environment.end() ? nullptr : it->second.c_str();
  });
}

TEST(Launch, AloneWithoutLauncher) {
  EXPECT_FALSE(launch_of({}).mpi);
  EXPECT_FALSE(launch_of({{"OMPI_MCA_mpi_yield_when_idle", "1"}, {"SLURM_NTASKS", "8"}}).mpi);
}

TEST(Launch, LaunchersAreSeen) {
  const Launch mpirun = launch_of({{"OMPI_COMM_WORLD_SIZE", "4"}, {"PMIX_RANK", "0"}});
  EXPECT_TRUE(mpirun.mpi);
  EXPECT_EQ(mpirun.ranks, 4);
  const Launch srun = launch_of({{"PMIX_RANK", "0"}, {"SLURM_STEP_NUM_TASKS", "16"}});
  EXPECT_TRUE(srun.mpi);
  EXPECT_EQ(srun.ranks, 16);
  EXPECT_TRUE(launch_of({{"PMI_RANK", "1"}, {"PMI_SIZE", "2"}}).mpi);
}

TEST(Launch, TasksWithoutMpiAreSeen) {  // srun without --mpi=pmix: every task would be a world of its own
  const Launch launch = launch_of({{"SLURM_STEP_NUM_TASKS", "2"}});
  EXPECT_FALSE(launch.mpi);
  EXPECT_EQ(launch.ranks, 2);
}

TEST(Runtime, OneProcessNeedsNoMpi) {
  MpiRuntime runtime;
  EXPECT_EQ(runtime.rank(), 0);
  EXPECT_EQ(runtime.size(), 1);
  EXPECT_EQ(runtime.local_rank(), 0);
  EXPECT_EQ(runtime.local_size(), 1);
  EXPECT_EQ(runtime.split(0, 0, "sequence")->size(), 1);
  EXPECT_NO_THROW(runtime.agree("1.0", 7));
}

TEST(Runtime, LauncherWithoutMpiIsAnError) {
  ASSERT_EQ(setenv("SLURM_STEP_NUM_TASKS", "2", 1), 0);
  std::string message;
  try {
    MpiRuntime runtime;
  } catch (const CommunicationError& e) {
    message = e.what();
  }
  unsetenv("SLURM_STEP_NUM_TASKS");
  EXPECT_EQ(message,
            "the launcher started 2 ranks but MPI sees 1: start with the mpirun of the same MPI, or srun --mpi=pmix");
}

}  // namespace
}  // namespace deltapipe
