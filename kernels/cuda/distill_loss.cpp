// The contract of kernels/distill_loss.h on CUDA: at most 451,521 classes in bfloat16, 225,761 in float32.
#include "kernels/distill_loss.h"

#include "kernels/cuda/launches.h"
#include "kernels/cuda/typed.h"

namespace deltapipe::kernels::cuda {

decltype(kernels::distill_loss) distill_loss;

void distill_loss(const Stream& stream, const DistillWeights& weights, const Tensor& student_logits,
                  const Tensor& teacher_logits, const Tensor& labels, double gradient_scale, bool write_gradient,
                  const Tensor& sums, Arena& workspace, std::int64_t classes) {
  const char* call = "distill_loss";
  const std::int64_t rows = student_logits.dim(0);
  const auto scope = workspace.scope();
  const Tensor row_sums = workspace.allocate(DType::f64, {rows, LossSum::count}, "distillation loss, sums of rows");
  if (stream.is_dry()) return;
  const double t = teacher_logits ? static_cast<double>(weights.temperature) : 1.0;
  const DistillConstants c{
      .temperature = static_cast<float>(t),
      .inverse_temperature = static_cast<float>(1 / t),
      .beta = weights.jsd_beta,
      .ce = static_cast<float>(gradient_scale * weights.ce),
      .kl = static_cast<float>(gradient_scale * weights.kl * t),
      .reverse_kl = static_cast<float>(gradient_scale * weights.reverse_kl * t),
      .jsd = static_cast<float>(gradient_scale * weights.jsd * t * (1 - static_cast<double>(weights.jsd_beta))),
      .tvd = static_cast<float>(gradient_scale * weights.tvd * 0.5 / t),
      .with_reverse_kl = weights.reverse_kl > 0,
      .with_jsd = weights.jsd > 0,
      .with_tvd = weights.tvd > 0,
      .write_gradient = write_gradient,
  };
  for_type(student_logits.dtype, call, [&]<class T>() {
    if (classes > most_classes<T>()) {
      fail<InternalError>("{}: {} classes, on CUDA at most {} fit", call, classes, most_classes<T>());
    }
    check(distill_loss<T>(c, pointer<T>(student_logits, call), pointer<T>(teacher_logits, call),
                          labels.as<std::int32_t>(), row_sums.as<double>(), rows, classes, student_logits.dim(1),
                          native(stream)),
          call);
  });
  check(add_column_sums(row_sums.as<double>(), rows, LossSum::count, sums.as<double>(), native(stream)), call);
}

}  // namespace deltapipe::kernels::cuda
