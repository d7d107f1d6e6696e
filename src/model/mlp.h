// Feed-forward part of a block: down(relu(up h)^2) or down(silu(gate h) * up h).
#pragma once

#include "model/context.h"
#include "model/linear.h"
#include "model/parameters.h"
#include "model/spec.h"

#include <string>

namespace deltapipe {

class MlpLayer {
 public:
  struct Saved {
    Tensor gate;       // [T, F], gated_silu alone
    Tensor up;         // [T, F]
    Tensor activated;  // [T, F]
  };

  /// `prefix` ends in "mlp.".
  MlpLayer(const ModelSpec& spec, ParameterTable& parameters, const std::string& prefix);

  /// h [T, D] -> out [T, D]
  void forward(const Context& c, const Tensor& h, const Tensor& out, Saved& saved, Arena& keep) const;
  /// dh [T, D] is overwritten; weight gradients are added.
  void backward(const Context& c, const Tensor& d_out, const Tensor& h, const Saved& saved, const Tensor& dh) const;

 private:
  Mlp kind_;
  Linear gate_, up_, down_;
};

}  // namespace deltapipe
