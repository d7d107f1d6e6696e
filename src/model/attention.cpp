#include "model/attention.h"

#include "kernels/attention.h"
#include "kernels/rope.h"

#include <cmath>

namespace deltapipe {

Attention::Attention(const ModelSpec& spec, ParameterTable& parameters, const std::string& prefix,
                     const RotaryTable* rotary)
    : heads_(spec.heads),
      kv_heads_(spec.kv_heads),
      head_dim_(spec.head_dim),
      scale_(static_cast<float>(1.0 / std::sqrt(static_cast<double>(spec.head_dim)))),
      rotary_(rotary),
      q_(parameters.at(prefix + "q_proj.weight")),
      k_(parameters.at(prefix + "k_proj.weight")),
      v_(parameters.at(prefix + "v_proj.weight")),
      o_(parameters.at(prefix + "o_proj.weight")) {}

void Attention::forward(const Context& c, const TokenBatch& batch, const Tensor& h, const Tensor& out, Saved& saved,
                        Arena& keep) const {
  const std::int64_t tokens = batch.size(), S = batch.segments, L = batch.length;
  saved.q = keep.allocate(h.dtype, {tokens, heads_ * head_dim_}, "attention q");
  saved.k = keep.allocate(h.dtype, {tokens, kv_heads_ * head_dim_}, "attention k");
  saved.v = keep.allocate(h.dtype, {tokens, kv_heads_ * head_dim_}, "attention v");
  saved.o = keep.allocate(h.dtype, {tokens, heads_ * head_dim_}, "attention output");
  saved.lse = keep.allocate(accumulation_dtype(h.dtype), {S, heads_, L}, "attention log-sum-exp");
  q_.forward(c, h, saved.q);
  k_.forward(c, h, saved.k);
  v_.forward(c, h, saved.v);
  const Tensor q = saved.q.view({tokens, heads_, head_dim_});
  const Tensor k = saved.k.view({tokens, kv_heads_, head_dim_});
  const Tensor v = saved.v.view({tokens, kv_heads_, head_dim_});
  const Tensor o = saved.o.view({tokens, heads_, head_dim_});
  if (rotary_ != nullptr) {
    for (const Tensor& t : {q, k}) {
      kernels::rope_forward(c.stream, t, batch.positions, rotary_->inverse_frequencies, rotary_->attention_factor, t);
    }
  }
  for (std::int64_t s = 0; s < S; ++s) {
    const std::int64_t a = s * L, b = a + L;
    kernels::attention_forward(c.stream, q.rows(a, b), k.rows(a, b), v.rows(a, b), batch.start.at(s), scale_,
                               o.rows(a, b), saved.lse.at(s), c.workspace);
  }
  o_.forward(c, saved.o, out);
}

void Attention::backward(const Context& c, const TokenBatch& batch, const Tensor& d_out, const Tensor& h,
                         const Saved& saved, const Tensor& dh) const {
  const auto scope = c.workspace.scope();
  const std::int64_t tokens = batch.size(), S = batch.segments, L = batch.length;
  const Tensor d_o = c.workspace.allocate(h.dtype, saved.o.shape, "attention d_o");
  const Tensor dq = c.workspace.allocate(h.dtype, saved.q.shape, "attention dq");
  const Tensor dk = c.workspace.allocate(h.dtype, saved.k.shape, "attention dk");
  const Tensor dv = c.workspace.allocate(h.dtype, saved.v.shape, "attention dv");
  o_.backward(c, d_out, saved.o, d_o);
  const Shape by_head{tokens, heads_, head_dim_}, by_kv_head{tokens, kv_heads_, head_dim_};
  for (std::int64_t s = 0; s < S; ++s) {
    const std::int64_t a = s * L, b = a + L;
    const auto query = [&](const Tensor& t) { return t.view(by_head).rows(a, b); };
    const auto key = [&](const Tensor& t) { return t.view(by_kv_head).rows(a, b); };
    kernels::attention_backward(c.stream, query(d_o), query(saved.q), key(saved.k), key(saved.v), query(saved.o),
                                saved.lse.at(s), batch.start.at(s), scale_, query(dq), key(dk), key(dv), false,
                                c.workspace);
  }
  if (rotary_ != nullptr) {
    for (const Tensor& t : {dq.view(by_head), dk.view(by_kv_head)}) {
      kernels::rope_backward(c.stream, t, batch.positions, rotary_->inverse_frequencies, rotary_->attention_factor, t);
    }
  }
  q_.backward(c, dq, h, dh);
  k_.backward(c, dk, h, dh, true);
  v_.backward(c, dv, h, dh, true);
}

}  // namespace deltapipe
