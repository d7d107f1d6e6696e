// Helpers of the CUDA kernel tests: tensors in device memory that begin as NaN, and a fixture with a stream and a
// workspace.
#pragma once

#include "core/arena.h"
#include "core/stream.h"
#include "tests/kernels/testing.h"

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

namespace deltapipe::testing {

inline void check_cuda(cudaError_t status) {
  if (status != cudaSuccess) fail<InternalError>("CUDA: {}", cudaGetErrorString(status));
}

/// Rounds every value to `dtype` (float32 or bfloat16), so that host and device start from the same numbers.
Owned<double> round_to(DType dtype, const Owned<double>& values);

/// What a result may differ by, relatively: half the spacing of a bfloat16, 2^-8, which no rounded element exceeds; of
/// a float, its 2^-24 with room for the float sums and exponentials behind it, which bfloat16 results hide.
inline double rounding_error(DType dtype) { return dtype == DType::bf16 ? 0x1p-8 : 2e-6; }

/// A tensor on device 0 that owns its memory. New ones have every bit set: NaN in every floating type, -1 in int32;
/// with DELTAPIPE_TEST_UNPOISONED in the environment they are left as they come, for compute-sanitizer's initcheck.
class OnDevice {
 public:
  /// `shift` elements between an aligned address and the first.
  OnDevice(DType dtype, Shape shape, std::int64_t shift = 0);
  /// Rounded to `dtype`.
  OnDevice(DType dtype, const Owned<double>& values, std::int64_t shift = 0);
  explicit OnDevice(const Owned<std::int32_t>& values);
  ~OnDevice();
  OnDevice(OnDevice&& other) noexcept;
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  OnDevice& operator=(OnDevice&&) = delete;

  operator Tensor() const { return tensor_; }
  const Tensor& tensor() const { return tensor_; }
  /// Waits for the device.
  Owned<double> host() const;
  std::vector<std::uint8_t> bytes() const;

 private:
  void* memory_ = nullptr;
  Tensor tensor_;
};

/// Parameter: the dtype of models, float32 or bfloat16. Skipped where there is no device.
class CudaTest : public ::testing::TestWithParam<DType> {
 protected:
  void SetUp() override;
  void TearDown() override;

  Stream stream() const { return Stream::cuda(0, stream_); }
  /// 64 MiB of device memory, every bit of which is set at each call.
  Arena& workspace();
  DType dtype() const { return GetParam(); }
  Owned<double> normal(Shape shape, double scale = 1.0, double mean = 0.0) {
    return round_to(dtype(), Owned<double>(shape).normal(random_, scale, mean));
  }
  OnDevice upload(const Owned<double>& values, std::int64_t shift = 0) const { return {dtype(), values, shift}; }
  OnDevice poisoned(Shape shape, std::int64_t shift = 0) const { return {dtype(), shape, shift}; }

  /// Relative RMS error of results in dtype() that `roundings` of them explain.
  double tolerance(double roundings = 1) const { return roundings * rounding_error(dtype()); }

  RandomStream random_{0, 0};

 private:
  cudaStream_t stream_ = nullptr;
  std::uint64_t seed_ = 0;  // named when a test fails
};

inline auto model_dtypes() { return ::testing::Values(DType::bf16, DType::f32); }
inline std::string dtype_name(const ::testing::TestParamInfo<DType>& test) { return std::string(name_of(test.param)); }

/// Two calls must give the same bits in every tensor.
inline void expect_same_bits(const OnDevice& a, const OnDevice& b, const char* what) {
  EXPECT_EQ(a.bytes(), b.bytes()) << what;
}

}  // namespace deltapipe::testing
