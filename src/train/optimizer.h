// AdamW over a ParameterTable: parameter groups by regular expression, global-norm clipping, skipped non-finite steps.
#pragma once

#include "core/arena.h"
#include "core/config.h"
#include "core/stream.h"
#include "kernels/adamw.h"
#include "model/context.h"
#include "model/parameters.h"
#include "train/state_ferry.h"

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace deltapipe {

class Optimizer {
 public:
  /// Part `index` of `count` of every bucket of gradients: the optimizer's shard (ZeRO-1). Of every parameter it is one
  /// contiguous slice, or nothing.
  struct Shard {
    int index = 0;
    int count = 1;
  };

  struct Settings {
    Shard shard;
    std::uint64_t seed = 0;        // of stochastic rounding
    Arena* host_states = nullptr;  // page-locked host memory for the states, with memory.optimizer = "host"
  };

  /// Takes both moments (and, where weights are not in the accumulation dtype, master weights) from `arena` for what of
  /// every parameter with gradient memory lies in the shard. With optimizer.state = "bfloat16" the moments of bfloat16
  /// weights are bfloat16 and there are no master weights: all three are rounded stochastically.
  ///
  /// Decoupled weight decay acts on tensors of two and more dimensions; vectors (norms, biases, A_log, dt_bias) are
  /// never decayed. The first [[optimizer.group]] whose pattern is found in a name sets its learning-rate factor and
  /// may switch its decay off.
  Optimizer(const OptimizerConfig& config, ParameterTable& parameters, Arena& arena, const Settings& settings);
  Optimizer(const OptimizerConfig& config, ParameterTable& parameters, Arena& arena)
      : Optimizer(config, parameters, arena, Settings()) {}

  /// Zero moments and step count: every stage starts its own optimization.
  void reset(const Stream& stream);
  /// Copies weights into the master weights, after weights were loaded.
  void capture_weights(const Stream& stream);

  struct Result {
    double gradient_norm = 0;  // before clipping, over trainable parameters
    bool applied = false;      // false: the norm is not finite and nothing was changed
  };
  /// out (float64 [1]) += the sum of squares of this shard's trainable gradients, but for the parameters that
  /// `leave_out`, when given, names: what another rank counts.
  void add_squared_norm(const Context& c, const Tensor& out, std::string_view leave_out = {}) const;
  /// One update from the gradients of trainable parameters, clipped for a global norm of `gradient_norm`; none when
  /// that is not finite.
  Result apply(const Context& c, double gradient_norm, double learning_rate);
  /// Both, where this shard is everything. Reads one number back from the device.
  Result step(const Context& c, double learning_rate);

  /// Updates applied since reset().
  std::int64_t updates() const { return updates_; }
  void set_updates(std::int64_t n) { updates_ = n; }

  /// What a checkpoint holds of one parameter: elements [begin, end) of its flat values, those of this rank's shard.
  struct State {
    Parameter* parameter;
    std::int64_t begin, end;
    Tensor master, exp_avg, exp_avg_sq;  // [end - begin]; master is the weight itself where there is no other
    bool has_master() const { return master.data != value().data; }
    Tensor gradient() const { return flat(parameter->gradient_memory); }
    Tensor value() const { return flat(parameter->value); }

   private:
    Tensor flat(const Tensor& t) const { return t.view({t.numel()}).rows(begin, end); }
    friend class Optimizer;
  };
  std::span<const State> state() const { return state_; }

 private:
  struct Group {
    double learning_rate_factor = 1.0;
    double weight_decay = 0.0;
  };
  void update(const Context& c, const State& s, const kernels::AdamWStep& step);

  OptimizerConfig config_;
  ParameterTable& parameters_;
  std::uint64_t seed_;
  std::optional<StateFerry> ferry_;  // for states in host memory
  std::vector<State> state_;
  std::vector<Group> group_;  // one an entry of state_
  Tensor norm_;               // float64 [1]
  std::int64_t updates_ = 0;
};

}  // namespace deltapipe
