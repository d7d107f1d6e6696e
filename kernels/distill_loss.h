// Distillation losses on logits: value and gradient of a weighted sum of cross-entropy and divergences, a row at a
// time.
//
// z_s, z_t: student and teacher logits of one row, N values. p = softmax(z_t / T), q = softmax(z_s / T), T temperature.
//   ce         = -log softmax(z_s)[label]                       always at temperature 1
//   kl         = T^2 KL(p || q), teacher first                  gradient T (q - p)
//   reverse_kl = T^2 KL(q || p)                                 gradient T q (log(q / p) - KL(q || p))
//   jsd        = T^2 [beta KL(p || m) + (1 - beta) KL(q || m)]  gradient T (1 - beta) q (log(q / m) - KL(q || m))
//                with m = beta p + (1 - beta) q
//   tvd        = 1/2 sum |p - q|                                gradient 1 / (2 T) q (sign(q - p) - sum q sign(q - p))
// T^2 keeps the size of a gradient about the same at every temperature (Hinton, Vinyals & Dean, "Distilling the
// Knowledge in a Neural Network", 2015). tvd has no such factor, so that it stays a distance between 0 and 1; sign(0) =
// 0 is its subgradient. jsd as in Agarwal et al., "On-Policy Distillation of Language Models", 2024; tvd as in Wen et
// al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation", 2023.
#pragma once

#include "core/arena.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace deltapipe::kernels {

struct DistillWeights {
  float ce = 0, kl = 0, reverse_kl = 0, jsd = 0, tvd = 0;  // >= 0
  float temperature = 1;                                   // > 0
  float jsd_beta = 0.5f;                                   // weight of the teacher in m; strictly between 0 and 1
};

/// Places in the tensor of sums. Losses are unweighted sums over unmasked rows; the others count rows:
/// top1_agree (argmax of both equal; the lowest index wins ties), *_correct (argmax is the label), tokens (unmasked).
struct LossSum {
  enum : int { ce, kl, reverse_kl, jsd, tvd, top1_agree, student_correct, teacher_correct, teacher_ce, tokens, count };
};

/// student_logits, teacher_logits [M, N] of one dtype; labels int32 [M], a label in [0, N) or -1 for a masked row;
/// sums float64 [LossSum::count], added to. N is `classes` where rows are longer than that, what is beyond is neither
/// read nor written; with 0, N is the rows' length.
///
/// ce, kl, teacher_ce (at temperature 1) and the counts are always summed; reverse_kl, jsd and tvd only where their
/// weight is above 0. teacher_logits may be empty: then every weight but ce is 0, and only ce, student_correct and
/// tokens are summed.
///
/// With write_gradient, student_logits becomes gradient_scale * d(sum over rows of the weighted losses) / d(logits),
/// rounded to its dtype, and 0 in masked rows; else it is unchanged. teacher_logits must not overlap it.
///
/// Exponentials, logarithms and sums are in float32 or better (float64 when the logits are); totals are float64, and
/// the same bits for the same input whatever the number of threads. On the CPU kl and reverse_kl are summed as
/// p log(p / q) - p + q >= 0, so that rounding is second order too where the distributions are close; on CUDA as
/// p log(p / q), whose error is up to 4e-7 T^2 a row. jsd's is relative to itself on both.
/// A logit that is not finite makes the row's sums and gradient non-finite: callers skip such steps.
/// Workspace: none on the CPU; on CUDA [M, LossSum::count] float64, the rows' own sums.
/// Throws InternalError for wrong shapes, dtypes or weights; on the CPU for a label of N or more too, which on CUDA
/// makes ce NaN.
void distill_loss(const Stream& stream, const DistillWeights& weights, const Tensor& student_logits,
                  const Tensor& teacher_logits, const Tensor& labels, double gradient_scale, bool write_gradient,
                  const Tensor& sums, Arena& workspace, std::int64_t classes = 0);

}  // namespace deltapipe::kernels
