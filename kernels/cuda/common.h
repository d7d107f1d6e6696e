// Host side of the CUDA implementations: the adaptors kernels/cuda/NAME.cpp, compiled by the C++ compiler, which check
// what only CUDA demands of a contract and call launch functions on plain pointers, declared in a small header and
// defined in .cu files. nvcc never sees core's headers. A launch function queues its kernels on the stream it is given
// and returns the first launch error (cudaGetLastError() after each launch); nothing in here waits for the device.
#pragma once

#include "core/arena.h"
#include "core/error.h"
#include "core/stream.h"
#include "core/tensor.h"

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <limits>

namespace deltapipe::kernels::cuda {

/// Throws unless `status` is success: MemoryError when the device is full, else InternalError. `call` is the
/// operation's name; kernels run later than they are queued, so a fault of an earlier one may surface here.
inline void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  if (status == cudaErrorMemoryAllocation) fail<MemoryError>("{}: {}", call, cudaGetErrorString(status));
  fail<InternalError>("{}: CUDA error {}: {}", call, cudaGetErrorName(status), cudaGetErrorString(status));
}

inline cudaStream_t native(const Stream& stream) { return static_cast<cudaStream_t>(stream.native()); }

/// Pointers as kernels take them; null for an empty tensor. A bfloat16 is its bit pattern outside device code.
inline std::uint16_t* bits(const Tensor& t) { return t ? reinterpret_cast<std::uint16_t*>(t.as<BFloat16>()) : nullptr; }
inline float* floats(const Tensor& t) { return t ? t.as<float>() : nullptr; }

/// A count or size that kernels hold as int.
inline int to_int(std::int64_t n, const char* call) {
  if (n < 0 || n > std::numeric_limits<int>::max()) fail<InternalError>("{}: {} does not fit an int", call, n);
  return static_cast<int>(n);
}

/// `what` is "operation: tensor".
inline void require_dtype(const Tensor& t, DType dtype, const char* what) {
  if (t.dtype != dtype) fail<InternalError>("{} is {}, on CUDA it must be {}", what, name_of(t.dtype), name_of(dtype));
}

/// `bytes` of workspace, aligned to Arena::alignment; null when none are asked for.
inline void* take_workspace(Arena& workspace, std::size_t bytes, const char* label) {
  if (bytes == 0) return nullptr;
  return workspace.allocate(DType::u8, {static_cast<std::int64_t>(bytes)}, label).data;
}

}  // namespace deltapipe::kernels::cuda
