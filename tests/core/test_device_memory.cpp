// The CPU's half of core/device_memory.h; tests/gpu has CUDA's.
#include "core/arena.h"
#include "core/device_memory.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <numeric>

namespace deltapipe {
namespace {

TEST(DeviceMemory, CopiesOnTheCpu) {
  std::array<float, 6> from{}, to{};
  std::iota(from.begin(), from.end(), 1.0f);
  copy(Stream::cpu(), Tensor(from.data(), DType::f32, {2, 3}), Tensor(to.data(), DType::f32, {6}));
  EXPECT_EQ(from, to);
  copy_rows(Stream::cpu(), 2, sizeof(float), from.data() + 1, 3 * sizeof(float), to.data(), 2 * sizeof(float));
  EXPECT_EQ(to, (std::array<float, 6>{2, 2, 5, 4, 5, 6}));
}

TEST(DeviceMemory, ADryStreamCopiesNothing) {
  float from = 1, to = 2;
  copy(Stream::dry({}), Tensor(&from, DType::f32, {1}), Tensor(&to, DType::f32, {1}));
  copy_rows(Stream::dry({}), 1, sizeof(float), &from, sizeof(float), &to, sizeof(float));
  EXPECT_EQ(to, 2);
}

TEST(DeviceMemory, CopyRefusesOtherSizesAndTypes) {
  std::array<float, 2> a{}, b{};
  const Tensor x(a.data(), DType::f32, {2});
  EXPECT_THROW(copy(Stream::cpu(), x, Tensor(b.data(), DType::f32, {1})), InternalError);
  EXPECT_THROW(copy(Stream::cpu(), x, Tensor(b.data(), DType::i32, {2})), InternalError);
}

TEST(DeviceMemory, EventsOfTheCpuAreAlwaysReached) {
  const StreamOwner stream({});
  Event event({});
  event.record(stream.get());
  event.make_wait(stream.get());
  event.synchronize();
  EXPECT_TRUE(event.reached());
  EXPECT_TRUE(stream.get().device().is_cpu());
}

TEST(DeviceMemory, NamesDevices) {
  EXPECT_EQ(name_of(Device{}), "cpu");
  EXPECT_EQ(name_of(Device{Device::Kind::cuda, 3}), "cuda:3");
}

TEST(DeviceMemory, AMissingCudaDeviceIsAnError) {
  const Device none{Device::Kind::cuda, cuda_device_count()};
  EXPECT_THROW(set_device(none), UsageError);
  EXPECT_THROW(Arena("parameters", 256, none), UsageError);
  EXPECT_THROW(StreamOwner{none}, UsageError);
}

TEST(DeviceMemory, PageLockingKeepsAHostArenaUsable) {
  Arena arena("optimizer", 4096);
  arena.page_lock();  // does nothing where there is no CUDA device
  const Tensor t = arena.allocate(DType::f32, {8}, "x");
  std::fill_n(t.as<float>(), 8, 1.0f);
  Arena moved = std::move(arena);
  EXPECT_EQ(t.as<float>()[7], 1.0f);
  EXPECT_EQ(moved.used(), 256u);
}

}  // namespace
}  // namespace deltapipe
