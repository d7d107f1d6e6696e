#include "checkpoints/slice_buffer.h"

#include "core/device_memory.h"
#include "core/error.h"
#include "core/parallel.h"

#include <cstring>
#include <new>

namespace deltapipe {
namespace {

constexpr std::size_t alignment = 64;
std::size_t aligned(std::size_t bytes) { return (bytes + alignment - 1) / alignment * alignment; }

void copy_host(const void* from, std::byte* to, std::size_t bytes) {
  constexpr std::int64_t block = std::int64_t{16} << 20;  // bytes: large against a thread's start, small for balance
  parallel_blocks(static_cast<std::int64_t>(bytes), block, [&](std::int64_t begin, std::int64_t end) {
    std::memcpy(to + begin, static_cast<const std::byte*>(from) + begin, static_cast<std::size_t>(end - begin));
  });
}

}  // namespace

std::vector<TensorSlice> SliceBuffer::copy(std::span<const TensorSlice> slices, const Stream& stream) {
  std::size_t needed = 0;
  for (const TensorSlice& s : slices) needed += aligned(s.data.bytes());
  if (needed > capacity_) {
    memory_.reset();  // first, so that two never stand side by side
    capacity_ = 0;
    try {
      memory_ = std::make_unique_for_overwrite<std::byte[]>(needed);
    } catch (const std::bad_alloc&) {
      fail<MemoryError>("checkpoint: no {} bytes of host memory for a copy of weights and optimizer states", needed);
    }
    capacity_ = needed;
  }
  synchronize(stream);  // slices in host memory may be on their way there
  std::vector<TensorSlice> copies(slices.begin(), slices.end());
  std::byte* at = memory_.get();
  for (TensorSlice& s : copies) {
    const Tensor here(at, s.data.dtype, s.data.shape);
    if (s.data.device.is_cpu()) {
      copy_host(s.data.data, at, s.data.bytes());
    } else {
      deltapipe::copy(stream, s.data, here);
    }
    s.data = here;
    at += aligned(here.bytes());
  }
  synchronize(stream);
  return copies;
}

}  // namespace deltapipe
