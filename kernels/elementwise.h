// Elementwise sums, scaling, conversion and clearing. Tensors of one call have one shape (any rank).
#pragma once

#include "core/stream.h"
#include "core/tensor.h"

namespace deltapipe::kernels {

/// out = a + b; one dtype. out may alias a or b.
void add(const Stream& stream, const Tensor& a, const Tensor& b, const Tensor& out);

/// y += x; one dtype. x may alias y.
void add_in_place(const Stream& stream, const Tensor& x, const Tensor& y);

/// x *= factor; the factor is rounded to x's dtype first.
void scale_in_place(const Stream& stream, double factor, const Tensor& x);

/// dst = src, between any two of float32, float64 and bfloat16; rounds to nearest even. float64 reaches bfloat16 by way
/// of float32. dst aliases nothing.
void copy_cast(const Stream& stream, const Tensor& src, const Tensor& dst);

/// x = 0, any dtype.
void fill_zero(const Stream& stream, const Tensor& x);

}  // namespace deltapipe::kernels
