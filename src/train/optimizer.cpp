#include "train/optimizer.h"

#include "core/device_memory.h"
#include "kernels/adamw.h"
#include "kernels/elementwise.h"
#include "kernels/reduce.h"

#include <algorithm>
#include <cmath>
#include <regex>

namespace deltapipe {

Optimizer::Optimizer(const OptimizerConfig& config, ParameterTable& parameters, Arena& arena, Shard shard)
    : config_(config), parameters_(parameters) {
  const std::int64_t shard_size = parameters.flat_gradients() ? parameters.flat_gradients().numel() / shard.count : 0;
  const std::int64_t shard_begin = shard_size * shard.index;
  std::vector<std::regex> patterns;
  for (const auto& g : config.groups) patterns.emplace_back(g.pattern);
  for (Parameter& p : parameters_.all()) {
    if (!p.gradient_memory) continue;
    const DType dtype = p.gradient_memory.dtype;
    State s;
    s.parameter = &p;
    s.begin = std::max<std::int64_t>(shard_begin - p.gradient_offset, 0);
    s.end = std::min(shard_begin + shard_size - p.gradient_offset, p.gradient_memory.numel());
    if (s.begin >= s.end) continue;
    const Shape shape{s.end - s.begin};
    s.exp_avg = arena.allocate(dtype, shape, p.spec.name.c_str());
    s.exp_avg_sq = arena.allocate(dtype, shape, p.spec.name.c_str());
    s.master = p.value.dtype == dtype ? s.value() : arena.allocate(dtype, shape, p.spec.name.c_str());
    Group group;
    group.weight_decay = p.spec.shape.rank() >= 2 ? config.weight_decay : 0.0;
    for (std::size_t i = 0; i < patterns.size(); ++i) {
      if (!std::regex_search(p.spec.name, patterns[i])) continue;
      group.learning_rate_factor = config.groups[i].learning_rate_factor;
      if (!config.groups[i].decay) group.weight_decay = 0.0;
      break;
    }
    state_.push_back(s);
    group_.push_back(group);
  }
  norm_ = arena.allocate(DType::f64, {1}, "gradient norm");
}

void Optimizer::reset(const Stream& stream) {
  updates_ = 0;
  for (const State& s : state_) {
    kernels::fill_zero(stream, s.exp_avg);
    kernels::fill_zero(stream, s.exp_avg_sq);
  }
}

void Optimizer::capture_weights(const Stream& stream) {
  for (const State& s : state_) {
    if (s.master.data != s.value().data) kernels::copy_cast(stream, s.value(), s.master);
  }
}

void Optimizer::add_squared_norm(const Context& c, const Tensor& out, std::string_view leave_out) const {
  for (const State& s : state_) {
    if (s.parameter->trainable && s.parameter->spec.name != leave_out) {
      kernels::sum_of_squares(c.stream, s.gradient(), out, c.workspace);
    }
  }
}

Optimizer::Result Optimizer::step(const Context& c, double learning_rate) {
  kernels::fill_zero(c.stream, norm_);
  add_squared_norm(c, norm_);
  double squared_norm = 0;
  if (!c.stream.is_dry()) {
    copy(c.stream, norm_, Tensor(&squared_norm, DType::f64, {1}));
    synchronize(c.stream);
  }
  return apply(c, std::sqrt(squared_norm), learning_rate);
}

Optimizer::Result Optimizer::apply(const Context& c, double gradient_norm, double learning_rate) {
  Result result;
  result.gradient_norm = gradient_norm;
  if (!std::isfinite(result.gradient_norm)) return result;
  result.applied = true;
  ++updates_;
  kernels::AdamWStep step;
  step.beta1 = config_.beta1;
  step.beta2 = config_.beta2;
  step.epsilon = config_.epsilon;
  step.step = updates_;
  step.gradient_scale = config_.clip_norm > 0 && result.gradient_norm > config_.clip_norm
                            ? config_.clip_norm / result.gradient_norm
                            : 1.0;
  for (std::size_t i = 0; i < state_.size(); ++i) {
    const State& s = state_[i];
    if (!s.parameter->trainable) continue;
    step.learning_rate = learning_rate * group_[i].learning_rate_factor;
    step.weight_decay = group_[i].weight_decay;
    kernels::adamw(c.stream, step, s.master, s.gradient(), s.exp_avg, s.exp_avg_sq, s.value());
  }
  return result;
}

}  // namespace deltapipe
