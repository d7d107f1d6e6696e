// What the stand-in's own tests share.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstring>

namespace deltapipe::testing {

/// The name by which the stand-in's devices can be told from real ones.
inline bool runs_on_stand_in() {
  cudaDeviceProp properties{};
  return cudaGetDeviceProperties(&properties, 0) == cudaSuccess && std::strstr(properties.name, "stand-in") != nullptr;
}

/// Skips elsewhere: what is done here would spoil a real device's context.
class StandIn : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!runs_on_stand_in()) GTEST_SKIP() << "the stand-in is not preloaded";
    cudaGetLastError();
  }
};

}  // namespace deltapipe::testing
