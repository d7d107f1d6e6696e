#include "kernels/elementwise.h"

#include "kernels/cpu/common.h"

#include <cstring>
#include <type_traits>

// Loops over operands that may alias are marked simd: each element is read before it is written and no other element
// is touched.
namespace deltapipe::kernels::cpu {
namespace {

constexpr std::int64_t block = 1 << 15;  // elements a task

template <class To, class From>
To convert(From x) {
  if constexpr (std::is_same_v<From, To>) {
    return x;
  } else if constexpr (std::is_same_v<From, BFloat16>) {
    return static_cast<To>(to_float(x));
  } else if constexpr (std::is_same_v<To, BFloat16>) {
    return to_bfloat16(static_cast<float>(x));
  } else {
    return static_cast<To>(x);
  }
}

/// Calls f.template operator()<C>() with the C++ type of a type that copy_cast takes.
template <class F>
void for_castable(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: f.template operator()<float>(); return;
    case DType::f64: f.template operator()<double>(); return;
    case DType::bf16: f.template operator()<BFloat16>(); return;
    default: fail<InternalError>("copy_cast: cannot convert {}", name_of(dtype));
  }
}

}  // namespace

void add(const Stream&, const Tensor& a, const Tensor& b, const Tensor& out) {
  for_real(a.dtype, "add", [&]<class T>() {
    const T *pa = a.as<T>(), *pb = b.as<T>();
    T* po = out.as<T>();
    parallel_blocks(a.numel(), block, [=](std::int64_t begin, std::int64_t end) {
#pragma omp simd
      for (std::int64_t i = begin; i < end; ++i) po[i] = pa[i] + pb[i];
    });
  });
}

void add_in_place(const Stream& stream, const Tensor& x, const Tensor& y) { add(stream, x, y, y); }

void scale_in_place(const Stream&, double factor, const Tensor& x) {
  for_real(x.dtype, "scale_in_place", [&]<class T>() {
    T* px = x.as<T>();
    const T f = static_cast<T>(factor);
    parallel_blocks(x.numel(), block, [=](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) px[i] *= f;
    });
  });
}

void copy_cast(const Stream&, const Tensor& src, const Tensor& dst) {
  for_castable(src.dtype, [&]<class From>() {
    for_castable(dst.dtype, [&]<class To>() {
      const From* ps = src.as<From>();
      To* pd = dst.as<To>();
      parallel_blocks(src.numel(), block, [=](std::int64_t begin, std::int64_t end) {
#pragma omp simd
        for (std::int64_t i = begin; i < end; ++i) pd[i] = convert<To>(ps[i]);
      });
    });
  });
}

void fill_zero(const Stream&, const Tensor& x) {
  auto* p = static_cast<std::byte*>(x.data);
  parallel_blocks(static_cast<std::int64_t>(x.bytes()), 1 << 18, [=](std::int64_t begin, std::int64_t end) {
    std::memset(p + begin, 0, static_cast<std::size_t>(end - begin));
  });
}

}  // namespace deltapipe::kernels::cpu
