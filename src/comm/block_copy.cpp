#include "comm/block_copy.h"

#include <cstring>

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
  require(stream.device().is_cpu(), "copy_blocks: host memory only");
  const std::size_t size = size_of(from.dtype), bytes = static_cast<std::size_t>(elements) * size;
  const auto* source = static_cast<const std::byte*>(from.data);
  auto* destination = static_cast<std::byte*>(to.data);
  for (std::int64_t i = 0; i < count; ++i) {
    std::memcpy(destination + static_cast<std::size_t>(to_offset + i * to_stride) * size,
                source + static_cast<std::size_t>(from_offset + i * from_stride) * size, bytes);
  }
}

void copy_all(const Stream& stream, const Tensor& from, const Tensor& to) {
  require(from.dtype == to.dtype && from.numel() == to.numel(), "copy_all: two dtypes or sizes");
  if (stream.is_dry() || from.numel() == 0 || from.data == to.data) return;
  require(stream.device().is_cpu(), "copy_all: host memory only");
  std::memcpy(to.data, from.data, from.bytes());
}

}  // namespace deltapipe
