#include "core/arena.h"

#include "core/device_memory.h"

#include <algorithm>
#include <atomic>
#include <utility>

namespace deltapipe {
namespace {

// First address of a measuring arena: not null, so that views stay "present"; no address that a processor knows, so
// that touching one faults at once; and far from other arenas', since operations ask whether tensors are the same
// memory.
std::byte* unmapped_base() {
  static std::atomic<std::uintptr_t> count{0};
  constexpr int most = 1024;  // at a time, about
  return reinterpret_cast<std::byte*>((std::uintptr_t{1} << 62) + (count++ % most << 50));
}

std::size_t aligned(std::size_t bytes) { return (bytes + Arena::alignment - 1) / Arena::alignment * Arena::alignment; }

}  // namespace

Arena::Arena(std::string name, Device device, bool measuring)
    : name_(std::move(name)), device_(device), measuring_(measuring), base_(unmapped_base()) {}

Arena Arena::measuring(std::string name, Device device) { return Arena(std::move(name), device, true); }

Arena::Arena(std::string name, std::size_t capacity, Device device)
    : name_(std::move(name)), device_(device), capacity_(aligned(capacity)) {
  if (capacity_ != 0) base_ = static_cast<std::byte*>(allocate_memory(device_, capacity_, name_));
}

void Arena::page_lock() {
  if (page_locked_ || measuring_ || capacity_ == 0 || !device_.is_cpu()) return;
  page_locked_ = deltapipe::page_lock(base_, capacity_, name_);
}

Arena Arena::over(std::string name, const Tensor& memory) {
  Arena arena(std::move(name), memory.device, false);
  arena.owning_ = false;
  arena.base_ = static_cast<std::byte*>(memory.data);
  arena.capacity_ = memory.bytes();
  return arena;
}

void Arena::release() {
  if (page_locked_) page_unlock(base_);
  if (!measuring_ && owning_ && base_ != nullptr) release_memory(device_, base_, capacity_);
  base_ = nullptr;
  page_locked_ = false;
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
    page_locked_ = std::exchange(other.page_locked_, false);
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
