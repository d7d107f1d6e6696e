// The contract of kernels/reduce.h on CUDA.
#include "kernels/reduce.h"

#include "kernels/cuda/launches.h"
#include "kernels/cuda/typed.h"

namespace deltapipe::kernels::cuda {

decltype(kernels::sum_of_squares) sum_of_squares;

void sum_of_squares(const Stream& stream, const Tensor& x, const Tensor& out, Arena& workspace) {
  const char* call = "sum_of_squares";
  const auto scope = workspace.scope();
  const Tensor partials =
      workspace.allocate(DType::f64, {sum_of_squares_partials(x.numel())}, "sum of squares, partial sums");
  if (stream.is_dry()) return;
  for_type_or_double(x.dtype, call, [&]<class T>() {
    check(sum_of_squares<T>(pointer<T>(x, call), x.numel(), partials.as<double>(), out.as<double>(), native(stream)),
          call);
  });
}

}  // namespace deltapipe::kernels::cuda
