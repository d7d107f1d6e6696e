// The CUDA runtime without its kernels: devices, memory, copies, streams, events, errors. Work is done when its call
// returns.
#include "tests/gpu/stand_in/order.h"
#include "tests/gpu/stand_in/stand_in.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <map>
#include <set>

struct CUstream_st {
  int device;
  bool is_blocking;
};

struct CUevent_st {
  int device;
  bool times;
  bool recorded = false;
  std::chrono::steady_clock::time_point at;
  deltapipe::stand_in::Clock clock;  // what it comes after
};

namespace deltapipe::stand_in {
namespace {

thread_local int device_of_thread = 0;
thread_local cudaError_t last_error = cudaSuccess;

std::set<cudaStream_t>& streams() {
  static auto& all = *new std::set<cudaStream_t>();
  return all;
}

std::set<cudaEvent_t>& events() {
  static auto& all = *new std::set<cudaEvent_t>();
  return all;
}

/// Page-locked host memory: begin -> bytes, and whether it was allocated here.
struct Locked {
  std::size_t bytes;
  bool is_ours;
};
std::map<std::uintptr_t, Locked>& locked() {
  static auto& all = *new std::map<std::uintptr_t, Locked>();
  return all;
}

bool is_device(int index, const char* call) {
  if (index >= 0 && index < device_count()) return true;
  say_refusal(fmt::format("{}: there is no device {}, but {}", call, index, device_count()));
  return false;
}

bool is_own(cudaStream_t stream) {
  return stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread;
}

bool is_event(cudaEvent_t event, const char* call) {
  const std::lock_guard lock(mutex());
  if (events().contains(event)) return true;
  say_refusal(fmt::format("{}: {:p} is no live event", call, static_cast<void*>(event)));
  return false;
}

/// Larger copies to and from devices are not made: a job's memory may be larger than the machine's.
bool is_made(const void* to, const void* from, std::size_t bytes) {
  static const long most = setting("DELTAPIPE_STAND_IN_LARGEST_COPY", -1);
  return most < 0 || bytes <= static_cast<std::size_t>(most) || (!is_on_device(to) && !is_on_device(from));
}

/// Whether `kind` fits where the two ranges are and each lies in one piece of memory.
bool may_copy(const char* call, const void* to, std::size_t to_bytes, const void* from, std::size_t from_bytes,
              cudaMemcpyKind kind) {
  const bool by_address = kind == cudaMemcpyDefault;
  if (!by_address && kind != cudaMemcpyHostToHost && kind != cudaMemcpyHostToDevice && kind != cudaMemcpyDeviceToHost &&
      kind != cudaMemcpyDeviceToDevice) {
    say_refusal(fmt::format("{}: {} is no kind of copy", call, static_cast<int>(kind)));
    return false;
  }
  const bool to_device =
      by_address ? is_on_device(to) : kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device =
      by_address ? is_on_device(from) : kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  const std::string target = fmt::format("{}: target", call), source = fmt::format("{}: source", call);
  return (to_device ? is_device_range(to, to_bytes, target) : is_host_range(to, to_bytes, target)) &&
         (from_device ? is_device_range(from, from_bytes, source) : is_host_range(from, from_bytes, source));
}

/// Of what comes too early on the host or on another stream.
constexpr cudaError_t out_of_order = cudaErrorLaunchFailure;

cudaError_t ordered(bool well) { return well ? cudaSuccess : finish(out_of_order); }

cudaError_t copy(const char* call, void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                 cudaStream_t stream) {
  if (!is_stream(stream, call)) return finish(cudaErrorInvalidResourceHandle);
  if (bytes == 0) return cudaSuccess;
  if (!may_copy(call, to, bytes, from, bytes, kind)) return finish(cudaErrorInvalidValue);
  if (is_made(to, from, bytes)) return ordered(queue_copy(call, stream, to, from, bytes));
  const Use uses[] = {{from, bytes, Access::read}, {to, bytes, Access::write}};
  return ordered(queue(call, stream, uses, Work::transfer));
}

cudaError_t copy_rows(const char* call, void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch,
                      std::size_t width, std::size_t rows, cudaMemcpyKind kind, cudaStream_t stream) {
  if (!is_stream(stream, call)) return finish(cudaErrorInvalidResourceHandle);
  if (width == 0 || rows == 0) return cudaSuccess;
  constexpr std::size_t largest_pitch = 0x7fffffff;
  if (to_pitch < width || from_pitch < width || to_pitch > largest_pitch || from_pitch > largest_pitch) {
    return finish(refuse(cudaErrorInvalidPitchValue, "{}: rows of {} bytes, {} and {} bytes apart", call, width,
                         to_pitch, from_pitch));
  }
  if (!may_copy(call, to, (rows - 1) * to_pitch + width, from, (rows - 1) * from_pitch + width, kind)) {
    return finish(cudaErrorInvalidValue);
  }
  const Use uses[] = {{from, (rows - 1) * from_pitch + width, Access::read},
                      {to, (rows - 1) * to_pitch + width, Access::write}};
  if (!queue(call, stream, uses, Work::transfer)) return finish(out_of_order);
  if (!is_made(to, from, width * rows)) return cudaSuccess;
  for (std::size_t i = 0; i < rows; ++i) {
    std::memmove(behind(to) + i * to_pitch, behind(from) + i * from_pitch, width);
  }
  return cudaSuccess;
}

cudaError_t set(const char* call, void* memory, int value, std::size_t bytes, cudaStream_t stream) {
  if (!is_stream(stream, call)) return finish(cudaErrorInvalidResourceHandle);
  if (!is_device_range(memory, bytes, call)) return finish(cudaErrorInvalidValue);
  const Use uses[] = {{memory, bytes, Access::write}};
  if (!queue(call, stream, uses, Work::transfer)) return finish(out_of_order);
  if (bytes > 0) fill(memory, value, bytes);
  return cudaSuccess;
}

cudaError_t make_stream(const char* call, cudaStream_t* out, unsigned flags) {
  if (!is_device(device_of_thread, call)) return finish(cudaErrorNoDevice);
  const std::lock_guard lock(mutex());
  *out = *streams().insert(new CUstream_st{device_of_thread, (flags & cudaStreamNonBlocking) == 0}).first;
  return cudaSuccess;
}

cudaError_t make_event(const char* call, cudaEvent_t* out, bool times) {
  if (!is_device(device_of_thread, call)) return finish(cudaErrorNoDevice);
  const std::lock_guard lock(mutex());
  *out = *events().insert(new CUevent_st{device_of_thread, times, false, {}, {}}).first;
  return cudaSuccess;
}

/// The real library's text: its tables need no device.
const char* real_text(const char* function, cudaError_t error) {
  using Text = const char* (*)(cudaError_t);
  const auto real = reinterpret_cast<Text>(dlsym(RTLD_NEXT, function));
  return real != nullptr ? real(error) : "a CUDA error";
}

/// Of an H100; -1 for an attribute that nothing here needs.
int attribute_value(cudaDeviceAttr attribute) {
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxBlockDimX: return 1024;
    case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 0x7fffffff;
    case cudaDevAttrMaxGridDimY: return 65535;
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 48 << 10;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 227 << 10;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 228 << 10;
    case cudaDevAttrReservedSharedMemoryPerBlock: return 1 << 10;
    case cudaDevAttrTotalConstantMemory: return 64 << 10;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxRegistersPerBlock: return 65536;
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrL2CacheSize: return 50 << 20;
    case cudaDevAttrClockRate: return 1980000;
    case cudaDevAttrMemoryClockRate: return 2619000;
    case cudaDevAttrGlobalMemoryBusWidth: return 5120;
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrComputeCapabilityMinor: return 0;
    case cudaDevAttrAsyncEngineCount: return 3;
    case cudaDevAttrConcurrentKernels: return 1;
    case cudaDevAttrUnifiedAddressing: return 1;
    case cudaDevAttrCooperativeLaunch: return 1;
    case cudaDevAttrStreamPrioritiesSupported: return 1;
    case cudaDevAttrMemoryPoolsSupported: return 1;
    case cudaDevAttrPageableMemoryAccess: return 0;
    case cudaDevAttrCanMapHostMemory: return 1;
    case cudaDevAttrIntegrated: return 0;
    default: return -1;
  }
}

}  // namespace

