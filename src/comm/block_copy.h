// Copies of equally spaced blocks, to pack what one message carries and to unpack it.
#pragma once

#include "core/stream.h"
#include "core/tensor.h"

#include <cstdint>

namespace deltapipe {

/// Block i of `count`, `elements` long, from element from_offset + i * from_stride of `from` to element to_offset +
/// i * to_stride of `to`; one dtype. The tensors do not overlap. Both are of the stream's device. Throws
/// InternalError when a block lies outside its tensor.
void copy_blocks(const Stream& stream, std::int64_t count, std::int64_t elements, const Tensor& from,
                 std::int64_t from_offset, std::int64_t from_stride, const Tensor& to, std::int64_t to_offset,
                 std::int64_t to_stride);

/// to = from, all of it; the same number of elements of one dtype. They may be the same memory.
void copy_all(const Stream& stream, const Tensor& from, const Tensor& to);

}  // namespace deltapipe
