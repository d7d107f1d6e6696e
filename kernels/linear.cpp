#include "kernels/linear.h"

#include "kernels/dispatch.h"

namespace deltapipe::kernels {

DELTAPIPE_KERNEL(linear_forward)
DELTAPIPE_KERNEL(linear_backward_input)
DELTAPIPE_KERNEL(linear_backward_weight)

namespace {

/// `t` must be [rows, columns or more].
void check_rows(const Tensor& t, std::int64_t rows, std::int64_t columns, const char* what) {
  if (t.shape.rank() != 2 || t.dim(0) != rows || t.dim(1) < columns) {
    fail<InternalError>("{} is {}, expected {} or longer rows", what, t.shape.str(), Shape{rows, columns}.str());
  }
}

}  // namespace

std::int64_t linear_row(const Stream& stream, DType dtype, std::int64_t outputs) {
  if (stream.device().is_cpu()) return outputs;
  const auto unit = static_cast<std::int64_t>(128 / size_of(dtype));
  return (outputs + unit - 1) / unit * unit;
}

void linear_forward(const Stream& stream, const Tensor& x, const Tensor& w, const Tensor& bias, const Tensor& y) {
  require(x.shape.rank() == 2, "linear_forward: x is not [M, I]");
  require(w.shape.rank() == 2, "linear_forward: w is not [O, I]");
  check_tensor(w, {w.dim(0), x.dim(1)}, x.dtype, "linear_forward: w");
  if (bias) check_tensor(bias, {w.dim(0)}, x.dtype, "linear_forward: bias");
  check_rows(y, x.dim(0), w.dim(0), "linear_forward: y");
  check_dtype(y, x.dtype, "linear_forward: y");
  DELTAPIPE_DISPATCH(stream, linear_forward, stream, x, w, bias, y);
}

void linear_backward_input(const Stream& stream, const Tensor& dy, const Tensor& w, const Tensor& dx, bool accumulate,
                           Arena& workspace) {
  require(dy.shape.rank() == 2, "linear_backward_input: dy is not [M, O]");
  require(w.shape.rank() == 2, "linear_backward_input: w is not [O, I]");
  check_rows(dy, dy.dim(0), w.dim(0), "linear_backward_input: dy");
  check_dtype(w, dy.dtype, "linear_backward_input: w");
  check_tensor(dx, {dy.dim(0), w.dim(1)}, dy.dtype, "linear_backward_input: dx");
  DELTAPIPE_DISPATCH_WITH_WORKSPACE(stream, linear_backward_input, stream, dy, w, dx, accumulate, workspace);
}

void linear_backward_weight(const Stream& stream, const Tensor& dy, const Tensor& x, const Tensor& dw,
                            const Tensor& dbias) {
  require(dy.shape.rank() == 2, "linear_backward_weight: dy is not [M, O]");
  require(x.shape.rank() == 2, "linear_backward_weight: x is not [M, I]");
  check_tensor(x, {dy.dim(0), x.dim(1)}, dy.dtype, "linear_backward_weight: x");
  const DType sums = accumulation_dtype(dy.dtype);
  if (dw) {
    require(dw.shape.rank() == 2, "linear_backward_weight: dw is not [O, I]");
    check_rows(dy, x.dim(0), dw.dim(0), "linear_backward_weight: dy");
    check_tensor(dw, {dw.dim(0), x.dim(1)}, sums, "linear_backward_weight: dw");
  }
  if (dbias) {
    require(dbias.shape.rank() == 1, "linear_backward_weight: dbias is not [O]");
    check_rows(dy, x.dim(0), dbias.dim(0), "linear_backward_weight: dy");
    check_tensor(dbias, dw ? Shape{dw.dim(0)} : dbias.shape, sums, "linear_backward_weight: dbias");
  }
  DELTAPIPE_DISPATCH(stream, linear_backward_weight, stream, dy, x, dw, dbias);
}

}  // namespace deltapipe::kernels
