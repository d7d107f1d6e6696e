#include "kernels/elementwise.h"

#include "kernels/dispatch.h"

namespace deltapipe::kernels {

DELTAPIPE_KERNEL(add)
DELTAPIPE_KERNEL(add_in_place)
DELTAPIPE_KERNEL(scale_in_place)
DELTAPIPE_KERNEL(copy_cast)
DELTAPIPE_KERNEL(fill_zero)

void add(const Stream& stream, const Tensor& a, const Tensor& b, const Tensor& out) {
  check_tensor(b, a.shape, a.dtype, "add: b");
  check_tensor(out, a.shape, a.dtype, "add: out");
  DELTAPIPE_DISPATCH(stream, add, stream, a, b, out);
}

void add_in_place(const Stream& stream, const Tensor& x, const Tensor& y) {
  check_tensor(y, x.shape, x.dtype, "add_in_place: y");
  DELTAPIPE_DISPATCH(stream, add_in_place, stream, x, y);
}

void scale_in_place(const Stream& stream, double factor, const Tensor& x) {
  DELTAPIPE_DISPATCH(stream, scale_in_place, stream, factor, x);
}

void copy_cast(const Stream& stream, const Tensor& src, const Tensor& dst) {
  check_shape(dst, src.shape, "copy_cast: dst");
  for (const Tensor& t : {src, dst}) {
    if (t.dtype != DType::f32 && t.dtype != DType::f64 && t.dtype != DType::bf16) {
      fail<InternalError>("copy_cast: {} is not float32, float64 or bfloat16", name_of(t.dtype));
    }
  }
  DELTAPIPE_DISPATCH(stream, copy_cast, stream, src, dst);
}

void fill_zero(const Stream& stream, const Tensor& x) { DELTAPIPE_DISPATCH(stream, fill_zero, stream, x); }

}  // namespace deltapipe::kernels
