// A copy in host memory of what a checkpoint will hold, so that training goes on while files are written.
#pragma once

#include "checkpoints/training_checkpoint.h"
#include "core/stream.h"

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

namespace deltapipe {

class SliceBuffer {
 public:
  /// The slices with their data here, until the next call: what they pointed to may change at once. `stream` is of the
  /// device that some of them are on. Throws MemoryError.
  std::vector<TensorSlice> copy(std::span<const TensorSlice> slices, const Stream& stream);

 private:
  std::unique_ptr<std::byte[]> memory_;
  std::size_t capacity_ = 0;
};

}  // namespace deltapipe
