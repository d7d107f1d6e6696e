// What a training stage minimises. Every loss is a mean over the unmasked tokens of the whole global batch; labels mask
// all of them alike.
#pragma once

#include "core/config.h"
#include "core/tensor.h"
#include "kernels/distill_loss.h"
#include "model/spec.h"

#include <cstdint>
#include <utility>
#include <vector>

namespace deltapipe {

struct Objective {
  kernels::DistillWeights head;  // losses on the logits: weights and temperature
  double hidden_cosine = 0;      // 1 - cos of student and teacher hidden states, mean over the mapped layers
  double hidden_mse = 0;         // their squared difference, mean over channels and mapped layers
  double mixer_mse = 0;          // squared difference of mixer outputs on the teacher's hidden states
  /// (student layer, teacher layer): hidden states after these blocks, before the final norm, are compared.
  std::vector<std::pair<std::int64_t, std::int64_t>> hidden_layers;

  bool has_head_losses() const {
    return head.ce > 0 || head.kl > 0 || head.reverse_kl > 0 || head.jsd > 0 || head.tvd > 0;
  }
  bool needs_teacher_logits() const { return head.kl > 0 || head.reverse_kl > 0 || head.jsd > 0 || head.tvd > 0; }
  bool has_hidden_losses() const { return hidden_cosine > 0 || hidden_mse > 0; }
  bool aligns_mixers() const { return mixer_mse > 0; }
  bool needs_teacher() const { return needs_teacher_logits() || has_hidden_losses() || aligns_mixers(); }
  /// The teacher layer that this student layer is compared with, or -1.
  std::int64_t teacher_layer_of(std::int64_t student_layer) const;
};

/// Throws ConfigError when the layer mapping or a needed teacher does not fit the models. `teacher` may be null.
Objective make_objective(const StageConfig& stage, const ModelSpec& student, const ModelSpec* teacher);

/// Sums over unmasked tokens, gathered over the microbatches of a step.
struct LossSums {
  static constexpr int head_count = kernels::LossSum::count;  // losses on logits come first
  static constexpr int hidden_cosine = head_count;            // summed over the mapped layers
  static constexpr int hidden_mse = head_count + 1;           // the same
  static constexpr int mixer_mse = head_count + 2;            // summed over layers
  static constexpr int count = head_count + 3;
  Tensor values;  // float64 [count], device memory
};

/// Means of one step or evaluation, as reported.
struct LossReport {
  double ce = 0, kl = 0, reverse_kl = 0, jsd = 0, tvd = 0;
  double hidden_cosine = 0, hidden_mse = 0, mixer_mse = 0;
  double top1_agreement = 0, student_accuracy = 0, teacher_accuracy = 0, teacher_ce = 0;
  double total = 0;   // the weighted sum that is minimised
  double tokens = 0;  // unmasked tokens
};

/// `sums` in host memory [LossSums::count].
LossReport report_losses(const Objective& objective, const double* sums, std::int64_t layers, double tokens);

}  // namespace deltapipe