int current_device() { return device_of_thread; }

cudaError_t finish(cudaError_t status) {
  if (status != cudaSuccess) last_error = status;
  return status;
}

bool is_stream(cudaStream_t stream, const char* call) {
  const std::lock_guard lock(mutex());
  if (is_own(stream) || streams().contains(stream)) return true;
  say_refusal(fmt::format("{}: {:p} is no live stream", call, static_cast<void*>(stream)));
  return false;
}

bool is_stream_of_current_device(cudaStream_t stream, const char* call) {
  if (!is_stream(stream, call)) return false;
  if (is_own(stream) || stream->device == device_of_thread) return true;
  say_refusal(
      fmt::format("{}: a stream of device {} while device {} is current", call, stream->device, device_of_thread));
  return false;
}

bool is_blocking(cudaStream_t stream) { return stream == nullptr || (!is_own(stream) && stream->is_blocking); }
int device_of_stream(cudaStream_t stream) { return is_own(stream) ? device_of_thread : stream->device; }

bool is_page_locked(const void* address) {
  const std::lock_guard lock(mutex());
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  const auto after = locked().upper_bound(at);
  return after != locked().begin() && at < std::prev(after)->first + std::prev(after)->second.bytes;
}

}  // namespace deltapipe::stand_in

using namespace deltapipe::stand_in;

