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
  Tensor a, b, c;         // matrices; c is the result. Rows of a and c may be longer than b's sizes say; see below
  bool transpose_a = false, transpose_b = false;
  Tensor bias;              // [columns of c], added to every row; may be empty
  bool accumulate = false;  // c += product, else c = product
};

/// c = op(a) op(b) (+ bias) (+ c), a and b both bf16 or both f32, c of their dtype or f32, summed in fp32, without
/// TF32, and rounded once. Algorithms are chosen once for every kind of product (shapes, dtypes, flags, alignments) and
/// kept: the one that cuBLASLt's heuristics put first or, when results need not be deterministic, the fastest of its
/// first few, timed on the first call, which then allocates and waits.
///
/// The product's columns and what is summed over are b's dimensions, its rows are c's. Where rows of a or c are longer,
/// the rest of them is neither read nor written. That lets a matrix of any width have rows that begin at multiples of
/// 16 bytes, which the fast kernels want, of dimensions too: rows or columns of c are then cut, and the last few are a
/// product of their own. A sum is not cut, since its parts would be rounded (linear_backward_input does it in fp32).
void matmul(const Stream& stream, const Matmul& product);

}  // namespace deltapipe::kernels::cuda
