#include "train/optimizer.h"

#include "core/device_memory.h"
#include "core/host_staging.h"
#include "core/random.h"
#include "kernels/adamw.h"
#include "kernels/elementwise.h"
#include "kernels/reduce.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <regex>

namespace deltapipe {

Optimizer::Optimizer(const OptimizerConfig& config, ParameterTable& parameters, Arena& arena, const Settings& settings)
    : config_(config), parameters_(parameters), seed_(settings.seed) {
  const Shard& shard = settings.shard;
  const bool lean = config.state == StateDType::bfloat16;
  bool any_on_host = false;
  std::vector<std::regex> patterns;
  for (const auto& g : config.groups) patterns.emplace_back(g.pattern);
  for (Parameter& p : parameters_.all()) {
    if (!p.gradient_memory) continue;
    const DType dtype = p.gradient_memory.dtype;
    State s;
    s.parameter = &p;
    const auto [shard_begin, shard_end] = parameters.buckets()[p.bucket].shard(shard.index, shard.count);
    s.begin = std::max<std::int64_t>(shard_begin - p.gradient_offset, 0);
    s.end = std::min(shard_end - p.gradient_offset, p.gradient_memory.numel());
    if (s.begin >= s.end) continue;
    const Shape shape{s.end - s.begin};
    // The few weights that are float32 themselves (A_log, dt_bias) have no other master and stay on the device.
    const bool is_rounded = p.value.dtype != dtype;
    const bool on_host = is_rounded && settings.host_states != nullptr;
    any_on_host |= on_host;
    Arena& place = on_host ? *settings.host_states : arena;
    const DType stored = is_rounded && lean ? p.value.dtype : dtype;
    s.exp_avg = place.allocate(stored, shape, p.spec.name.c_str());
    s.exp_avg_sq = place.allocate(stored, shape, p.spec.name.c_str());
    s.master = is_rounded && !lean ? place.allocate(dtype, shape, p.spec.name.c_str()) : s.value();
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
  if (any_on_host) ferry_.emplace(arena, lean ? DType::bf16 : DType::f32, lean ? 2 : 3);
  norm_ = arena.allocate(DType::f64, {1}, "gradient norm");
}

void Optimizer::reset(const Stream& stream) {
  updates_ = 0;
  synchronize(stream);  // states in host memory may be on their way
  for (const State& s : state_) {
    for (const Tensor& moment : {s.exp_avg, s.exp_avg_sq}) {
      const bool is_here = moment.device == stream.device() || stream.is_dry();
      kernels::fill_zero(is_here ? stream : Stream::cpu(), moment);
    }
  }
}

void Optimizer::capture_weights(const Stream& stream) {
  HostStaging staging;
  for (const State& s : state_) {
    if (!s.has_master()) continue;
    if (s.master.device == stream.device()) {
      kernels::copy_cast(stream, s.value(), s.master);
    } else {
      kernels::copy_cast(Stream::cpu(), staging.read(stream, s.value()), s.master);
    }
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
    update(c, s, step);
  }
  return result;
}

void Optimizer::update(const Context& c, const State& s, const kernels::AdamWStep& step) {
  const Tensor gradient = s.gradient(), value = s.value();
  const bool lean = s.exp_avg.dtype == DType::bf16;
  // Elements [begin, end) of the state, from the moments and the master given.
  const auto run = [&](std::int64_t begin, std::int64_t end, const Tensor& master, const Tensor& exp_avg,
                       const Tensor& exp_avg_sq) {
    const Tensor g = gradient.rows(begin, end), w = value.rows(begin, end);
    if (lean) {
      const kernels::StochasticRounding rounding{seed_, stream_of(s.parameter->spec.name), s.begin + begin};
      kernels::adamw_bfloat16(c.stream, step, rounding, w, g, exp_avg, exp_avg_sq);
    } else {
      kernels::adamw(c.stream, step, master, g, exp_avg, exp_avg_sq, w);
    }
  };
  if (s.exp_avg.device == value.device) {
    run(0, value.numel(), s.master, s.exp_avg, s.exp_avg_sq);
  } else if (lean) {
    ferry_->carry(c.stream, std::array{s.exp_avg, s.exp_avg_sq},
                  [&](std::int64_t begin, std::int64_t end, std::span<const Tensor> moments) {
                    run(begin, end, Tensor(), moments[0], moments[1]);
                  });
  } else {
    ferry_->carry(c.stream, std::array{s.master, s.exp_avg, s.exp_avg_sq},
                  [&](std::int64_t begin, std::int64_t end, std::span<const Tensor> states) {
                    run(begin, end, states[0], states[1], states[2]);
                  });
  }
}

}  // namespace deltapipe
