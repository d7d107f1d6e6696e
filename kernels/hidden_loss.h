// Distance between hidden states of student and teacher: cosine and mean squared error, value and gradient, by rows.
// cos(s, t) = s . t / (max(|s|, 1e-8) max(|t|, 1e-8)), the formula in the documentation of
// torch.nn.functional.cosine_similarity, whose default eps is 1e-8. A clamped norm is a constant to the gradient.
//   d(1 - cos) / ds = cos s / |s|^2 - t / (|s| |t|), without the first term where |s| is clamped;  d mse / ds = 2 (s -
//   t) / D
#pragma once

#include "core/arena.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace deltapipe::kernels {

/// student, teacher [M, D] of one dtype; labels int32 [M], rows with -1 are masked; sums float64 [2], added to:
/// {sum of 1 - cos, sum of mean over D of (s - t)^2} over unmasked rows.
/// d_student [M, D] (student's dtype or its accumulation dtype) +=
/// cosine_scale * d(sum of 1 - cos) / ds + mse_scale * d(sum of mse) / ds; masked rows are left as they are. May be
/// empty. Products are summed in float32 or better, totals in float64, with the same bits whatever the number of
/// threads. Workspace: none on the CPU; on CUDA at most 1,584 pairs of float64. Throws InternalError for wrong shapes
/// or dtypes.
void hidden_loss(const Stream& stream, const Tensor& student, const Tensor& teacher, const Tensor& labels,
                 double cosine_scale, double mse_scale, const Tensor& d_student, const Tensor& sums, Arena& workspace);

}  // namespace deltapipe::kernels
