// The contract of kernels/linear.h on CUDA: bf16 or f32 tensors, products by cuBLASLt.
#include "kernels/linear.h"

#include "kernels/cuda/common.h"
#include "kernels/cuda/linear_kernels.h"
#include "kernels/cuda/matmul.h"

namespace deltapipe::kernels::cuda {

decltype(kernels::linear_forward) linear_forward;
decltype(kernels::linear_backward_input) linear_backward_input;
decltype(kernels::linear_backward_weight) linear_backward_weight;

void linear_forward(const Stream& stream, const Tensor& x, const Tensor& w, const Tensor& bias, const Tensor& y) {
  matmul(stream, {.call = "linear_forward", .a = x, .b = w, .c = y, .transpose_b = true, .bias = bias});
}

void linear_backward_input(const Stream& stream, const Tensor& dy, const Tensor& w, const Tensor& dx, bool accumulate) {
  matmul(stream, {.call = "linear_backward_input", .a = dy, .b = w, .c = dx, .bias = {}, .accumulate = accumulate});
}

void linear_backward_weight(const Stream& stream, const Tensor& dy, const Tensor& x, const Tensor& dw,
                            const Tensor& dbias) {
  constexpr const char* call = "linear_backward_weight";
  if (dy.dim(0) == 0) return;
  if (dw) {
    matmul(stream, {.call = call, .a = dy, .b = x, .c = dw, .transpose_a = true, .bias = {}, .accumulate = true});
  }
  if (!dbias) return;
  const int rows = to_int(dy.dim(0), call), columns = to_int(dy.dim(1), call);
  check(dy.dtype == DType::bf16 ? add_column_sums(bits(dy), rows, columns, floats(dbias), native(stream))
                                : add_column_sums(floats(dy), rows, columns, floats(dbias), native(stream)),
        call);
}

}  // namespace deltapipe::kernels::cuda
