#include "model/kda_mixer.h"

#include "comm/sequence_parallel.h"
#include "kernels/gated_rms_norm.h"
#include "kernels/short_conv.h"

#include <cmath>

namespace deltapipe {
namespace {

/// Memory for what a segment's map prepares and the next call on the same inputs reads; empty where nothing is kept.
Tensor take_records(const Context& c, const kernels::KdaInputs& in) {
  const std::int64_t bytes = kernels::kda_records_bytes(c.stream, in);
  return bytes == 0 ? Tensor() : c.workspace.allocate(DType::u8, {bytes}, "KDA records");
}

}  // namespace

KdaMixer::KdaMixer(const ModelSpec& spec, ParameterTable& parameters, const std::string& prefix)
    : spec_(spec.kda),
      norm_eps_(static_cast<float>(spec.norm_eps)),
      projections_{Linear(parameters.at(prefix + "q_proj.weight")), Linear(parameters.at(prefix + "k_proj.weight")),
                   Linear(parameters.at(prefix + "v_proj.weight"))},
      convolutions_{&parameters.at(prefix + "q_conv1d.weight"), &parameters.at(prefix + "k_conv1d.weight"),
                    &parameters.at(prefix + "v_conv1d.weight")},
      f_inner_(parameters.at(prefix + "f_proj.0.weight")),
      f_(parameters.at(prefix + "f_proj.1.weight")),
      g_inner_(parameters.at(prefix + "g_proj.0.weight")),
      g_(parameters.at(prefix + "g_proj.1.weight"), &parameters.at(prefix + "g_proj.1.bias")),
      b_(parameters.at(prefix + "b_proj.weight")),
      o_(parameters.at(prefix + "o_proj.weight")),
      a_log_(&parameters.at(prefix + "A_log")),
      dt_bias_(&parameters.at(prefix + "dt_bias")),
      o_norm_(&parameters.at(prefix + "o_norm.weight")) {}

Tensor KdaMixer::convolution_weight(int i) const {
  return convolutions_[static_cast<std::size_t>(i)]->value.view({spec_.width(), spec_.conv_width});
}

kernels::KdaInputs KdaMixer::inputs(const TokenBatch& batch, const Saved& saved) const {
  const Shape heads{batch.segments, batch.length, spec_.heads, spec_.head_dim};
  kernels::KdaInputs in;
  in.q = saved.convolved[0].view(heads);
  in.k = saved.convolved[1].view(heads);
  in.v = saved.convolved[2].view(heads);
  in.f = saved.f.view(heads);
  in.b = saved.b.view({batch.segments, batch.length, spec_.heads});
  in.a_log = a_log_->value;
  in.dt_bias = dt_bias_->value.view({spec_.heads, spec_.head_dim});
  in.start = batch.start;
  in.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(spec_.head_dim)));
  in.gate_lower_bound = static_cast<float>(spec_.gate_lower_bound);
  return in;
}

void KdaMixer::forward(const Context& c, const TokenBatch& batch, const Tensor& h, const Tensor& out, Saved& saved,
                       Arena& keep) const {
  const std::int64_t tokens = batch.size(), width = spec_.width();
  const Shape by_segment{batch.segments, batch.length, width};
  const Shape by_head{tokens, spec_.heads, spec_.head_dim};
  const auto kept = [&](const Shape& shape, const char* label) { return keep.allocate(h.dtype, shape, label); };
  for (std::size_t i = 0; i < 3; ++i) {
    saved.projected[i] = kept({tokens, width}, "KDA projection");
    saved.convolved[i] = kept({tokens, width}, "KDA convolution");
    if (c.sequence != nullptr && spec_.conv_width > 1) {
      saved.halo[i] = kept({batch.segments, spec_.conv_width - 1, width}, "KDA convolution halo");
    }
  }
  saved.f_inner = kept({tokens, spec_.gate_rank}, "KDA gate, inner");
  saved.f = kept({tokens, width}, "KDA gate");
  saved.g_inner = kept({tokens, spec_.gate_rank}, "KDA output gate, inner");
  saved.g = kept({tokens, width}, "KDA output gate");
  saved.b = kept({tokens, spec_.heads}, "KDA beta");
  saved.o = kept({tokens, width}, "KDA output");
  saved.normed = kept({tokens, width}, "KDA normed output");
  saved.rstd = keep.allocate(accumulation_dtype(h.dtype), {tokens, spec_.heads}, "KDA output rstd");
  const DType acc = accumulation_dtype(h.dtype);
  const Shape states{batch.segments, spec_.heads, spec_.head_dim, spec_.head_dim};
  if (c.sequence != nullptr) {
    saved.map = keep.allocate(acc, states, "KDA segment map");
    saved.state_in = keep.allocate(acc, states, "KDA incoming state");
  }
  // `keep` may be the workspace itself: what is kept stands before this scope.
  const auto scope = c.workspace.scope();
  std::array<SequenceParallel::Started, 3> halos;  // under way during the gates' projections
  for (std::size_t i = 0; i < 3; ++i) {
    projections_[i].forward(c, h, saved.projected[i]);
    if (!saved.halo[i]) continue;
    halos[i] = c.sequence->start_gather_halo(c.stream, saved.projected[i].view(by_segment), saved.halo[i], c.workspace);
  }
  f_inner_.forward(c, h, saved.f_inner);
  f_.forward(c, saved.f_inner, saved.f);
  g_inner_.forward(c, h, saved.g_inner);
  g_.forward(c, saved.g_inner, saved.g);
  b_.forward(c, h, saved.b);
  std::array<kernels::ShortConv, 3> convolutions;
  for (std::size_t i = 0; i < 3; ++i) {
    if (saved.halo[i]) c.sequence->finish_gather_halo(c.stream, halos[i]);
    convolutions[i] = {.x = saved.projected[i].view(by_segment),
                       .w = convolution_weight(static_cast<int>(i)),
                       .halo = saved.halo[i],
                       .y = saved.convolved[i].view(by_segment)};
  }
  kernels::short_conv_forward(c.stream, convolutions, batch.start);
  const kernels::KdaInputs in = inputs(batch, saved);
  Tensor records;
  if (c.sequence != nullptr) {
    records = take_records(c, in);
    const auto scan_scope = c.workspace.scope();
    const Tensor own = c.workspace.allocate(acc, states, "KDA segment state");
    kernels::kda_segment_map(c.stream, in, records, saved.map, own, c.workspace);
    c.sequence->scan(c.stream, saved.map, own, saved.state_in, c.workspace);
  }
  kernels::kda_forward(c.stream, in, records, saved.state_in, saved.o.view(in.v.shape), Tensor(), c.workspace);
  kernels::gated_rms_norm_forward(c.stream, saved.o.view(by_head), saved.g.view(by_head), o_norm_->value, norm_eps_,
                                  saved.normed.view(by_head), saved.rstd);
  o_.forward(c, saved.normed, out);
}

