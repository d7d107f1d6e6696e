// How an adaptor reaches launch functions by element type. Device code knows a bfloat16 as its bit pattern, so the
// types that launch functions are instantiated for are std::uint16_t (bfloat16), float and, where a contract needs it,
// double.
#pragma once

#include "kernels/cuda/common.h"
#include "kernels/cuda/launches.h"

namespace deltapipe::kernels::cuda {

template <class T>
inline constexpr DType dtype_on_device = dtype_of<T>;
template <>
inline constexpr DType dtype_on_device<std::uint16_t> = DType::bf16;

/// Memory of `t` as a launch function takes it; null when `t` is empty. The dtype must be that of T.
template <class T>
T* pointer(const Tensor& t, const char* call) {
  if (t && t.dtype != dtype_on_device<T>) {
    fail<InternalError>("{}: a tensor {} is {}, not {}", call, t.shape.str(), name_of(t.dtype),
                        name_of(dtype_on_device<T>));
  }
  return static_cast<T*>(t.data);
}

/// Calls f.template operator()<T>() for bfloat16 and float32, what models are held in on CUDA.
template <class F>
void for_type(DType dtype, const char* call, F&& f) {
  switch (dtype) {
    case DType::bf16: f.template operator()<std::uint16_t>(); return;
    case DType::f32: f.template operator()<float>(); return;
    default: fail<InternalError>("{}: on CUDA only bfloat16 and float32 are computed, not {}", call, name_of(dtype));
  }
}

/// The same, and float64, for operations that also serve sums.
template <class F>
void for_type_or_double(DType dtype, const char* call, F&& f) {
  if (dtype == DType::f64) {
    f.template operator()<double>();
  } else {
    for_type(dtype, call, f);
  }
}

/// Throws unless a block of threads can hold a row of d elements of T.
template <class T>
void check_row(std::int64_t d, const char* call) {
  if (d > most_row_elements<T>) {
    fail<InternalError>("{}: rows of {} elements, on CUDA at most {} fit", call, d, most_row_elements<T>);
  }
}

}  // namespace deltapipe::kernels::cuda
