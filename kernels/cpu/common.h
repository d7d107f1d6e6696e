// Shared by the CPU implementations: float/double dispatch and small vectorisable helpers.
#pragma once

#include "core/parallel.h"
#include "core/stream.h"
#include "core/tensor.h"

#include <cmath>
#include <cstdint>

namespace deltapipe::kernels::cpu {

/// Calls f.template operator()<float>() or <double>(); the CPU computes in no other type.
template <class F>
void for_real(DType dtype, const char* what, F&& f) {
  switch (dtype) {
    case DType::f32: f.template operator()<float>(); return;
    case DType::f64: f.template operator()<double>(); return;
    default: fail<InternalError>("{}: the CPU backend does not compute in {}", what, name_of(dtype));
  }
}

/// Rows a parallel task takes when each row costs about `row_cost` simple operations: enough work to hide the start.
inline std::int64_t rows_per_task(std::int64_t row_cost) {
  const std::int64_t target = 1 << 15;
  return row_cost >= target ? 1 : target / (row_cost > 0 ? row_cost : 1);
}

template <class T>
T dot(const T* a, const T* b, std::int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

/// y += a * x
template <class T>
void axpy(T a, const T* x, T* y, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) y[i] += a * x[i];
}

template <class T>
T sigmoid(T x) {
  return x >= 0 ? T(1) / (T(1) + std::exp(-x)) : std::exp(x) / (T(1) + std::exp(x));
}

/// log(1 + e^x) without overflow.
template <class T>
T softplus(T x) {
  return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
}

}  // namespace deltapipe::kernels::cpu
