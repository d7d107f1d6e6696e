#include "core/device_memory.h"

#ifdef DELTAPIPE_CUDA
#include "core/cuda_memory.h"
#endif

#include <sys/mman.h>

#include <cstring>
#include <utility>

// Runs a call of the CUDA half, or says that there is none.
#ifdef DELTAPIPE_CUDA
#define DELTAPIPE_ON_CUDA(call) cuda_memory::call
#else
#define DELTAPIPE_ON_CUDA(call) no_cuda()
#endif

namespace deltapipe {
namespace {

#ifndef DELTAPIPE_CUDA
[[noreturn]] void no_cuda() { fail<UsageError>("this binary was built without CUDA: use device \"cpu\""); }
#endif

}  // namespace

std::string name_of(Device device) { return device.is_cpu() ? "cpu" : "cuda:" + std::to_string(device.index); }

bool built_with_cuda() {
#ifdef DELTAPIPE_CUDA
  return true;
#else
  return false;
#endif
}

int cuda_device_count() {
#ifdef DELTAPIPE_CUDA
  return cuda_memory::device_count();
#else
  return 0;
#endif
}

std::string describe_device(Device device) {
  if (device.is_cpu()) return "cpu";
#ifdef DELTAPIPE_CUDA
  return cuda_memory::describe_device(device.index);
#else
  no_cuda();
#endif
}

void set_device(Device device) {
  if (device.is_cuda()) DELTAPIPE_ON_CUDA(set_device(device.index));
}

void* allocate_memory(Device device, std::size_t bytes, const std::string& purpose) {
  if (device.is_cuda()) {
#ifdef DELTAPIPE_CUDA
    return cuda_memory::allocate(device.index, bytes, purpose);
#else
    no_cuda();
#endif
  }
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) {
    fail<MemoryError>("cannot allocate {:.1f} MiB for {}", static_cast<double>(bytes) / (1 << 20), purpose);
  }
  return p;
}

void release_memory(Device device, void* memory, std::size_t bytes) noexcept {
  if (memory == nullptr) return;
  if (device.is_cpu()) {
    munmap(memory, bytes);
    return;
  }
#ifdef DELTAPIPE_CUDA
  cuda_memory::release(device.index, memory);
#endif
}

std::size_t memory_in_use(Device device) {
  if (device.is_cpu()) return 0;
#ifdef DELTAPIPE_CUDA
  return cuda_memory::memory_in_use(device.index);
#else
  no_cuda();
#endif
}

std::size_t memory_size(Device device) {
  if (device.is_cpu()) return 0;
#ifdef DELTAPIPE_CUDA
  return cuda_memory::memory_size(device.index);
#else
  no_cuda();
#endif
}

bool page_lock([[maybe_unused]] void* memory, [[maybe_unused]] std::size_t bytes,
               [[maybe_unused]] const std::string& purpose) {
  if (cuda_device_count() == 0) return false;
#ifdef DELTAPIPE_CUDA
  cuda_memory::page_lock(memory, bytes, purpose);
#endif
  return true;
}

void page_unlock([[maybe_unused]] void* memory) noexcept {
#ifdef DELTAPIPE_CUDA
  cuda_memory::page_unlock(memory);
#endif
}

void copy(const Stream& stream, const Tensor& from, const Tensor& to) {
  if (from.dtype != to.dtype || from.numel() != to.numel()) {
    fail<InternalError>("copy: {} {} does not become {} {}", name_of(from.dtype), from.shape.str(), name_of(to.dtype),
                        to.shape.str());
  }
  if (stream.is_dry() || from.numel() == 0 || from.data == to.data) return;
  if (from.device.is_cpu() && to.device.is_cpu()) {
    std::memcpy(to.data, from.data, from.bytes());
    return;
  }
  require(stream.device().is_cuda(), "copy: device memory needs a stream of its device");
  DELTAPIPE_ON_CUDA(copy(stream.native(), from.bytes(), from.data, to.data));
}

void copy_rows(const Stream& stream, std::size_t rows, std::size_t width, const void* from, std::size_t from_pitch,
               void* to, std::size_t to_pitch) {
  if (stream.is_dry() || rows == 0 || width == 0) return;
  if (stream.device().is_cuda()) {
    DELTAPIPE_ON_CUDA(copy_rows(stream.native(), rows, width, from, from_pitch, to, to_pitch));
    return;
  }
  for (std::size_t i = 0; i < rows; ++i) {
    std::memcpy(static_cast<std::byte*>(to) + i * to_pitch, static_cast<const std::byte*>(from) + i * from_pitch,
                width);
  }
}

void synchronize(const Stream& stream) {
  if (!stream.is_dry() && stream.device().is_cuda()) DELTAPIPE_ON_CUDA(synchronize(stream.native()));
}

StreamOwner::StreamOwner(Device device, [[maybe_unused]] bool urgent) : device_(device) {
  if (device.is_cpu()) return;
#ifdef DELTAPIPE_CUDA
  native_ = cuda_memory::create_stream(device.index, urgent);
#else
  no_cuda();
#endif
}

StreamOwner::~StreamOwner() {
#ifdef DELTAPIPE_CUDA
  if (native_ != nullptr) cuda_memory::destroy_stream(native_);
#endif
}

StreamOwner::StreamOwner(StreamOwner&& other) noexcept
    : device_(other.device_), native_(std::exchange(other.native_, nullptr)) {}

StreamOwner& StreamOwner::operator=(StreamOwner&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(native_, other.native_);
  return *this;
}

Event::Event(Device device, [[maybe_unused]] bool times) : device_(device) {
  if (device.is_cpu()) return;
#ifdef DELTAPIPE_CUDA
  native_ = cuda_memory::create_event(device.index, times);
#else
  no_cuda();
#endif
}

Event::~Event() {
#ifdef DELTAPIPE_CUDA
  if (native_ != nullptr) cuda_memory::destroy_event(native_);
#endif
}

Event::Event(Event&& other) noexcept : device_(other.device_), native_(std::exchange(other.native_, nullptr)) {}

Event& Event::operator=(Event&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(native_, other.native_);
  return *this;
}

void Event::record(const Stream& stream) {
  if (native_ != nullptr && !stream.is_dry()) DELTAPIPE_ON_CUDA(record(native_, stream.native()));
}

void Event::make_wait(const Stream& stream) const {
  if (native_ != nullptr && !stream.is_dry()) DELTAPIPE_ON_CUDA(make_wait(stream.native(), native_));
}

bool Event::reached() const {
#ifdef DELTAPIPE_CUDA
  return native_ == nullptr || cuda_memory::reached(native_);
#else
  return true;
#endif
}

void Event::synchronize() const {
  if (native_ != nullptr) DELTAPIPE_ON_CUDA(synchronize_event(native_));
}

double Event::seconds_since([[maybe_unused]] const Event& earlier) const {
#ifdef DELTAPIPE_CUDA
  if (native_ != nullptr) return 1e-3 * static_cast<double>(cuda_memory::elapsed_ms(earlier.native_, native_));
#endif
  return 0;
}

}  // namespace deltapipe
