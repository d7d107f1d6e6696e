// Floating-point values between the types of files and of memory.
#pragma once

#include "core/tensor.h"

#include <cstddef>
#include <span>

namespace deltapipe {

constexpr bool is_float(DType t) { return t == DType::f32 || t == DType::f64 || t == DType::bf16 || t == DType::f16; }

/// Round to nearest, ties to even, in one rounding; NaN stays NaN.
BFloat16 to_bfloat16(double x);

/// out[i] = source[i]: `source` holds out.numel() little-endian values of type `from` (f32, f64, bf16, f16) at any
/// alignment, `out` is host memory of f32, f64 or bf16. Narrowing rounds to nearest, ties to even; equal types are
/// copied bit by bit. Runs on all host threads.
void convert_floats(std::span<const std::byte> source, DType from, const Tensor& out);

}  // namespace deltapipe
