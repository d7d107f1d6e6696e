#include "model/attention.h"

#include "comm/sequence_parallel.h"
#include "kernels/attention.h"
#include "kernels/elementwise.h"
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

Attention::Span Attention::span_of(const Context& c, const TokenBatch& batch, std::int64_t s) const {
  const std::int64_t L = batch.length;
  if (c.sequence == nullptr) return {s * L, (s + 1) * L, s * L, (s + 1) * L};
  const SequenceLayout& layout = c.sequence->layout();
  const std::int64_t sequence = s / layout.local_segments();
  const int segment = layout.segment_at(c.sequence->rank(), static_cast<int>(s % layout.local_segments()));
  const std::int64_t first = sequence * L * layout.segments();
  return {s * L, (s + 1) * L, first, first + (segment + 1) * L};
}

void Attention::forward(const Context& c, const TokenBatch& batch, const Tensor& h, const Tensor& out, Saved& saved,
                        Arena& keep) const {
  const std::int64_t tokens = batch.size(), S = batch.segments, L = batch.length;
  saved.q = keep.allocate(h.dtype, {tokens, heads_ * head_dim_}, "attention q");
  saved.k = keep.allocate(h.dtype, {tokens, kv_heads_ * head_dim_}, "attention k");
  saved.v = keep.allocate(h.dtype, {tokens, kv_heads_ * head_dim_}, "attention v");
  saved.o = keep.allocate(h.dtype, {tokens, heads_ * head_dim_}, "attention output");
  saved.lse = keep.allocate(accumulation_dtype(h.dtype), {S, heads_, L}, "attention log-sum-exp");
  const Tensor q = saved.q.view({tokens, heads_, head_dim_});
  const Tensor k = saved.k.view({tokens, kv_heads_, head_dim_});
  const Tensor o = saved.o.view({tokens, heads_, head_dim_});
  const auto rotate = [&](const Tensor& t) {
    if (rotary_ == nullptr) return;
    kernels::rope_forward(c.stream, t, batch.positions, rotary_->inverse_frequencies, rotary_->attention_factor, t);
  };
  saved.all_k = saved.k;
  saved.all_v = saved.v;
  if (c.sequence != nullptr) {
    const SequenceLayout& layout = c.sequence->layout();
    const Shape whole{S / layout.local_segments(), L * layout.segments(), kv_heads_ * head_dim_};
    saved.all_k = keep.allocate(h.dtype, whole, "attention k, all ranks");
    saved.all_v = keep.allocate(h.dtype, whole, "attention v, all ranks");
  }
  // `keep` may be the workspace itself: what is kept stands before this scope.
  const auto scope = c.workspace.scope();
  SequenceParallel::Started gathers[2];  // under way during the projections that follow
  const auto gather = [&](const Tensor& local, const Tensor& whole) {
    if (c.sequence == nullptr) return SequenceParallel::Started();
    return c.sequence->start_gather_keys(c.stream, local.view({S, L, kv_heads_ * head_dim_}), whole, c.workspace);
  };
  k_.forward(c, h, saved.k);
  rotate(k);
  gathers[0] = gather(saved.k, saved.all_k);
  v_.forward(c, h, saved.v);
  gathers[1] = gather(saved.v, saved.all_v);
  q_.forward(c, h, saved.q);
  rotate(q);
  if (c.sequence != nullptr) {
    for (auto& g : gathers) c.sequence->finish_gather_keys(c.stream, g);
  }
  const Shape all_keys{saved.all_k.numel() / (kv_heads_ * head_dim_), kv_heads_, head_dim_};
  for (std::int64_t s = 0; s < S; ++s) {
    const Span at = span_of(c, batch, s);
    kernels::attention_forward(c.stream, q.rows(at.query_begin, at.query_end),
                               saved.all_k.view(all_keys).rows(at.key_begin, at.key_end),
                               saved.all_v.view(all_keys).rows(at.key_begin, at.key_end), batch.key_start.at(s), scale_,
                               o.rows(at.query_begin, at.query_end), saved.lse.at(s), c.workspace);
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
  // Segments of one sequence add to the same keys' gradients, and so do other ranks' segments.
  const bool shared = c.sequence != nullptr;
  const Shape all_keys{saved.all_k.numel() / (kv_heads_ * head_dim_), kv_heads_, head_dim_};
  const Tensor all_dk = shared ? c.workspace.allocate(h.dtype, saved.all_k.shape, "attention dk, all ranks") : dk;
  const Tensor all_dv = shared ? c.workspace.allocate(h.dtype, saved.all_v.shape, "attention dv, all ranks") : dv;
  if (shared) {
    kernels::fill_zero(c.stream, all_dk);
    kernels::fill_zero(c.stream, all_dv);
  }
  for (std::int64_t s = 0; s < S; ++s) {
    const Span at = span_of(c, batch, s);
    const auto query = [&](const Tensor& t) { return t.view(by_head).rows(at.query_begin, at.query_end); };
    const auto key = [&](const Tensor& t) { return t.view(all_keys).rows(at.key_begin, at.key_end); };
    kernels::attention_backward(c.stream, query(d_o), query(saved.q), key(saved.all_k), key(saved.all_v),
                                query(saved.o), saved.lse.at(s), batch.key_start.at(s), scale_, query(dq), key(all_dk),
                                key(all_dv), shared, c.workspace);
  }
  if (shared) {
    const Shape local{S, L, kv_heads_ * head_dim_};
    c.sequence->scatter_key_gradients(c.stream, all_dk, dk.view(local), c.workspace);
    c.sequence->scatter_key_gradients(c.stream, all_dv, dv.view(local), c.workspace);
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
