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

void linear_backward_input(const Stream& stream, const Tensor& dy, const Tensor& w, const Tensor& dx, bool accumulate,
                           Arena& workspace) {
  constexpr const char* call = "linear_backward_input";
  // Fast products sum over multiples of 16 bytes. Where all rows are such, all but the last few outputs are summed by
  // one, in fp32, and what rounds the sums adds the rest.
  const auto unit = static_cast<std::int64_t>(16 / size_of(dy.dtype));
  const std::int64_t outputs = w.dim(0), rest = outputs % unit;
  const bool is_cut = rest > 0 && outputs > rest && dy.dim(1) % unit == 0 && w.dim(1) % unit == 0;
  const auto scope = workspace.scope();
  const Tensor sums = is_cut ? workspace.allocate(DType::f32, dx.shape, "input gradient before rounding") : Tensor();
  if (stream.is_dry() || dx.numel() == 0) return;
  const auto is_aligned = [](const Tensor& t) { return reinterpret_cast<std::uintptr_t>(t.data) % 16 == 0; };
  if (!is_cut || !is_aligned(dy) || !is_aligned(w) || !is_aligned(dx)) {
    matmul(stream, {.call = call, .a = dy, .b = w, .c = dx, .bias = {}, .accumulate = accumulate});
    return;
  }
  matmul(stream, {.call = call, .a = dy, .b = w.rows(0, outputs - rest), .c = sums, .bias = {}});
  const Tensor last = w.rows(outputs - rest, outputs);
  const LastProducts shape{dx.dim(0), to_int(dx.dim(1), call), static_cast<int>(rest), dy.dim(1), accumulate ? 1 : 0};
  const auto first = outputs - rest;
  check(dy.dtype == DType::bf16
            ? add_last_products(shape, floats(sums), bits(dy) + first, bits(last), bits(dx), native(stream))
            : add_last_products(shape, floats(sums), floats(dy) + first, floats(last), floats(dx), native(stream)),
        call);
}

void linear_backward_weight(const Stream& stream, const Tensor& dy, const Tensor& x, const Tensor& dw,
                            const Tensor& dbias) {
  constexpr const char* call = "linear_backward_weight";
  if (dy.dim(0) == 0) return;
  if (dw) {
    matmul(stream, {.call = call, .a = dy, .b = x, .c = dw, .transpose_a = true, .bias = {}, .accumulate = true});
  }
  if (!dbias) return;
  const int rows = to_int(dy.dim(0), call), columns = to_int(dbias.dim(0), call);
  check(dy.dtype == DType::bf16 ? add_column_sums(bits(dy), rows, columns, dy.dim(1), floats(dbias), native(stream))
                                : add_column_sums(floats(dy), rows, columns, dy.dim(1), floats(dbias), native(stream)),
        call);
}

}  // namespace deltapipe::kernels::cuda
