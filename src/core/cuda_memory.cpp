#include "core/cuda_memory.h"

#include "core/error.h"

#include <cuda_runtime_api.h>

namespace deltapipe::cuda_memory {
namespace {

/// The largest pitch that cudaMemcpy2D takes on every device.
constexpr std::size_t largest_pitch = 0x7fffffff;

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  fail<InternalError>("{}: CUDA error {}: {}", call, cudaGetErrorName(status), cudaGetErrorString(status));
}

cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }
cudaEvent_t event_of(void* event) { return static_cast<cudaEvent_t>(event); }

double mebibytes(std::size_t bytes) { return static_cast<double>(bytes) / (1 << 20); }

/// Makes a device current for a scope.
class DeviceScope {
 public:
  explicit DeviceScope(int index) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != index) set_device(index);
  }
  ~DeviceScope() { cudaSetDevice(before_); }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = 0;
};

}  // namespace

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // no driver or no device: not an error of a later call
    return 0;
  }
  return count;
}

std::string describe_device(int index) {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
  return properties.name;
}

void set_device(int index) {
  const int count = device_count();
  if (index < 0 || index >= count) {
    fail<UsageError>("there is no cuda:{}: this process sees {} CUDA device{}", index, count, count == 1 ? "" : "s");
  }
  check(cudaSetDevice(index), "cudaSetDevice");
}

void* allocate(int index, std::size_t bytes, const std::string& purpose) {
  const DeviceScope scope(index);
  void* p = nullptr;
  const cudaError_t status = cudaMalloc(&p, bytes);
  if (status == cudaSuccess) return p;
  cudaGetLastError();  // reported here, not by the next launch
  if (status != cudaErrorMemoryAllocation) check(status, "cudaMalloc");
  std::size_t available = 0, total = 0;
  check(cudaMemGetInfo(&available, &total), "cudaMemGetInfo");
  fail<MemoryError>("cannot allocate {:.1f} MiB for {} on cuda:{}: {:.1f} of {:.1f} MiB are free", mebibytes(bytes),
                    purpose, index, mebibytes(available), mebibytes(total));
}

std::size_t memory_in_use(int index) {
  const DeviceScope scope(index);
  std::size_t available = 0, total = 0;
  check(cudaMemGetInfo(&available, &total), "cudaMemGetInfo");
  return total - available;
}

std::size_t memory_size(int index) {
  const DeviceScope scope(index);
  std::size_t available = 0, total = 0;
  check(cudaMemGetInfo(&available, &total), "cudaMemGetInfo");
  return total;
}

void release(int index, void* memory) noexcept {
  // Errors mean that the device or the driver has gone, and the memory with it.
  int before = 0;
  cudaGetDevice(&before);
  cudaSetDevice(index);
  cudaFree(memory);
  cudaSetDevice(before);
}

void page_lock(void* memory, std::size_t bytes, const std::string& purpose) {
  const cudaError_t status = cudaHostRegister(memory, bytes, cudaHostRegisterPortable);
  if (status == cudaSuccess) return;
  cudaGetLastError();
  fail<MemoryError>("cannot page-lock {:.1f} MiB of host memory for {}: {}", mebibytes(bytes), purpose,
                    cudaGetErrorString(status));
}

void page_unlock(void* memory) noexcept { cudaHostUnregister(memory); }

void copy(void* stream, std::size_t bytes, const void* from, void* to) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_of(stream)), "cudaMemcpyAsync");
}

void copy_rows(void* stream, std::size_t rows, std::size_t width, const void* from, std::size_t from_pitch, void* to,
               std::size_t to_pitch) {
  if (from_pitch >= width && to_pitch >= width && from_pitch <= largest_pitch && to_pitch <= largest_pitch) {
    check(cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, width, rows, cudaMemcpyDeviceToDevice, stream_of(stream)),
          "cudaMemcpy2DAsync");
    return;
  }
  for (std::size_t i = 0; i < rows; ++i) {
    copy(stream, width, static_cast<const std::byte*>(from) + i * from_pitch,
         static_cast<std::byte*>(to) + i * to_pitch);
  }
}

void synchronize(void* stream) { check(cudaStreamSynchronize(stream_of(stream)), "cudaStreamSynchronize"); }

void* create_stream(int index, bool urgent) {
  const DeviceScope scope(index);
  int lowest = 0, highest = 0;
  check(cudaDeviceGetStreamPriorityRange(&lowest, &highest), "cudaDeviceGetStreamPriorityRange");
  cudaStream_t stream = nullptr;
  // Non-blocking: no hidden order with the legacy default stream.
  check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, urgent ? highest : lowest),
        "cudaStreamCreateWithPriority");
  return stream;
}

void destroy_stream(void* stream) noexcept { cudaStreamDestroy(stream_of(stream)); }

void* create_event(int index, bool times) {
  const DeviceScope scope(index);
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, times ? cudaEventDefault : cudaEventDisableTiming),
        "cudaEventCreateWithFlags");
  return event;
}

void destroy_event(void* event) noexcept { cudaEventDestroy(event_of(event)); }

void record(void* event, void* stream) {
  check(cudaEventRecord(event_of(event), stream_of(stream)), "cudaEventRecord");
}

void make_wait(void* stream, void* event) {
  check(cudaStreamWaitEvent(stream_of(stream), event_of(event), 0), "cudaStreamWaitEvent");
}

bool reached(void* event) {
  const cudaError_t status = cudaEventQuery(event_of(event));
  if (status == cudaErrorNotReady) {
    cudaGetLastError();  // an answer, not an error
    return false;
  }
  check(status, "cudaEventQuery");
  return true;
}

void synchronize_event(void* event) { check(cudaEventSynchronize(event_of(event)), "cudaEventSynchronize"); }

float elapsed_ms(void* begin, void* end) {
  float ms = 0;
  check(cudaEventElapsedTime(&ms, event_of(begin), event_of(end)), "cudaEventElapsedTime");
  return ms;
}

}  // namespace deltapipe::cuda_memory
