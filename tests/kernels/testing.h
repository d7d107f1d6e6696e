// Helpers of the kernel tests: owned tensors with fresh random values, finite-difference checks in double.
#pragma once

#include "core/arena.h"
#include "core/random.h"
#include "core/stream.h"
#include "core/tensor.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <vector>

namespace deltapipe::testing {

/// A tensor that owns its memory. New ones are filled with NaN, so that an unwritten output is seen.
template <class T>
class Owned {
 public:
  explicit Owned(Shape shape) : values_(static_cast<std::size_t>(shape.numel())), shape_(shape) {
    if constexpr (std::is_floating_point_v<T>) fill(std::numeric_limits<T>::quiet_NaN());
  }
  Tensor tensor() const { return {const_cast<T*>(values_.data()), dtype_of<T>, shape_}; }
  operator Tensor() const { return tensor(); }
  T* begin() { return values_.data(); }
  T* end() { return values_.data() + values_.size(); }
  const T* begin() const { return values_.data(); }
  const T* end() const { return values_.data() + values_.size(); }
  T& operator[](std::int64_t i) { return values_[static_cast<std::size_t>(i)]; }
  T operator[](std::int64_t i) const { return values_[static_cast<std::size_t>(i)]; }
  std::int64_t size() const { return static_cast<std::int64_t>(values_.size()); }
  Shape shape() const { return shape_; }
  Owned& fill(T x) {
    std::fill(values_.begin(), values_.end(), x);
    return *this;
  }
  Owned& normal(RandomStream& r, double scale = 1.0, double mean = 0.0) {
    for (T& x : values_) x = static_cast<T>(mean + scale * r.next_normal());
    return *this;
  }
  Owned& uniform(RandomStream& r, double low = 0.0, double high = 1.0) {
    for (T& x : values_) x = static_cast<T>(low + (high - low) * r.next_uniform());
    return *this;
  }
  /// The same values in another floating type.
  template <class U>
  Owned<U> cast() const {
    Owned<U> out(shape_);
    for (std::int64_t i = 0; i < size(); ++i) out[i] = static_cast<U>((*this)[i]);
    return out;
  }

 private:
  std::vector<T> values_;
  Shape shape_;
};

/// A seed for fresh data: the test's own name, or DELTAPIPE_TEST_SEED when set (printed on failure by callers).
std::uint64_t test_seed();

/// For operations without workspace on the CPU: an arena without room, so that one who takes some is found out.
Arena& no_workspace();

/// RMS of (a - b) over RMS of b; NaN anywhere gives NaN, which fails every comparison.
template <class A, class B>
double relative_rms(const A& a, const B& b) {
  double error = 0, norm = 0;
  for (std::int64_t i = 0; i < b.size(); ++i) {
    const double d = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    error += d * d;
    norm += static_cast<double>(b[i]) * static_cast<double>(b[i]);
  }
  return std::sqrt(error / (norm + 1e-300));
}

/// Compares `gradient` of the scalar `loss` with respect to every element of `x` (at most `samples`, evenly spread)
/// with central differences of step `h`. The tolerance is relative to the largest numerical gradient seen.
/// Central differences in double lose about (1e-16 / h + h^2) relative accuracy: 1e-7 is within reach at h = 1e-5.
void expect_gradient(Owned<double>& x, const Owned<double>& gradient, const std::function<double()>& loss,
                     const std::string& name, double tolerance = 1e-6, double h = 1e-5, std::int64_t samples = 64);

/// sum(a * b): the scalar loss whose gradient with respect to `a` is `b`.
inline double inner(const Owned<double>& a, const Owned<double>& b) {
  double s = 0;
  for (std::int64_t i = 0; i < a.size(); ++i) s += a[i] * b[i];
  return s;
}

}  // namespace deltapipe::testing
