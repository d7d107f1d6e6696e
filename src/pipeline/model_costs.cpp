#include "pipeline/model_costs.h"

namespace deltapipe::pipeline {
namespace {

struct LayerWork {
  double products = 0;   // FLOP of matrix products in a forward
  double attention = 0;  // FLOP of attention scores and sums in a forward
  double moved = 0;      // bytes that memory-bound work moves in a forward
};

LayerWork work_of_layer(const ModelSpec& spec, std::int64_t layer, const WorkOfMicrobatch& work) {
  const auto tokens = static_cast<double>(work.tokens);
  LayerWork w;
  for (const ParameterSpec& p : layer_parameters_of(spec, layer)) {
    if (p.shape.rank() == 2) w.products += 2.0 * static_cast<double>(p.shape.numel()) * tokens;
  }
  const Mixer mixer = spec.mixers[static_cast<std::size_t>(layer)];
  if (mixer == Mixer::kda) {
    w.moved += 40.0 * static_cast<double>(spec.kda.width()) * tokens;
  } else {
    const double visible = 0.5 * static_cast<double>(work.sequence_length);
    w.attention += 4.0 * visible * static_cast<double>(spec.heads * spec.head_dim) * tokens;
  }
  w.moved += 24.0 * static_cast<double>(spec.hidden) * tokens;  // norms and residuals, bf16
  return w;
}

}  // namespace

ModelCosts estimate_costs(const ModelSpec& student, const ModelSpec* teacher, const WorkOfMicrobatch& work,
                          const Speed& speed) {
  ModelCosts costs;
  const auto tokens = static_cast<double>(work.tokens);
  for (std::int64_t l = 0; l < student.layers(); ++l) {
    const LayerWork w = work_of_layer(student, l, work);
    StageCost c;
    c.forward_s = (w.products + w.attention) / speed.flops + w.moved / speed.bandwidth;
    c.backward_input_s = (w.products + 2.5 * w.attention) / speed.flops + 3.0 * w.moved / speed.bandwidth;
    c.backward_weight_s = w.products / speed.flops;
    if (work.recompute) c.backward_input_s += c.forward_s;
    c.align_s = c.forward_s + c.backward_input_s + c.backward_weight_s;
    if (teacher != nullptr && l < teacher->layers()) {
      const LayerWork t = work_of_layer(*teacher, l, work);
      c.teacher_forward_s = (t.products + t.attention) / speed.flops + t.moved / speed.bandwidth;
    }
    costs.layers.push_back(c);
  }
  const double row = 4.0 * static_cast<double>(student.hidden) * tokens / speed.bandwidth;
  costs.embedding.forward_s = costs.embedding.teacher_forward_s = row;
  costs.embedding.backward_input_s = 2 * row;
  if (work.trains_head_losses) {
    const double products = 2.0 * static_cast<double>(student.hidden * student.vocabulary) * tokens / speed.flops;
    const double logits = 12.0 * static_cast<double>(student.vocabulary) * tokens / speed.bandwidth;
    costs.head.forward_s = (teacher != nullptr ? 4 : 3) * products + logits;  // forward, and backward of the student's
  }
  return costs;
}

namespace {

/// Of attention or KDA beside their projections, in forward, a token.
double mixer_flops(const ModelSpec& spec, std::int64_t layer, std::int64_t sequence_length) {
  if (spec.mixers[static_cast<std::size_t>(layer)] == Mixer::kda) {
    constexpr double flops_of_head = 182e3, channels = 128;
    const double ratio = static_cast<double>(spec.kda.head_dim) / channels;
    return flops_of_head * ratio * ratio * static_cast<double>(spec.kda.heads);
  }
  return 2.0 * static_cast<double>(sequence_length * spec.heads * spec.head_dim);
}

/// forward(p) for every matrix that a token is multiplied with, and the mixers' own.
template <class F>
double sum_flops(const ModelSpec& spec, std::int64_t sequence_length, double mixer_passes, const F& passes) {
  double sum = 0;
  for (const ParameterSpec& p : parameters_of(spec)) {
    const bool is_lookup = p.layer < 0 && !spec.tied_embeddings;  // a tied embedding is the head, too
    if (p.shape.rank() == 2 && !is_lookup) sum += 2.0 * static_cast<double>(p.shape.numel()) * passes(p);
  }
  for (std::int64_t l = 0; l < spec.layers(); ++l) sum += mixer_passes * mixer_flops(spec, l, sequence_length);
  return sum;
}

}  // namespace

double model_flops_per_token(const ModelSpec& student, const ModelSpec* teacher, std::int64_t sequence_length,
                             const std::function<bool(const ParameterSpec&)>& trained) {
  double sum = sum_flops(student, sequence_length, 3.0, [&](const ParameterSpec& p) { return trained(p) ? 3.0 : 2.0; });
  if (teacher != nullptr) sum += sum_flops(*teacher, sequence_length, 1.0, [](const ParameterSpec&) { return 1.0; });
  return sum;
}

LayerCosts to_layer_costs(const ModelCosts& costs) {
  const auto seconds = [](const StageCost& c) {
    return c.teacher_forward_s + c.forward_s + c.backward_input_s + c.backward_weight_s;
  };
  LayerCosts list;
  for (const StageCost& c : costs.layers) list.layers.push_back(seconds(c));
  list.embedding = seconds(costs.embedding);
  list.head = seconds(costs.head);
  return list;
}

}  // namespace deltapipe::pipeline
