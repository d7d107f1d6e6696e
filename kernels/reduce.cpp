#include "kernels/reduce.h"

#include "kernels/dispatch.h"

namespace deltapipe::kernels {

DELTAPIPE_KERNEL(sum_of_squares)

void sum_of_squares(const Stream& stream, const Tensor& x, const Tensor& out, Arena& workspace) {
  check_tensor(out, {1}, DType::f64, "sum_of_squares: out");
  DELTAPIPE_DISPATCH_WITH_WORKSPACE(stream, sum_of_squares, stream, x, out, workspace);
}

}  // namespace deltapipe::kernels