void KdaMixer::backward(const Context& c, const TokenBatch& batch, const Tensor& d_out, const Tensor& h,
                        const Saved& saved, const Tensor& dh) const {
  const auto scope = c.workspace.scope();
  const std::int64_t tokens = batch.size(), width = spec_.width();
  const Shape by_segment{batch.segments, batch.length, width};
  const Shape by_head{tokens, spec_.heads, spec_.head_dim};
  const auto scratch = [&](const Shape& shape, const char* label) {
    return c.workspace.allocate(h.dtype, shape, label);
  };
  // Gated norm and output projection.
  const Tensor d_normed = scratch({tokens, width}, "KDA d_normed");
  const Tensor dg = scratch({tokens, width}, "KDA dg");
  const Tensor dg_inner = scratch({tokens, spec_.gate_rank}, "KDA dg inner");
  o_.backward(c, d_out, saved.normed, d_normed);
  const Tensor& d_o = d_normed;
  kernels::gated_rms_norm_backward(c.stream, d_normed.view(by_head), saved.o.view(by_head), saved.g.view(by_head),
                                   o_norm_->value, saved.rstd, d_o.view(by_head), dg.view(by_head), o_norm_->gradient(),
                                   c.workspace);
  g_.backward(c, dg, saved.g_inner, dg_inner);
  g_inner_.backward(c, dg_inner, h, dh);
  // The KDA operation.
  const kernels::KdaInputs in = inputs(batch, saved);
  std::array<Tensor, 3> d_convolved;
  for (Tensor& t : d_convolved) t = scratch({tokens, width}, "KDA dqkv");
  const Tensor df = scratch({tokens, width}, "KDA df");
  const Tensor df_inner = scratch({tokens, spec_.gate_rank}, "KDA df inner");
  const Tensor db = scratch({tokens, spec_.heads}, "KDA db");
  const Tensor d_dt_bias = dt_bias_->gradient();
  const kernels::KdaGradients gradients{
      .dq = d_convolved[0].view(in.q.shape),
      .dk = d_convolved[1].view(in.q.shape),
      .dv = d_convolved[2].view(in.q.shape),
      .df = df.view(in.q.shape),
      .db = db.view(in.b.shape),
      .da_log = a_log_->gradient(),
      .ddt_bias = d_dt_bias ? d_dt_bias.view({spec_.heads, spec_.head_dim}) : Tensor(),
  };
  Tensor dstate_out, records;
  if (c.sequence != nullptr) {
    records = take_records(c, in);
    dstate_out = c.workspace.allocate(saved.map.dtype, saved.map.shape, "KDA outgoing state gradient");
    const auto scan_scope = c.workspace.scope();
    const Tensor own = c.workspace.allocate(saved.map.dtype, saved.map.shape, "KDA own state gradient");
    kernels::kda_backward_map(c.stream, in, records, d_o.view(in.v.shape), own, c.workspace);
    c.sequence->scan_backward(c.stream, saved.map, own, dstate_out, c.workspace);
  }
  kernels::kda_backward(c.stream, in, records, saved.state_in, d_o.view(in.v.shape), dstate_out, gradients, Tensor(),
                        c.workspace);
  f_.backward(c, df, saved.f_inner, df_inner);
  f_inner_.backward(c, df_inner, h, dh, true);
  b_.backward(c, db, h, dh, true);
  // Convolutions and projections of q, k, v.
  // What else had gradients of this shape is done with.
  const std::array<Tensor, 3> d_projected{d_normed, dg, df};
  std::array<kernels::ShortConvGradient, 3> convolutions;
  for (std::size_t i = 0; i < 3; ++i) {
    const Tensor dw = convolutions_[i]->gradient();
    convolutions[i] = {
        .dy = d_convolved[i].view(by_segment),
        .x = saved.projected[i].view(by_segment),
        .w = convolution_weight(static_cast<int>(i)),
        .halo = saved.halo[i],
        .dx = d_projected[i].view(by_segment),
        .dw = dw ? dw.view({width, spec_.conv_width}) : Tensor(),
        .dhalo = saved.halo[i] ? scratch(saved.halo[i].shape, "KDA convolution halo gradient") : Tensor(),
    };
  }
  kernels::short_conv_backward(c.stream, convolutions, batch.start, c.workspace);
  for (std::size_t i = 0; i < 3; ++i) {
    if (const Tensor& d_halo = convolutions[i].dhalo) {
      c.sequence->return_halo(c.stream, d_halo, convolutions[i].dx, c.workspace);
    }
    projections_[i].backward(c, d_projected[i], h, dh, true);
  }
}

}  // namespace deltapipe
