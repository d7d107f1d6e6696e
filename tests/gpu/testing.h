// Helpers of the GPU tests: tensors in device memory that start as NaN, and runs with exactly the workspace that a dry
// run asked for. Reference values are Owned<double>.
#pragma once

#include "core/device_memory.h"
#include "tests/kernels/testing.h"

#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

namespace deltapipe::testing {

inline Device gpu() { return {Device::Kind::cuda, 0}; }

/// The tests' stream: not the default one, so that work on a wrong stream is seen.
inline Stream gpu_stream() {
  static auto& owner = *new StreamOwner(gpu());
  return owner.get();
}

/// Rounds values to what `dtype` (float32 or bfloat16) holds.
inline void round_to(DType dtype, Owned<double>& x) {
  for (double& value : x) {
    const auto f = static_cast<float>(value);
    value = static_cast<double>(dtype == DType::bf16 ? to_float(to_bfloat16(f)) : f);
  }
}

/// A tensor that owns device memory. Every byte is 0xff until written: NaN in any float, -1 in an integer.
class OnDevice {
 public:
  OnDevice(DType dtype, Shape shape, Device device = gpu())
      : tensor_(nullptr, dtype, shape, device), bytes_(std::max<std::size_t>(tensor_.bytes(), 1)) {
    tensor_.data = allocate_memory(device, bytes_, "a test");
    poison();
  }
  /// Holds x, rounded to `dtype`.
  OnDevice(DType dtype, const Owned<double>& x, Device device = gpu()) : OnDevice(dtype, x.shape(), device) {
    write(x);
  }
  ~OnDevice() { release_memory(tensor_.device, tensor_.data, bytes_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  const Tensor& tensor() const { return tensor_; }
  operator const Tensor&() const { return tensor_; }

  void poison() { upload(std::vector<std::byte>(tensor_.bytes(), std::byte{0xff})); }
  void write(const Owned<double>& x) {
    std::vector<std::byte> bytes(tensor_.bytes());
    for (std::int64_t i = 0; i < x.size(); ++i) {
      std::byte* at = bytes.data() + static_cast<std::size_t>(i) * size_of(tensor_.dtype);
      if (tensor_.dtype == DType::bf16) {
        const BFloat16 value = to_bfloat16(static_cast<float>(x[i]));
        std::memcpy(at, &value, sizeof value);
      } else if (tensor_.dtype == DType::f32) {
        const auto value = static_cast<float>(x[i]);
        std::memcpy(at, &value, sizeof value);
      } else {
        const double value = x[i];
        std::memcpy(at, &value, sizeof value);
      }
    }
    upload(bytes);
  }
  /// After everything queued on the tests' stream.
  Owned<double> host() const {
    const std::vector<std::byte> bytes = raw();
    Owned<double> out(tensor_.shape);
    for (std::int64_t i = 0; i < out.size(); ++i) {
      const std::byte* at = bytes.data() + static_cast<std::size_t>(i) * size_of(tensor_.dtype);
      if (tensor_.dtype == DType::bf16) {
        BFloat16 value;
        std::memcpy(&value, at, sizeof value);
        out[i] = static_cast<double>(to_float(value));
      } else if (tensor_.dtype == DType::f32) {
        float value;
        std::memcpy(&value, at, sizeof value);
        out[i] = static_cast<double>(value);
      } else {
        std::memcpy(&out[i], at, sizeof(double));
      }
    }
    return out;
  }
  std::vector<std::byte> raw() const {
    std::vector<std::byte> bytes(tensor_.bytes());
    const auto n = static_cast<std::int64_t>(bytes.size());
    copy(gpu_stream(), Tensor(tensor_.data, DType::u8, {n}, tensor_.device), Tensor(bytes.data(), DType::u8, {n}));
    synchronize(gpu_stream());
    return bytes;
  }

 private:
  void upload(const std::vector<std::byte>& bytes) {
    const auto n = static_cast<std::int64_t>(bytes.size());
    auto* from = const_cast<std::byte*>(bytes.data());
    copy(gpu_stream(), Tensor(from, DType::u8, {n}), Tensor(tensor_.data, DType::u8, {n}, tensor_.device));
    synchronize(gpu_stream());
  }

  Tensor tensor_;
  std::size_t bytes_;
};

/// Runs `f` dry to learn its workspace, then for real in an arena of that size filled with NaN, and waits for it.
inline void with_planned_workspace(const std::function<void(const Stream&, Arena&)>& f) {
  Arena measured = Arena::measuring("workspace", gpu());
  f(Stream::dry(gpu()), measured);
  EXPECT_EQ(measured.used(), 0u);
  Arena real("workspace", measured.peak(), gpu());
  if (real.capacity() > 0) {
    std::vector<std::byte> nan(real.capacity(), std::byte{0xff});
    const auto n = static_cast<std::int64_t>(nan.size());
    copy(gpu_stream(), Tensor(nan.data(), DType::u8, {n}), real.allocate(DType::u8, {n}, "all"));
    synchronize(gpu_stream());
    real.reset();
  }
  f(gpu_stream(), real);
  synchronize(gpu_stream());
  EXPECT_EQ(real.used(), 0u);
}

/// Skips where there is no GPU; fresh random data, its seed in the test's record.
template <class Base = ::testing::Test>
class GpuTest : public Base {
 protected:
  void SetUp() override {
    if (cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
    set_device(gpu());
    const std::uint64_t seed = std::random_device{}();
    ::testing::Test::RecordProperty("seed", std::to_string(seed));
    random = RandomStream(seed, "GPU test");
  }
  Owned<double> normal(DType dtype, Shape shape, double scale = 1.0) {
    Owned<double> x(shape);
    x.normal(random, scale);
    round_to(dtype, x);
    return x;
  }
  RandomStream random{0, "GPU test"};
};

}  // namespace deltapipe::testing
