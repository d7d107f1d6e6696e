#include "core/arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <utility>

namespace deltapipe {
namespace {

// First address of a measuring arena: not null, so that views stay "present", and never mapped, so that touching one
// faults at once.
std::byte* unmapped_base() { return reinterpret_cast<std::byte*>(std::uintptr_t{1} << 20); }

std::size_t aligned(std::size_t bytes) { return (bytes + Arena::alignment - 1) / Arena::alignment * Arena::alignment; }

}  // namespace

Arena::Arena(std::string name, Device device, bool measuring)
    : name_(std::move(name)), device_(device), measuring_(measuring), base_(unmapped_base()) {}

Arena Arena::measuring(std::string name, Device device) { return Arena(std::move(name), device, true); }

Arena::Arena(std::string name, std::size_t capacity, Device device)
    : name_(std::move(name)), device_(device), capacity_(aligned(capacity)) {
  require(device_.is_cpu(), "Arena: device memory needs the CUDA backend");
  if (capacity_ == 0) return;
  void* p = mmap(nullptr, capacity_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) {
    fail<MemoryError>("cannot allocate {:.1f} MiB for {}", static_cast<double>(capacity_) / (1 << 20), name_);
  }
  base_ = static_cast<std::byte*>(p);
}

Arena Arena::over(std::string name, const Tensor& memory) {
  Arena arena(std::move(name), memory.device, false);
  arena.owning_ = false;
  arena.base_ = static_cast<std::byte*>(memory.data);
  arena.capacity_ = memory.bytes();
  return arena;
}

void Arena::release() {
  if (!measuring_ && owning_ && base_ != nullptr) munmap(base_, capacity_);
  base_ = nullptr;
}

Arena::~Arena() { release(); }

Arena::Arena(Arena&& other) noexcept { *this = std::move(other); }

Arena& Arena::operator=(Arena&& other) noexcept {
  if (this != &other) {
    release();
    name_ = std::move(other.name_);
    device_ = other.device_;
    measuring_ = other.measuring_;
    owning_ = other.owning_;
    base_ = std::exchange(other.base_, nullptr);
    capacity_ = std::exchange(other.capacity_, 0);
    used_ = std::exchange(other.used_, 0);
    peak_ = std::exchange(other.peak_, 0);
  }
  return *this;
}

Tensor Arena::allocate(DType dtype, const Shape& shape, const char* label) {
  const std::size_t bytes = aligned(static_cast<std::size_t>(shape.numel()) * size_of(dtype));
  if (!measuring_ && used_ + bytes > capacity_) {
    fail<MemoryError>("{}: no room for {} {} {} ({} bytes asked, {} of {} in use)", name_, label, name_of(dtype),
                      shape.str(), bytes, used_, capacity_);
  }
  Tensor t(base_ + used_, dtype, shape, device_);
  used_ += bytes;
  peak_ = std::max(peak_, used_);
  return t;
}

}  // namespace deltapipe
