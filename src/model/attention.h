// Full attention as a token mixer: grouped-query, causal, with rotary positions (Mixer::rope) or none (Mixer::nope).
#pragma once

#include "core/token_batch.h"
#include "model/context.h"
#include "model/linear.h"
#include "model/parameters.h"
#include "model/spec.h"

#include <string>

namespace deltapipe {

/// Tables shared by all rotary layers of a model.
struct RotaryTable {
  Tensor inverse_frequencies;  // [d / 2], accumulation dtype
  float attention_factor = 1.0f;
};

class Attention {
 public:
  /// Kept from forward to backward. q and k are rotated.
  struct Saved {
    Tensor q, k, v;  // [T, heads * d], [T, kv_heads * d] twice
    Tensor o;        // [T, heads * d]
    Tensor lse;      // [S, heads, L]
    // Under sequence parallelism, of the whole sequences: [B, T, kv_heads * d]; else views of k and v.
    Tensor all_k, all_v;
  };

  /// `prefix` ends in "self_attn."; `rotary` is null for layers without positions.
  Attention(const ModelSpec& spec, ParameterTable& parameters, const std::string& prefix, const RotaryTable* rotary);

  /// h [T, D] (normalised input) -> out [T, D]. `saved` is allocated from `keep`.
  void forward(const Context& c, const TokenBatch& batch, const Tensor& h, const Tensor& out, Saved& saved,
               Arena& keep) const;
  /// dh [T, D] is overwritten; weight gradients are added.
  void backward(const Context& c, const TokenBatch& batch, const Tensor& d_out, const Tensor& h, const Saved& saved,
                const Tensor& dh) const;

 private:
  /// Queries of local segment `s` and the keys from its sequence's beginning up to the segment's last token.
  struct Span {
    std::int64_t query_begin, query_end;  // rows of the local tensors
    std::int64_t key_begin, key_end;      // rows of all keys, sequences one after another
  };
  Span span_of(const Context& c, const TokenBatch& batch, std::int64_t s) const;

  std::int64_t heads_, kv_heads_, head_dim_;
  float scale_;
  const RotaryTable* rotary_;
  Linear q_, k_, v_, o_;
};

}  // namespace deltapipe
