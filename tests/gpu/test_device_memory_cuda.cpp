// CUDA's half of core/device_memory.h, and of core/trace.h.
#include "core/trace.h"
#include "tests/gpu/testing.h"

#include <algorithm>
#include <numeric>

namespace deltapipe {
namespace {

using testing::gpu;
using testing::gpu_stream;
using testing::OnDevice;

class DeviceMemoryCuda : public testing::GpuTest<> {};

TEST_F(DeviceMemoryCuda, ArenasOnTheDeviceAreCopiedToAndFrom) {
  constexpr std::int64_t n = 1001;
  Arena device("parameters", 1 << 16, gpu()), host("optimizer", 1 << 16);
  host.page_lock();
  const Tensor there = device.allocate(DType::f32, {n}, "x"), back = host.allocate(DType::f32, {n}, "y");
  std::vector<float> values(n);
  std::iota(values.begin(), values.end(), -3.5f);
  copy(gpu_stream(), Tensor(values.data(), DType::f32, {n}), there);
  copy(gpu_stream(), there, back);
  synchronize(gpu_stream());
  EXPECT_TRUE(std::equal(values.begin(), values.end(), back.as<float>()));
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(there.data) % Arena::alignment, 0u);
}

TEST_F(DeviceMemoryCuda, CopiesRows) {
  testing::Owned<double> x({4, 6});
  std::iota(x.begin(), x.end(), 0.0);
  const OnDevice from(DType::f32, x), to(DType::f32, Shape{4, 2});
  constexpr std::size_t element = sizeof(float);
  copy_rows(gpu_stream(), 4, 2 * element, static_cast<std::byte*>(from.tensor().data) + 3 * element, 6 * element,
            to.tensor().data, 2 * element);
  const testing::Owned<double> got = to.host();
  for (std::int64_t i = 0; i < 4; ++i) {
    EXPECT_EQ(got[2 * i], x[6 * i + 3]);
    EXPECT_EQ(got[2 * i + 1], x[6 * i + 4]);
  }
}

TEST_F(DeviceMemoryCuda, AnEventOrdersTwoStreams) {
  const StreamOwner second(gpu(), true);
  constexpr std::int64_t n = 1 << 24;  // long enough that without the event the second copy would overtake the first
  testing::Owned<double> x({n});
  x.fill(2);
  const OnDevice a(DType::f32, x), b(DType::f32, Shape{n}), c(DType::f32, Shape{n});
  Event copied(gpu());
  EXPECT_TRUE(copied.reached());  // never recorded
  copy(gpu_stream(), a, b);
  copied.record(gpu_stream());
  copied.make_wait(second.get());
  copy(second.get(), b, c);
  synchronize(second.get());
  EXPECT_TRUE(copied.reached());
  const testing::Owned<double> got = c.host();
  EXPECT_EQ(std::count(got.begin(), got.end(), 2.0), n);
}

class TraceCuda : public DeviceMemoryCuda {
 protected:
  void TearDown() override {
    trace::stop();
    trace::clear();
  }
  /// A span of the compute stream, of a copy that takes a while.
  static void copy_traced(const char* name, const Tensor& from, const Tensor& to) {
    const trace::Span span("copy", name, gpu_stream());
    copy(gpu_stream(), from, to);
  }
};

TEST_F(TraceCuda, SpansHaveTheDevicesTimes) {
  constexpr std::int64_t n = 1 << 26;
  const OnDevice a(DType::f32, Shape{n}), b(DType::f32, Shape{n});
  trace::reserve(16, gpu(), 16);
  trace::start(gpu_stream());
  const std::int64_t before = trace::now_ns();
  copy_traced("first", a, b);
  copy_traced("second", b, a);
  { const trace::Span host("host", "host"); }
  EXPECT_EQ(trace::events().size(), 1u) << "times of the device are known when it has been waited for";
  trace::settle(gpu_stream());
  const std::int64_t after = trace::now_ns();
  const auto events = trace::events();
  ASSERT_EQ(events.size(), 3u);
  EXPECT_FALSE(events[0].on_device);
  EXPECT_EQ(events[1].name, "first");
  EXPECT_EQ(events[2].name, "second");
  // Clocks are joined to a few microseconds, on a machine that does nothing else.
  constexpr std::int64_t slack = 1'000'000;
  EXPECT_GE(events[1].begin_ns, before - slack);
  EXPECT_LE(events[1].begin_ns, events[1].end_ns);
  EXPECT_GE(events[2].begin_ns, events[1].end_ns - 2000);  // float32 milliseconds
  EXPECT_LE(events[2].end_ns, after + slack);
}

TEST_F(TraceCuda, MarksAreUsedAgainAndCountedWhenThereAreNone) {
  const OnDevice a(DType::f32, Shape{64}), b(DType::f32, Shape{64});
  trace::reserve(100, gpu(), 4);
  trace::start(gpu_stream());
  for (int i = 0; i < 10; ++i) {
    copy_traced("copy", a, b);
    trace::settle(gpu_stream());
  }
  EXPECT_EQ(trace::events().size(), 10u);
  EXPECT_EQ(trace::dropped(), 0u);
  for (int i = 0; i < 3; ++i) copy_traced("copy", a, b);
  trace::settle(gpu_stream());
  EXPECT_EQ(trace::events().size(), 12u);
  EXPECT_EQ(trace::dropped(), 1u);
}

TEST_F(DeviceMemoryCuda, AFullDeviceIsAMemoryErrorThatNamesTheArena) {
  constexpr std::size_t petabyte = std::size_t{1} << 50;
  try {
    const Arena arena("activations", petabyte, gpu());
    FAIL() << "a petabyte was allocated";
  } catch (const MemoryError& e) {
    EXPECT_NE(std::string(e.what()).find("activations on cuda:0"), std::string::npos) << e.what();
  }
  EXPECT_NO_THROW(Arena("parameters", 4096, gpu()));  // nothing sticks
}

}  // namespace
}  // namespace deltapipe
