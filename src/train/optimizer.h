// AdamW over a ParameterTable: parameter groups by regular expression, global-norm clipping, skipped non-finite steps.
#pragma once

#include "core/arena.h"
#include "core/config.h"
#include "core/stream.h"
#include "model/context.h"
#include "model/parameters.h"

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace deltapipe {

class Optimizer {
 public:
  /// Takes both moments (and, where weights are not in the accumulation dtype, master weights) from `arena` for every
  /// parameter that has gradient memory.
  ///
  /// Decoupled weight decay acts on tensors of two and more dimensions; vectors (norms, biases, A_log, dt_bias) are
  /// never decayed. The first [[optimizer.group]] whose pattern is found in a name sets its learning-rate factor and
  /// may switch its decay off.
  Optimizer(const OptimizerConfig& config, ParameterTable& parameters, Arena& arena);

  /// Zero moments and step count: every stage starts its own optimization.
  void reset(const Stream& stream);
  /// Copies weights into the master weights, after weights were loaded.
  void capture_weights(const Stream& stream);

  struct Result {
    double gradient_norm = 0;  // before clipping, over trainable parameters
    bool applied = false;      // false: the norm is not finite and nothing was changed
  };
  /// One update from the gradients of trainable parameters. Reads one number back from the device.
  Result step(const Context& c, double learning_rate);

  /// Updates applied since reset().
  std::int64_t updates() const { return updates_; }
  void set_updates(std::int64_t n) { updates_ = n; }

  /// Named state tensors: what a checkpoint holds.
  struct State {
    const Parameter* parameter;
    Tensor master, exp_avg, exp_avg_sq;
  };
  std::span<const State> state() const { return state_; }

 private:
  struct Group {
    double learning_rate_factor = 1.0;
    double weight_decay = 0.0;
  };
  OptimizerConfig config_;
  ParameterTable& parameters_;
  std::vector<State> state_;
  std::vector<Group> group_;  // one an entry of state_
  Tensor norm_;               // float64 [1]
  std::int64_t updates_ = 0;
};

}  // namespace deltapipe
