#include "tests/gpu/device.h"

#include <cstdlib>
#include <random>
#include <string>
#include <utility>

namespace deltapipe::testing {

Owned<double> round_to(DType dtype, const Owned<double>& values) {
  Owned<double> out(values.shape());
  for (std::int64_t i = 0; i < values.size(); ++i) {
    const auto x = static_cast<float>(values[i]);
    out[i] = static_cast<double>(dtype == DType::bf16 ? to_float(to_bfloat16(x)) : x);
  }
  return out;
}

namespace {

/// A memory checker sees reads of memory that nothing wrote only where nothing wrote the poison either.
void poison(void* memory, std::size_t bytes, cudaStream_t stream) {
  static const bool wanted = std::getenv("DELTAPIPE_TEST_UNPOISONED") == nullptr;
  if (wanted) check_cuda(cudaMemsetAsync(memory, 0xff, bytes, stream));
}

/// A copy of few bytes from pageable memory may still be on its way when the call returns, and the tests' streams do
/// not wait for the default one.
void copy_to_device(void* to, const void* from, std::size_t bytes) {
  check_cuda(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice));
  check_cuda(cudaDeviceSynchronize());
}

}  // namespace

OnDevice::OnDevice(DType dtype, Shape shape, std::int64_t shift) {
  const std::size_t size = size_of(dtype), bytes = static_cast<std::size_t>(shape.numel() + shift) * size;
  check_cuda(cudaMalloc(&memory_, bytes + 1));
  poison(memory_, bytes + 1, nullptr);
  check_cuda(cudaDeviceSynchronize());
  tensor_ = Tensor(static_cast<std::byte*>(memory_) + static_cast<std::size_t>(shift) * size, dtype, shape,
                   {Device::Kind::cuda, 0});
}

OnDevice::OnDevice(DType dtype, const Owned<double>& values, std::int64_t shift)
    : OnDevice(dtype, values.shape(), shift) {
  std::vector<std::uint8_t> raw(tensor_.bytes());
  for (std::int64_t i = 0; i < values.size(); ++i) {
    const auto single = static_cast<float>(values[i]);
    const auto n = static_cast<std::size_t>(i);
    switch (dtype) {
      case DType::bf16: reinterpret_cast<BFloat16*>(raw.data())[n] = to_bfloat16(single); break;
      case DType::f32: reinterpret_cast<float*>(raw.data())[n] = single; break;
      default: reinterpret_cast<double*>(raw.data())[n] = values[i]; break;
    }
  }
  copy_to_device(tensor_.data, raw.data(), raw.size());
}

OnDevice::OnDevice(const Owned<std::int32_t>& values) : OnDevice(DType::i32, values.shape()) {
  copy_to_device(tensor_.data, values.begin(), tensor_.bytes());
}

OnDevice::OnDevice(OnDevice&& other) noexcept
    : memory_(std::exchange(other.memory_, nullptr)), tensor_(std::exchange(other.tensor_, Tensor())) {}

OnDevice::~OnDevice() { cudaFree(memory_); }

std::vector<std::uint8_t> OnDevice::bytes() const {
  check_cuda(cudaDeviceSynchronize());
  std::vector<std::uint8_t> raw(tensor_.bytes());
  check_cuda(cudaMemcpy(raw.data(), tensor_.data, raw.size(), cudaMemcpyDeviceToHost));
  return raw;
}

Owned<double> OnDevice::host() const {
  const std::vector<std::uint8_t> raw = bytes();
  Owned<double> out(tensor_.shape);
  for (std::int64_t i = 0; i < out.size(); ++i) {
    const auto n = static_cast<std::size_t>(i);
    switch (tensor_.dtype) {
      case DType::bf16: out[i] = static_cast<double>(to_float(reinterpret_cast<const BFloat16*>(raw.data())[n])); break;
      case DType::f32: out[i] = static_cast<double>(reinterpret_cast<const float*>(raw.data())[n]); break;
      default: out[i] = reinterpret_cast<const double*>(raw.data())[n]; break;
    }
  }
  return out;
}

void CudaTest::SetUp() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) GTEST_SKIP() << "no CUDA device";
  check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  const char* fixed = std::getenv("DELTAPIPE_TEST_SEED");
  const std::uint64_t seed = fixed != nullptr ? std::stoull(fixed) : std::random_device{}();
  seed_ = seed;
  random_ = RandomStream(seed, "data");
}

void CudaTest::TearDown() {
  if (stream_ == nullptr) return;
  check_cuda(cudaStreamDestroy(stream_));
  if (HasFailure()) ADD_FAILURE() << "seed " << seed_ << " (set DELTAPIPE_TEST_SEED)";
}

Arena& CudaTest::workspace() {
  constexpr std::size_t bytes = std::size_t{64} << 20;
  static auto* arena =
      new Arena("test workspace", bytes, Device{Device::Kind::cuda, 0});  // lives as long as the process
  arena->reset();
  const auto scope = arena->scope();
  const Tensor all = arena->allocate(DType::u8, {static_cast<std::int64_t>(bytes)}, "everything");
  poison(all.data, bytes, stream_);
  return *arena;
}

}  // namespace deltapipe::testing
