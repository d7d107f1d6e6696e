#include "kernels/distill_loss.h"

#include "kernels/dispatch.h"

#include <cmath>

namespace deltapipe::kernels {

DELTAPIPE_KERNEL(distill_loss)

void distill_loss(const Stream& stream, const DistillWeights& weights, const Tensor& student_logits,
                  const Tensor& teacher_logits, const Tensor& labels, double gradient_scale, bool write_gradient,
                  const Tensor& sums, Arena& workspace, std::int64_t classes) {
  require(student_logits.shape.rank() == 2 && student_logits.dim(1) > 0,
          "distill_loss: student_logits is not [M, N] with N > 0");
  if (classes == 0) classes = student_logits.dim(1);
  if (classes < 1 || classes > student_logits.dim(1)) {
    fail<InternalError>("distill_loss: {} classes in student_logits of {}", classes, student_logits.shape.str());
  }
  if (teacher_logits) {
    check_shape(teacher_logits, student_logits.shape, "distill_loss: teacher_logits");
    check_dtype(teacher_logits, student_logits.dtype, "distill_loss: teacher_logits");
  }
  check_shape(labels, {student_logits.dim(0)}, "distill_loss: labels");
  check_dtype(labels, DType::i32, "distill_loss: labels");
  check_shape(sums, {LossSum::count}, "distill_loss: sums");
  check_dtype(sums, DType::f64, "distill_loss: sums");
  const DistillWeights& w = weights;
  for (const float weight : {w.ce, w.kl, w.reverse_kl, w.jsd, w.tvd}) {
    require(weight >= 0 && std::isfinite(weight), "distill_loss: a weight is negative or not finite");
  }
  require(w.temperature > 0 && std::isfinite(w.temperature), "distill_loss: the temperature is not above 0");
  require(w.jsd == 0 || (w.jsd_beta > 0 && w.jsd_beta < 1), "distill_loss: jsd_beta is not between 0 and 1");
  require(teacher_logits || (w.kl == 0 && w.reverse_kl == 0 && w.jsd == 0 && w.tvd == 0),
          "distill_loss: a divergence has a weight, but there are no teacher_logits");
  DELTAPIPE_DISPATCH_WITH_WORKSPACE(stream, distill_loss, stream, weights, student_logits, teacher_logits, labels,
                                    gradient_scale, write_gradient, sums, workspace, classes);
}

}  // namespace deltapipe::kernels
