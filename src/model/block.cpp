#include "model/block.h"

#include "kernels/elementwise.h"
#include "kernels/rms_norm.h"

#include <fmt/format.h>

namespace deltapipe {
namespace {

std::string prefix_of(std::int64_t layer) { return fmt::format("model.layers.{}.", layer); }

}  // namespace

Block::Block(const ModelSpec& spec, ParameterTable& parameters, std::int64_t layer, const RotaryTable* rotary)
    : eps_(static_cast<float>(spec.norm_eps)),
      mixer_norm_(&parameters.at(prefix_of(layer) + "input_layernorm.weight")),
      mlp_norm_(&parameters.at(prefix_of(layer) + "post_attention_layernorm.weight")),
      mlp_(spec, parameters, prefix_of(layer) + "mlp.") {
  const Mixer mixer = spec.mixers[static_cast<std::size_t>(layer)];
  const std::string prefix = prefix_of(layer) + "self_attn.";
  if (mixer == Mixer::kda) {
    kda_.emplace(spec, parameters, prefix);
  } else {
    attention_.emplace(spec, parameters, prefix, mixer == Mixer::rope ? rotary : nullptr);
  }
}

void Block::mixer_forward(const Context& c, const TokenBatch& batch, const Tensor& x, const Tensor& out, Saved& saved,
                          Arena& keep) const {
  saved.mixer_in = keep.allocate(x.dtype, x.shape, "mixer input");
  saved.mixer_rstd = keep.allocate(accumulation_dtype(x.dtype), {x.dim(0)}, "mixer norm rstd");
  kernels::rms_norm_forward(c.stream, x, mixer_norm_->value, eps_, saved.mixer_in, saved.mixer_rstd);
  if (kda_) {
    kda_->forward(c, batch, saved.mixer_in, out, saved.kda, keep);
  } else {
    attention_->forward(c, batch, saved.mixer_in, out, saved.attention, keep);
  }
}

void Block::forward(const Context& c, const TokenBatch& batch, const Tensor& x, const Tensor& y, Saved& saved,
                    Arena& keep, const Tensor& mixer_out) const {
  saved.middle = keep.allocate(x.dtype, x.shape, "block middle");
  const Tensor mixed = mixer_out ? mixer_out : saved.middle;
  mixer_forward(c, batch, x, mixed, saved, keep);
  saved.mlp_in = keep.allocate(x.dtype, x.shape, "MLP input");
  saved.mlp_rstd = keep.allocate(accumulation_dtype(x.dtype), {x.dim(0)}, "MLP norm rstd");
  kernels::add_rms_norm_forward(c.stream, x, mixed, mlp_norm_->value, eps_, saved.middle, saved.mlp_in, saved.mlp_rstd);
  mlp_.forward(c, saved.mlp_in, y, saved.mlp, keep);
  kernels::add(c.stream, y, saved.middle, y);
}

void Block::run_mixer_backward(const Context& c, const TokenBatch& batch, const Tensor& d_out, const Saved& saved,
                               const Tensor& dh) const {
  if (kda_) {
    kda_->backward(c, batch, d_out, saved.mixer_in, saved.kda, dh);
  } else {
    attention_->backward(c, batch, d_out, saved.mixer_in, saved.attention, dh);
  }
}

void Block::backward(const Context& c, const TokenBatch& batch, const Tensor& dy, const Tensor& x, const Saved& saved,
                     const Tensor& dx) const {
  const auto scope = c.workspace.scope();
  const Tensor d_middle = c.workspace.allocate(x.dtype, x.shape, "block d_middle");
  const Tensor dh = c.workspace.allocate(x.dtype, x.shape, "block dh");
  mlp_.backward(c, dy, saved.mlp_in, saved.mlp, dh);
  kernels::rms_norm_backward(c.stream, dh, saved.middle, mlp_norm_->value, saved.mlp_rstd, dy, d_middle,
                             mlp_norm_->gradient(), c.workspace);
  run_mixer_backward(c, batch, d_middle, saved, dh);
  kernels::rms_norm_backward(c.stream, dh, x, mixer_norm_->value, saved.mixer_rstd, d_middle, dx,
                             mixer_norm_->gradient(), c.workspace);
}

void Block::backward_recomputing(const Context& c, const TokenBatch& batch, const Tensor& dy, const Tensor& x,
                                 const Tensor& dx) const {
  const auto scope = c.workspace.scope();
  const Tensor y = c.workspace.allocate(x.dtype, x.shape, "block output, recomputed");
  Saved saved;
  forward(c, batch, x, y, saved, c.workspace);
  backward(c, batch, dy, x, saved, dx);
}

void Block::mixer_backward(const Context& c, const TokenBatch& batch, const Tensor& d_out, const Tensor& x,
                           const Saved& saved) const {
  const auto scope = c.workspace.scope();
  const Tensor dh = c.workspace.allocate(x.dtype, x.shape, "mixer dh");
  run_mixer_backward(c, batch, d_out, saved, dh);
  if (const Tensor dw = mixer_norm_->gradient()) {
    const Tensor dx = c.workspace.allocate(x.dtype, x.shape, "mixer dx");
    kernels::rms_norm_backward(c.stream, dh, x, mixer_norm_->value, saved.mixer_rstd, Tensor(), dx, dw, c.workspace);
  }
}

}  // namespace deltapipe
