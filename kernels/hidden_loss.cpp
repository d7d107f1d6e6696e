#include "kernels/hidden_loss.h"

#include "kernels/dispatch.h"

namespace deltapipe::kernels {

DELTAPIPE_KERNEL(hidden_loss)

void hidden_loss(const Stream& stream, const Tensor& student, const Tensor& teacher, const Tensor& labels,
                 double cosine_scale, double mse_scale, const Tensor& d_student, const Tensor& sums, Arena& workspace) {
  require(student.shape.rank() == 2 && student.dim(1) > 0, "hidden_loss: student is not [M, D] with D > 0");
  check_shape(teacher, student.shape, "hidden_loss: teacher");
  check_dtype(teacher, student.dtype, "hidden_loss: teacher");
  check_shape(labels, {student.dim(0)}, "hidden_loss: labels");
  check_dtype(labels, DType::i32, "hidden_loss: labels");
  if (d_student) {
    check_shape(d_student, student.shape, "hidden_loss: d_student");
    if (d_student.dtype != student.dtype) {
      check_dtype(d_student, accumulation_dtype(student.dtype), "hidden_loss: d_student");
    }
  }
  check_shape(sums, {2}, "hidden_loss: sums");
  check_dtype(sums, DType::f64, "hidden_loss: sums");
  DELTAPIPE_DISPATCH_WITH_WORKSPACE(stream, hidden_loss, stream, student, teacher, labels, cosine_scale, mse_scale,
                                    d_student, sums, workspace);
}

}  // namespace deltapipe::kernels
