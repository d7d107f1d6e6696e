// The stand-in itself: what it lets pass and what it refuses.
#include "core/device_memory.h"
#include "core/error.h"
#include "kernels/attention.h"
#include "kernels/linear.h"
#include "kernels/rms_norm.h"
#include "tests/gpu/stand_in/testing.h"
#include "tests/gpu/testing.h"

#include <nccl.h>

#include <array>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

namespace deltapipe {
namespace {

using testing::gpu;
using testing::gpu_stream;
using testing::OnDevice;
using testing::Owned;
using testing::StandIn;

/// Host memory that says it is on the device: the mistake that the stand-in is there to find.
class Disguised {
 public:
  Disguised(DType dtype, Shape shape) : tensor_(nullptr, dtype, shape, gpu()), memory_(tensor_.bytes()) {
    tensor_.data = memory_.data();
  }
  operator const Tensor&() const { return tensor_; }

 private:
  Tensor tensor_;
  std::vector<std::byte> memory_;
};

/// `call` must throw an error that contains `part`.
void expect_refusal(const std::function<void()>& call, const std::string& part) {
  try {
    call();
    ADD_FAILURE() << "nothing was refused; expected: " << part;
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
  }
}

using StandInDeathTest = StandIn;

TEST_F(StandInDeathTest, TheHostCannotTouchDeviceMemory) {
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  const OnDevice x(DType::f32, Shape{64});
  auto* element = static_cast<volatile float*>(x.tensor().data) + 5;
  EXPECT_DEATH({ *element = 1; }, "the host touches .*: device 0, 20 bytes into an allocation of 256");
  EXPECT_DEATH({ [[maybe_unused]] const float value = *element; }, "the host touches");
}

TEST_F(StandIn, CopiesStayInsideAllocations) {
  std::array<std::byte, 64> host{};
  host.fill(std::byte{7});
  void* device = nullptr;
  ASSERT_EQ(cudaMalloc(&device, 48), cudaSuccess);
  auto* bytes = static_cast<std::byte*>(device);
  EXPECT_EQ(cudaMemcpy(device, host.data(), 48, cudaMemcpyHostToDevice), cudaSuccess);
  EXPECT_EQ(cudaMemcpy(device, host.data(), 49, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemcpy(bytes + 1, host.data(), 48, cudaMemcpyDefault), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemcpy(host.data(), bytes - 1, 8, cudaMemcpyDeviceToHost), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemcpy(host.data(), device, 8, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemcpy(device, host.data(), 8, cudaMemcpyDeviceToDevice), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemset(device, 0, 49), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemset(host.data(), 0, 8), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemcpy2D(device, 16, host.data(), 20, 16, 3, cudaMemcpyHostToDevice), cudaSuccess);
  EXPECT_EQ(cudaMemcpy2D(device, 17, host.data(), 20, 16, 3, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemcpy2D(device, 15, host.data(), 20, 16, 3, cudaMemcpyHostToDevice), cudaErrorInvalidPitchValue);
  std::array<std::byte, 48> back{};
  EXPECT_EQ(cudaMemcpy(back.data(), device, 48, cudaMemcpyDefault), cudaSuccess);
  EXPECT_EQ(back[47], std::byte{7});
  EXPECT_EQ(cudaFree(bytes + 16), cudaErrorInvalidValue);
  EXPECT_EQ(cudaFree(device), cudaSuccess);
  EXPECT_EQ(cudaFree(device), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemcpy(device, host.data(), 8, cudaMemcpyHostToDevice), cudaErrorInvalidValue) << "freed";
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidValue);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
}

TEST_F(StandIn, ADeviceIsFullWhenItIsFull) {
  std::size_t available = 0, total = 0;
  ASSERT_EQ(cudaMemGetInfo(&available, &total), cudaSuccess);
  void *most = nullptr, *more = nullptr;
  ASSERT_EQ(cudaMalloc(&most, available), cudaSuccess);
  EXPECT_EQ(cudaMalloc(&more, 1), cudaErrorMemoryAllocation);
  EXPECT_EQ(cudaFree(most), cudaSuccess);
  std::size_t again = 0;
  ASSERT_EQ(cudaMemGetInfo(&again, &total), cudaSuccess);
  EXPECT_EQ(again, available);
}

TEST_F(StandIn, StreamsAndEventsMustLive) {
  cudaStream_t stream = nullptr, other = nullptr;
  cudaEvent_t event = nullptr, begin = nullptr;
  ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
  ASSERT_EQ(cudaSetDevice(1), cudaSuccess);
  ASSERT_EQ(cudaStreamCreate(&other), cudaSuccess);
  ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
  ASSERT_EQ(cudaEventCreate(&event), cudaSuccess);
  ASSERT_EQ(cudaEventCreate(&begin), cudaSuccess);
  EXPECT_EQ(cudaEventRecord(event, stream), cudaSuccess);
  EXPECT_EQ(cudaStreamWaitEvent(other, event, 0), cudaSuccess);
  EXPECT_EQ(cudaEventRecord(event, other), cudaErrorInvalidResourceHandle) << "of another device";
  float ms = 0;
  EXPECT_EQ(cudaEventElapsedTime(&ms, begin, event), cudaErrorInvalidResourceHandle) << "one was never recorded";
  EXPECT_EQ(cudaEventRecord(begin, stream), cudaSuccess);
  EXPECT_EQ(cudaEventElapsedTime(&ms, event, begin), cudaSuccess);
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
  EXPECT_EQ(cudaStreamSynchronize(stream), cudaErrorInvalidResourceHandle);
  EXPECT_EQ(cudaEventRecord(event, stream), cudaErrorInvalidResourceHandle);
  EXPECT_EQ(cudaEventDestroy(event), cudaSuccess);
  EXPECT_EQ(cudaEventQuery(event), cudaErrorInvalidResourceHandle);
  EXPECT_EQ(cudaEventDestroy(begin), cudaSuccess);
  EXPECT_EQ(cudaStreamDestroy(other), cudaSuccess);
}

TEST_F(StandIn, PageLockedMemoryIsKnown) {
  std::vector<std::byte> memory(4096);
  cudaPointerAttributes a{};
  ASSERT_EQ(cudaHostRegister(memory.data(), memory.size(), 0), cudaSuccess);
  EXPECT_EQ(cudaHostRegister(memory.data() + 8, 8, 0), cudaErrorHostMemoryAlreadyRegistered);
  ASSERT_EQ(cudaPointerGetAttributes(&a, memory.data() + 100), cudaSuccess);
  EXPECT_EQ(a.type, cudaMemoryTypeHost);
  EXPECT_EQ(cudaHostUnregister(memory.data()), cudaSuccess);
  EXPECT_EQ(cudaHostUnregister(memory.data()), cudaErrorHostMemoryNotRegistered);
  ASSERT_EQ(cudaPointerGetAttributes(&a, memory.data()), cudaSuccess);
  EXPECT_EQ(a.type, cudaMemoryTypeUnregistered);
  const OnDevice x(DType::f32, Shape{64});
  ASSERT_EQ(cudaPointerGetAttributes(&a, x.tensor().data), cudaSuccess);
  EXPECT_EQ(a.type, cudaMemoryTypeDevice);
}

TEST_F(StandIn, KernelsTakeDeviceMemory) {
  const Shape shape{3, 64};
  const OnDevice x(DType::bf16, shape), w(DType::bf16, Shape{64}), y(DType::bf16, shape), rstd(DType::f32, Shape{3});
  EXPECT_NO_THROW(kernels::rms_norm_forward(gpu_stream(), x, w, 1e-5f, y, rstd));
  const Disguised on_host(DType::bf16, shape);
  expect_refusal([&] { kernels::rms_norm_forward(gpu_stream(), on_host, w, 1e-5f, y, rstd); }, "host memory");
  Tensor gone;
  {
    const OnDevice freed(DType::bf16, shape);
    gone = freed;
  }
  expect_refusal([&] { kernels::rms_norm_forward(gpu_stream(), x, w, 1e-5f, gone, rstd); }, "is not allocated");
  const StreamOwner elsewhere({Device::Kind::cuda, 1});
  expect_refusal([&] { kernels::rms_norm_forward(elsewhere.get(), x, w, 1e-5f, y, rstd); },
                 "a stream of device 1 while device 0 is current");
}

TEST_F(StandIn, WorkOnTwoStreamsNeedsAnOrder) {
  const Shape shape{3, 64};
  const OnDevice x(DType::bf16, shape), w(DType::bf16, Shape{64}), y(DType::bf16, shape), rstd(DType::f32, Shape{3});
  const OnDevice arrived(DType::bf16, shape), result(DType::bf16, Shape{3, 3});
  const StreamOwner copying(gpu(), true);
  Event event(gpu());
  const auto normalize = [&] { kernels::rms_norm_forward(gpu_stream(), arrived, w, 1e-5f, y, rstd); };
  copy(copying.get(), x, arrived);
  expect_refusal(normalize, "on two streams");
  expect_refusal([&] { kernels::linear_forward(gpu_stream(), arrived, x, {}, result); }, "on two streams");
  event.record(copying.get());
  event.make_wait(gpu_stream());
  EXPECT_NO_THROW(normalize());
  EXPECT_NO_THROW(copy(copying.get(), arrived, x)) << "both read";
  expect_refusal([&] { copy(copying.get(), y, x); }, "on two streams");
  expect_refusal([&] { copy(copying.get(), x.tensor().at(0), w); }, "on two streams");
  synchronize(gpu_stream());
  EXPECT_NO_THROW(copy(copying.get(), y, x)) << "the host knows that the kernel is done";
  synchronize(copying.get());
}

TEST_F(StandIn, TheHostSeesCopiesWhenItHasWaited) {
  constexpr std::int64_t n = 64;
  Arena locked("batch", 4096);
  locked.page_lock();
  const Tensor there = locked.allocate(DType::f32, {n}, "x");
  Owned<double> values({n});
  values.fill(3);
  const OnDevice x(DType::f32, values);
  copy(gpu_stream(), x, there);
  EXPECT_TRUE(std::isnan(there.as<float>()[5]));
  synchronize(gpu_stream());
  EXPECT_EQ(there.as<float>()[5], 3);
  copy(gpu_stream(), there, x);
  there.as<float>()[5] = 4;
  expect_refusal([&] { synchronize(gpu_stream()); }, "changed before the host knew");
  copy(gpu_stream(), there, x);
  synchronize(gpu_stream());
  EXPECT_NO_THROW(there.as<float>()[5] = 5);
  // There and back on one stream, without a wait in between.
  copy(gpu_stream(), there, x);
  copy(gpu_stream(), x, there);
  copy(gpu_stream(), there, x);
  EXPECT_NO_THROW(synchronize(gpu_stream()));
  EXPECT_EQ(there.as<float>()[5], 5);
}

TEST_F(StandIn, ProductsTakeDeviceMemoryWithRoom) {
  const OnDevice x(DType::bf16, Shape{5, 64}), w(DType::bf16, Shape{32, 64}), y(DType::bf16, Shape{5, 32});
  EXPECT_NO_THROW(kernels::linear_forward(gpu_stream(), x, w, {}, y));
  const Disguised host_x(DType::bf16, Shape{5, 64}), host_y(DType::bf16, Shape{5, 32}), bias(DType::bf16, Shape{32});
  expect_refusal([&] { kernels::linear_forward(gpu_stream(), host_x, w, {}, y); }, "must be device memory");
  expect_refusal([&] { kernels::linear_forward(gpu_stream(), x, w, {}, host_y); }, "must be device memory");
  expect_refusal([&] { kernels::linear_forward(gpu_stream(), x, w, bias, y); }, "bias");
  const Tensor too_long(x.tensor().data, DType::bf16, {6, 64}, gpu());
  const OnDevice y_of_six(DType::bf16, Shape{6, 32});
  expect_refusal([&] { kernels::linear_forward(gpu_stream(), too_long, w, {}, y_of_six); }, "768 bytes");
}

TEST_F(StandIn, AttentionTakesDeviceMemoryWithRoom) {
  constexpr std::int64_t tokens = 128;
  const Shape queries{tokens, 2, 64}, keys{tokens, 1, 64};
  const OnDevice q(DType::bf16, queries), k(DType::bf16, keys), v(DType::bf16, keys), o(DType::bf16, queries);
  const OnDevice lse(DType::f32, Shape{2, tokens});
  Owned<std::int32_t> start({tokens});
  start.fill(0);
  const auto run = [&](const Tensor& some_k, const Tensor& some_o) {
    testing::with_planned_workspace([&](const Stream& s, Arena& workspace) {
      kernels::attention_forward(s, q, some_k, v, start, 0.125f, some_o, lse, workspace);
    });
  };
  EXPECT_NO_THROW(run(k, o));
  expect_refusal([&] { run(Disguised(DType::bf16, keys), o); }, "must be device memory");
  const Tensor shifted(static_cast<std::byte*>(o.tensor().data) + 16, DType::bf16, queries, gpu());
  expect_refusal([&] { run(k, shifted); }, "must be device memory");
}

TEST_F(StandIn, MessagesTakeDeviceMemoryWithRoom) {
  ncclUniqueId id;
  ncclComm_t comm = nullptr;
  ASSERT_EQ(ncclGetUniqueId(&id), ncclSuccess);
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  ASSERT_EQ(ncclCommInitRankConfig(&comm, 2, id, 1, &config), ncclSuccess);
  const OnDevice part(DType::f32, Shape{8}), whole(DType::f32, Shape{16});
  const Disguised on_host(DType::f32, Shape{8});
  auto* stream = static_cast<cudaStream_t>(gpu_stream().native());
  const auto gather = [&](const Tensor& from, const Tensor& to) {
    return ncclAllGather(from.data, to.data, 8, ncclFloat32, comm, stream);
  };
  EXPECT_EQ(gather(part, whole), ncclSuccess);
  EXPECT_EQ(gather(part, part), ncclInvalidArgument);
  EXPECT_EQ(gather(on_host, whole), ncclInvalidArgument);
  EXPECT_EQ(ncclSend(part.tensor().data, 8, ncclFloat32, 2, comm, stream), ncclInvalidArgument);
  const StreamOwner elsewhere(gpu());
  auto* other = static_cast<cudaStream_t>(elsewhere.get().native());
  EXPECT_EQ(ncclSend(part.tensor().data, 8, ncclFloat32, 0, comm, other), ncclSuccess);
  EXPECT_EQ(ncclRecv(part.tensor().data, 8, ncclFloat32, 0, comm, stream), ncclUnhandledCudaError)
      << "into what another stream sends";
  EXPECT_EQ(ncclCommDestroy(comm), ncclSuccess);
  EXPECT_EQ(gather(part, whole), ncclInvalidArgument);
}

}  // namespace
}  // namespace deltapipe
