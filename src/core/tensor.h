// Tensor: a non-owning view of contiguous row-major memory. Owners are arenas (core/arena.h) or memory-mapped files.
#pragma once

#include "core/dtype.h"
#include "core/error.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

namespace deltapipe {

struct Device {
  enum class Kind : std::uint8_t { cpu, cuda };
  Kind kind = Kind::cpu;
  int index = 0;
  bool is_cpu() const { return kind == Kind::cpu; }
  bool is_cuda() const { return kind == Kind::cuda; }
  friend bool operator==(const Device&, const Device&) = default;
};

/// Up to six dimensions, outermost first. A default-constructed Shape is that of a scalar.
class Shape {
 public:
  static constexpr int max_rank = 6;
  Shape() = default;
  Shape(std::initializer_list<std::int64_t> dims) {
    for (std::int64_t d : dims) append(d);
  }
  int rank() const { return rank_; }
  /// Dimension i; negative counts from the innermost.
  std::int64_t operator[](int i) const { return dims_[static_cast<std::size_t>(i < 0 ? rank_ + i : i)]; }
  void append(std::int64_t d) {
    require(rank_ < max_rank, "Shape: more than six dimensions");
    dims_[static_cast<std::size_t>(rank_++)] = d;
  }
  std::int64_t numel() const {
    std::int64_t n = 1;
    for (int i = 0; i < rank_; ++i) n *= dims_[static_cast<std::size_t>(i)];
    return n;
  }
  friend bool operator==(const Shape& a, const Shape& b) {
    if (a.rank_ != b.rank_) return false;
    for (int i = 0; i < a.rank_; ++i) {
      if (a[i] != b[i]) return false;
    }
    return true;
  }
  std::string str() const {  // "[2, 3]"
    std::string s = "[";
    for (int i = 0; i < rank_; ++i) s += (i ? ", " : "") + std::to_string((*this)[i]);
    return s + "]";
  }

 private:
  std::array<std::int64_t, max_rank> dims_{};
  int rank_ = 0;
};

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  Shape shape;
  Device device;

  Tensor() = default;
  Tensor(void* d, DType t, Shape s, Device dev = {}) : data(d), dtype(t), shape(s), device(dev) {}

  explicit operator bool() const { return data != nullptr; }
  std::int64_t numel() const { return shape.numel(); }
  std::int64_t dim(int i) const { return shape[i]; }
  std::size_t bytes() const { return static_cast<std::size_t>(numel()) * size_of(dtype); }

  /// Typed pointer to host or device memory; the dtype must match exactly.
  template <class T>
  T* as() const {
    if (dtype != dtype_of<T>) wrong_dtype(dtype_of<T>);
    return static_cast<T*>(data);
  }
  /// The same memory under another shape of equal size.
  Tensor view(Shape s) const {
    if (s.numel() != numel()) fail<InternalError>("Tensor::view: {} does not fit {}", s.str(), shape.str());
    return {data, dtype, s, device};
  }
  /// Rows [begin, end) of the outermost dimension.
  Tensor rows(std::int64_t begin, std::int64_t end) const {
    if (shape.rank() == 0 || begin < 0 || end < begin || end > shape[0]) {
      fail<InternalError>("Tensor::rows: [{}, {}) of {}", begin, end, shape.str());
    }
    const std::int64_t row = shape[0] == 0 ? 0 : numel() / shape[0];
    Shape s{end - begin};
    for (int i = 1; i < shape.rank(); ++i) s.append(shape[i]);
    auto* p = data ? static_cast<std::byte*>(data) + static_cast<std::size_t>(begin * row) * size_of(dtype) : nullptr;
    return {p, dtype, s, device};
  }
  /// Entry i of the outermost dimension, that dimension dropped.
  Tensor at(std::int64_t i) const {
    Tensor t = rows(i, i + 1);
    Shape s;
    for (int d = 1; d < shape.rank(); ++d) s.append(shape[d]);
    t.shape = s;
    return t;
  }

 private:
  [[noreturn]] void wrong_dtype(DType wanted) const {
    fail<InternalError>("Tensor {} is {}, not {}", shape.str(), name_of(dtype), name_of(wanted));
  }
};

}  // namespace deltapipe
