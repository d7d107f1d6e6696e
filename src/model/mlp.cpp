#include "model/mlp.h"

#include "kernels/activation.h"

namespace deltapipe {

MlpLayer::MlpLayer(const ModelSpec& spec, ParameterTable& parameters, const std::string& prefix)
    : kind_(spec.mlp),
      up_(parameters.at(prefix + "up_proj.weight")),
      down_(parameters.at(prefix + "down_proj.weight")) {
  if (kind_ == Mlp::gated_silu) gate_ = Linear(parameters.at(prefix + "gate_proj.weight"));
}

void MlpLayer::forward(const Context& c, const Tensor& h, const Tensor& out, Saved& saved, Arena& keep) const {
  const Shape inner{h.dim(0), up_.outputs()};
  saved.up = keep.allocate(h.dtype, inner, "MLP up");
  saved.activated = keep.allocate(h.dtype, inner, "MLP activation");
  up_.forward(c, h, saved.up);
  if (kind_ == Mlp::gated_silu) {
    saved.gate = keep.allocate(h.dtype, inner, "MLP gate");
    gate_.forward(c, h, saved.gate);
    kernels::gated_silu_forward(c.stream, saved.gate, saved.up, saved.activated);
  } else {
    kernels::squared_relu_forward(c.stream, saved.up, saved.activated);
  }
  down_.forward(c, saved.activated, out);
}

void MlpLayer::backward(const Context& c, const Tensor& d_out, const Tensor& h, const Saved& saved,
                        const Tensor& dh) const {
  const auto scope = c.workspace.scope();
  const Tensor d_inner = c.workspace.allocate(h.dtype, saved.up.shape, "MLP d_activation");
  down_.backward(c, d_out, saved.activated, d_inner);
  if (kind_ == Mlp::gated_silu) {
    const Tensor d_gate = c.workspace.allocate(h.dtype, saved.up.shape, "MLP d_gate");
    kernels::gated_silu_backward(c.stream, d_inner, saved.gate, saved.up, d_gate, d_inner);
    gate_.backward(c, d_gate, h, dh);
    up_.backward(c, d_inner, h, dh, true);
  } else {
    kernels::squared_relu_backward(c.stream, d_inner, saved.up, d_inner);
    up_.backward(c, d_inner, h, dh);
  }
}

}  // namespace deltapipe
