#include "comm/block_copy.h"

#include "core/device_memory.h"

#include <cstddef>

namespace deltapipe {
namespace {

void check_range(std::int64_t count, std::int64_t elements, const Tensor& t, std::int64_t offset, std::int64_t stride,
                 const char* which) {
  const std::int64_t last = count == 0 ? 0 : offset + (count - 1) * stride + elements;
  if (offset < 0 || stride < 0 || last > t.numel()) {
    fail<InternalError>("copy_blocks: {} blocks of {} elements, {} apart from {}, do not fit {} {}", count, elements,
                        stride, offset, which, t.shape.str());
  }
}

}  // namespace

void copy_blocks(const Stream& stream, std::int64_t count, std::int64_t elements, const Tensor& from,
                 std::int64_t from_offset, std::int64_t from_stride, const Tensor& to, std::int64_t to_offset,
                 std::int64_t to_stride) {
  require(from.dtype == to.dtype, "copy_blocks: two dtypes");
  check_range(count, elements, from, from_offset, from_stride, "the source");
  check_range(count, elements, to, to_offset, to_stride, "the destination");
  if (stream.is_dry() || elements == 0) return;
  const std::size_t size = size_of(from.dtype);
  copy_rows(stream, static_cast<std::size_t>(count), static_cast<std::size_t>(elements) * size,
            static_cast<const std::byte*>(from.data) + static_cast<std::size_t>(from_offset) * size,
            static_cast<std::size_t>(from_stride) * size,
            static_cast<std::byte*>(to.data) + static_cast<std::size_t>(to_offset) * size,
            static_cast<std::size_t>(to_stride) * size);
}

void copy_all(const Stream& stream, const Tensor& from, const Tensor& to) {
  require(from.dtype == to.dtype && from.numel() == to.numel(), "copy_all: two dtypes or sizes");
  copy(stream, from, to);
}

}  // namespace deltapipe