// Errors.

STAND_IN cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
STAND_IN cudaError_t cudaPeekAtLastError() { return last_error; }
STAND_IN const char* cudaGetErrorName(cudaError_t error) { return real_text("cudaGetErrorName", error); }
STAND_IN const char* cudaGetErrorString(cudaError_t error) {
  return with_refusal(real_text("cudaGetErrorString", error));
}

// Devices.

STAND_IN cudaError_t cudaGetDeviceCount(int* count) {
  *count = device_count();
  return device_count() > 0 ? cudaSuccess : finish(cudaErrorNoDevice);
}
STAND_IN cudaError_t cudaGetDevice(int* device) {
  *device = device_of_thread;
  return device_count() > 0 ? cudaSuccess : finish(cudaErrorNoDevice);
}
STAND_IN cudaError_t cudaSetDevice(int device) {
  if (!is_device(device, "cudaSetDevice")) return finish(cudaErrorInvalidDevice);
  device_of_thread = device;
  return cudaSuccess;
}
STAND_IN cudaError_t cudaDeviceSynchronize() { return ordered(host_waits_for_all()); }
STAND_IN cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least != nullptr) *least = 0;
  if (greatest != nullptr) *greatest = -5;
  return cudaSuccess;
}
STAND_IN cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (!is_device(device, "cudaDeviceGetAttribute")) return finish(cudaErrorInvalidDevice);
  *value = attribute_value(attribute);
  if (*value >= 0) return cudaSuccess;
  return finish(refuse(cudaErrorInvalidValue, "cudaDeviceGetAttribute: the stand-in does not know attribute {}",
                       static_cast<int>(attribute)));
}
STAND_IN cudaError_t cudaGetDeviceProperties(cudaDeviceProp* out, int device) {
  if (!is_device(device, "cudaGetDeviceProperties")) return finish(cudaErrorInvalidDevice);
  cudaDeviceProp p{};
  fmt::format_to_n(p.name, sizeof p.name - 1, "stand-in for an H100");
  const auto value = [](cudaDeviceAttr attribute) { return attribute_value(attribute); };
  const auto bytes = [](cudaDeviceAttr attribute) { return static_cast<std::size_t>(attribute_value(attribute)); };
  p.totalGlobalMem = bytes_of_a_device();
  p.sharedMemPerBlock = bytes(cudaDevAttrMaxSharedMemoryPerBlock);
  p.sharedMemPerBlockOptin = bytes(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  p.sharedMemPerMultiprocessor = bytes(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  p.reservedSharedMemPerBlock = bytes(cudaDevAttrReservedSharedMemoryPerBlock);
  p.totalConstMem = bytes(cudaDevAttrTotalConstantMemory);
  p.regsPerBlock = value(cudaDevAttrMaxRegistersPerBlock);
  p.regsPerMultiprocessor = value(cudaDevAttrMaxRegistersPerMultiprocessor);
  p.warpSize = value(cudaDevAttrWarpSize);
  p.memPitch = 0x7fffffff;
  p.maxThreadsPerBlock = value(cudaDevAttrMaxThreadsPerBlock);
  p.maxThreadsDim[0] = value(cudaDevAttrMaxBlockDimX);
  p.maxThreadsDim[1] = value(cudaDevAttrMaxBlockDimY);
  p.maxThreadsDim[2] = value(cudaDevAttrMaxBlockDimZ);
  p.maxGridSize[0] = value(cudaDevAttrMaxGridDimX);
  p.maxGridSize[1] = value(cudaDevAttrMaxGridDimY);
  p.maxGridSize[2] = value(cudaDevAttrMaxGridDimZ);
  p.major = value(cudaDevAttrComputeCapabilityMajor);
  p.minor = value(cudaDevAttrComputeCapabilityMinor);
  p.multiProcessorCount = value(cudaDevAttrMultiProcessorCount);
  p.maxThreadsPerMultiProcessor = value(cudaDevAttrMaxThreadsPerMultiProcessor);
  p.maxBlocksPerMultiProcessor = value(cudaDevAttrMaxBlocksPerMultiprocessor);
  p.l2CacheSize = value(cudaDevAttrL2CacheSize);
  p.memoryBusWidth = value(cudaDevAttrGlobalMemoryBusWidth);
  p.asyncEngineCount = value(cudaDevAttrAsyncEngineCount);
  p.pciBusID = device + 1;
  p.concurrentKernels = p.unifiedAddressing = p.canMapHostMemory = p.streamPrioritiesSupported = 1;
  p.cooperativeLaunch = p.clusterLaunch = p.hostRegisterSupported = p.memoryPoolsSupported = 1;
  *out = p;
  return cudaSuccess;
}
STAND_IN cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
STAND_IN cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

// Memory.

STAND_IN cudaError_t cudaMalloc(void** out, std::size_t bytes) {
  *out = nullptr;
  if (!is_device(device_of_thread, "cudaMalloc")) return finish(cudaErrorNoDevice);
  if (bytes == 0) return cudaSuccess;
  *out = allocate_on(device_of_thread, bytes);
  return *out != nullptr ? cudaSuccess : finish(cudaErrorMemoryAllocation);
}
STAND_IN cudaError_t cudaFree(void* memory) {
  if (memory == nullptr) return cudaSuccess;
  const bool well = host_waits_for_all();
  if (release(memory)) return ordered(well);
  return finish(refuse(cudaErrorInvalidValue, "cudaFree: nothing is allocated at {:p}: {}", memory, describe(memory)));
}
STAND_IN cudaError_t cudaMemGetInfo(std::size_t* available, std::size_t* total) {
  if (!is_device(device_of_thread, "cudaMemGetInfo")) return finish(cudaErrorNoDevice);
  *available = bytes_free(device_of_thread);
  *total = bytes_of_a_device();
  return cudaSuccess;
}
STAND_IN cudaError_t cudaHostAlloc(void** out, std::size_t bytes, unsigned) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  *out = memory == MAP_FAILED ? nullptr : memory;
  if (*out == nullptr) return finish(cudaErrorMemoryAllocation);
  const std::lock_guard lock(mutex());
  locked()[reinterpret_cast<std::uintptr_t>(memory)] = {bytes, true};
  return cudaSuccess;
}
STAND_IN cudaError_t cudaMallocHost(void** out, std::size_t bytes) { return cudaHostAlloc(out, bytes, 0); }
STAND_IN cudaError_t cudaFreeHost(void* memory) {
  if (memory == nullptr) return cudaSuccess;
  const std::lock_guard lock(mutex());
  const auto found = locked().find(reinterpret_cast<std::uintptr_t>(memory));
  if (found == locked().end() || !found->second.is_ours) {
    return finish(refuse(cudaErrorInvalidValue, "cudaFreeHost: cudaHostAlloc did not give {:p}", memory));
  }
  settle_host_memory(memory, found->second.bytes);
  munmap(memory, found->second.bytes);
  locked().erase(found);
  return cudaSuccess;
}
STAND_IN cudaError_t cudaHostRegister(void* memory, std::size_t bytes, unsigned) {
  if (bytes == 0 || !is_host_range(memory, bytes, "cudaHostRegister")) return finish(cudaErrorInvalidValue);
  const std::lock_guard lock(mutex());
  const auto begin = reinterpret_cast<std::uintptr_t>(memory);
  const auto after = locked().lower_bound(begin + bytes);
  if (after != locked().begin()) {
    const auto& [other, piece] = *std::prev(after);
    if (other + piece.bytes > begin) {
      return finish(refuse(cudaErrorHostMemoryAlreadyRegistered,
                           "cudaHostRegister: {} bytes from {:p} on hold memory "
                           "that is page-locked already",
                           bytes, memory));
    }
  }
  locked()[begin] = {bytes, false};
  return cudaSuccess;
}
STAND_IN cudaError_t cudaHostUnregister(void* memory) {
  const std::lock_guard lock(mutex());
  const auto found = locked().find(reinterpret_cast<std::uintptr_t>(memory));
  if (found == locked().end() || found->second.is_ours) {
    return finish(refuse(cudaErrorHostMemoryNotRegistered, "cudaHostUnregister: {:p} was not registered", memory));
  }
  settle_host_memory(memory, found->second.bytes);
  locked().erase(found);
  return cudaSuccess;
}
STAND_IN cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* address) {
  cudaPointerAttributes a{};
  auto* pointer = const_cast<void*>(address);
  const int device = device_of(address);
  if (device >= 0) {
    a.type = cudaMemoryTypeDevice;
    a.device = device;
    a.devicePointer = pointer;
  } else if (is_page_locked(address)) {
    a.type = cudaMemoryTypeHost;
    a.device = device_of_thread;
    a.devicePointer = a.hostPointer = pointer;
  } else {
    a.type = cudaMemoryTypeUnregistered;
    a.device = -1;
    a.hostPointer = pointer;
  }
  *out = a;
  return cudaSuccess;
}

