// The contract of kernels/elementwise.h on CUDA.
#include "kernels/elementwise.h"

#include "kernels/cuda/launches.h"
#include "kernels/cuda/typed.h"

#include <type_traits>

namespace deltapipe::kernels::cuda {

decltype(kernels::add) add;
decltype(kernels::add_in_place) add_in_place;
decltype(kernels::scale_in_place) scale_in_place;
decltype(kernels::copy_cast) copy_cast;
decltype(kernels::fill_zero) fill_zero;

void add(const Stream& stream, const Tensor& a, const Tensor& b, const Tensor& out) {
  const char* call = "add";
  for_type_or_double(a.dtype, call, [&]<class T>() {
    check(add<T>(pointer<T>(a, call), pointer<T>(b, call), pointer<T>(out, call), a.numel(), native(stream)), call);
  });
}

void add_in_place(const Stream& stream, const Tensor& x, const Tensor& y) { add(stream, x, y, y); }

void scale_in_place(const Stream& stream, double factor, const Tensor& x) {
  const char* call = "scale_in_place";
  for_type_or_double(x.dtype, call, [&]<class T>() {
    check(scale_in_place<T>(factor, pointer<T>(x, call), x.numel(), native(stream)), call);
  });
}

void copy_cast(const Stream& stream, const Tensor& src, const Tensor& dst) {
  const char* call = "copy_cast";
  for_type_or_double(src.dtype, call, [&]<class From>() {
    for_type_or_double(dst.dtype, call, [&]<class To>() {
      if constexpr (std::is_same_v<From, To>) {
        check(cudaMemcpyAsync(dst.data, src.data, src.bytes(), cudaMemcpyDeviceToDevice, native(stream)), call);
      } else {
        check(cast<From, To>(pointer<From>(src, call), pointer<To>(dst, call), src.numel(), native(stream)), call);
      }
    });
  });
}

void fill_zero(const Stream& stream, const Tensor& x) {
  check(cudaMemsetAsync(x.data, 0, x.bytes(), native(stream)), "fill_zero");
}

}  // namespace deltapipe::kernels::cuda
