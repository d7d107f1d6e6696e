// The contract of kernels/hidden_loss.h on CUDA: rows of at most 16,384 bfloat16 or 8,192 float32.
#include "kernels/hidden_loss.h"

#include "kernels/cuda/launches.h"
#include "kernels/cuda/typed.h"

namespace deltapipe::kernels::cuda {

decltype(kernels::hidden_loss) hidden_loss;

void hidden_loss(const Stream& stream, const Tensor& student, const Tensor& teacher, const Tensor& labels,
                 double cosine_scale, double mse_scale, const Tensor& d_student, const Tensor& sums, Arena& workspace) {
  const char* call = "hidden_loss";
  const std::int64_t rows = student.dim(0), d = student.dim(1);
  const auto scope = workspace.scope();
  const Tensor partials =
      workspace.allocate(DType::f64, {hidden_loss_partials(rows), 2}, "hidden-state loss, partial sums");
  if (stream.is_dry()) return;
  for_type(student.dtype, call, [&]<class T>() {
    check_row<T>(d, call);
    const auto launch = [&]<class G>() {
      check(hidden_loss<T, G>(pointer<T>(student, call), pointer<T>(teacher, call), labels.as<std::int32_t>(),
                              cosine_scale, mse_scale, pointer<G>(d_student, call), partials.as<double>(),
                              sums.as<double>(), rows, d, native(stream)),
            call);
    };
    if (!d_student || d_student.dtype == DType::f32) {
      launch.template operator()<float>();
    } else {
      launch.template operator()<T>();
    }
  });
}

}  // namespace deltapipe::kernels::cuda