STAND_IN cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
  const cudaError_t status = copy("cudaMemcpy", to, from, bytes, kind, nullptr);
  return status != cudaSuccess ? status : ordered(host_waits_for(clock_of(nullptr)));
}
STAND_IN cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                                     cudaStream_t stream) {
  return copy("cudaMemcpyAsync", to, from, bytes, kind, stream);
}
STAND_IN cudaError_t cudaMemcpy2D(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch,
                                  std::size_t width, std::size_t rows, cudaMemcpyKind kind) {
  const cudaError_t status = copy_rows("cudaMemcpy2D", to, to_pitch, from, from_pitch, width, rows, kind, nullptr);
  return status != cudaSuccess ? status : ordered(host_waits_for(clock_of(nullptr)));
}
STAND_IN cudaError_t cudaMemcpy2DAsync(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch,
                                       std::size_t width, std::size_t rows, cudaMemcpyKind kind, cudaStream_t stream) {
  return copy_rows("cudaMemcpy2DAsync", to, to_pitch, from, from_pitch, width, rows, kind, stream);
}
STAND_IN cudaError_t cudaMemset(void* memory, int value, std::size_t bytes) {
  return set("cudaMemset", memory, value, bytes, nullptr);
}
STAND_IN cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t stream) {
  return set("cudaMemsetAsync", memory, value, bytes, stream);
}

