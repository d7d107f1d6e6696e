// Matrix products by cuBLASLt, for the operations that are made of them. Row-major, as all our tensors.
#pragma once

#include "core/stream.h"
#include "core/tensor.h"

#include <cstddef>

namespace deltapipe::kernels::cuda {

/// Memory that cuBLASLt may use in one product. Taken from the device once a stream, at its first product, and kept: a
/// plan of device memory counts it for every stream that computes.
inline constexpr std::size_t matmul_workspace_bytes = std::size_t{32} << 20;

struct Matmul {
  const char* call = "";  // operation's name, for errors
  Tensor a, b, c;         // matrices; c is the result
  bool transpose_a = false, transpose_b = false;
  Tensor bias;              // [columns of c], added to every row; may be empty
  bool accumulate = false;  // c += product, else c = product
};

/// c = op(a) op(b) (+ bias) (+ c), a and b both bf16 or both f32, c of their dtype or f32, summed in fp32, without
/// TF32, and rounded once. Algorithms are chosen once for every kind of product (shapes, dtypes, flags, alignments) and
/// kept: the one that cuBLASLt's heuristics put first or, when results need not be deterministic, the fastest of its
/// first few, timed on the first call, which then allocates and waits.
void matmul(const Stream& stream, const Matmul& product);

}  // namespace deltapipe::kernels::cuda