// Streams.

STAND_IN cudaError_t cudaStreamCreate(cudaStream_t* out) {
  return make_stream("cudaStreamCreate", out, cudaStreamDefault);
}
STAND_IN cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned flags) {
  return make_stream("cudaStreamCreateWithFlags", out, flags);
}
STAND_IN cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned flags, int) {
  return make_stream("cudaStreamCreateWithPriority", out, flags);
}
STAND_IN cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const std::lock_guard lock(mutex());
  if (is_own(stream) || !is_stream(stream, "cudaStreamDestroy")) return finish(cudaErrorInvalidResourceHandle);
  streams().erase(stream);  // the object stays: its address is no other stream's
  return cudaSuccess;
}
STAND_IN cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (!is_stream(stream, "cudaStreamSynchronize")) return finish(cudaErrorInvalidResourceHandle);
  return ordered(host_waits_for(clock_of(stream)));
}
STAND_IN cudaError_t cudaStreamQuery(cudaStream_t stream) {
  if (!is_stream(stream, "cudaStreamQuery")) return finish(cudaErrorInvalidResourceHandle);
  return ordered(host_waits_for(clock_of(stream)));
}
STAND_IN cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const bool fits = is_stream(stream, "cudaStreamWaitEvent") && is_event(event, "cudaStreamWaitEvent");
  if (!fits) return finish(cudaErrorInvalidResourceHandle);
  const std::lock_guard lock(mutex());
  wait_for(stream, event->clock);
  return cudaSuccess;
}
STAND_IN cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long*,
                                              cudaGraph_t*, const cudaGraphNode_t**, const cudaGraphEdgeData**,
                                              std::size_t*) {
  if (!is_stream(stream, "cudaStreamGetCaptureInfo")) return finish(cudaErrorInvalidResourceHandle);
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

// Events.

STAND_IN cudaError_t cudaEventCreate(cudaEvent_t* out) { return make_event("cudaEventCreate", out, true); }
STAND_IN cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned flags) {
  return make_event("cudaEventCreateWithFlags", out, (flags & cudaEventDisableTiming) == 0);
}
STAND_IN cudaError_t cudaEventDestroy(cudaEvent_t event) {
  const std::lock_guard lock(mutex());
  if (!is_event(event, "cudaEventDestroy")) return finish(cudaErrorInvalidResourceHandle);
  events().erase(event);
  return cudaSuccess;
}
STAND_IN cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  constexpr const char* call = "cudaEventRecord";
  if (!is_event(event, call) || !is_stream(stream, call)) return finish(cudaErrorInvalidResourceHandle);
  const int device = is_own(stream) ? device_of_thread : stream->device;
  if (event->device != device) {
    return finish(refuse(cudaErrorInvalidResourceHandle, "{}: an event of device {} on a stream of device {}", call,
                         event->device, device));
  }
  const std::lock_guard lock(mutex());
  event->clock = clock_of(stream);
  event->recorded = true;
  event->at = std::chrono::steady_clock::now();
  return cudaSuccess;
}
STAND_IN cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (!is_event(event, "cudaEventQuery")) return finish(cudaErrorInvalidResourceHandle);
  const std::lock_guard lock(mutex());
  return thread_gives_work() ? ordered(host_waits_for(event->clock)) : cudaSuccess;
}
STAND_IN cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (!is_event(event, "cudaEventSynchronize")) return finish(cudaErrorInvalidResourceHandle);
  const std::lock_guard lock(mutex());
  return ordered(host_waits_for(event->clock));
}
STAND_IN cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  constexpr const char* call = "cudaEventElapsedTime";
  if (!is_event(begin, call) || !is_event(end, call)) return finish(cudaErrorInvalidResourceHandle);
  if (!begin->recorded || !end->recorded || !begin->times || !end->times) {
    return finish(refuse(cudaErrorInvalidResourceHandle, "{}: an event that was not recorded or does not time", call));
  }
  *milliseconds = std::chrono::duration<float, std::milli>(end->at - begin->at).count();
  return cudaSuccess;
}
