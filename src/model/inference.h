// Forward passes without a loss: logits and greedy generation.
#pragma once

#include "model/transformer.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace deltapipe {

/// tokens of `batch` -> x [T, D] after the final norm.
void final_hidden_states(const Context& c, const Transformer& model, const TokenBatch& batch, const Tensor& x);

/// Logits of the whole batch, `block_tokens` tokens at a time: emit(first token, logits [M, N]).
template <class F>
void for_each_logits(const Context& c, const Transformer& model, const TokenBatch& batch, std::int64_t block_tokens,
                     const F& emit) {
  const auto scope = c.workspace.scope();
  const std::int64_t tokens = batch.size();
  const Tensor x = c.workspace.allocate(model.dtype(), {tokens, model.spec().hidden}, "hidden state");
  final_hidden_states(c, model, batch, x);
  const std::int64_t rows = std::min(block_tokens, tokens);
  const Tensor logits = c.workspace.allocate(model.dtype(), {rows, model.spec().vocabulary}, "logits");
  for (std::int64_t t = 0; t < tokens; t += rows) {
    const std::int64_t end = std::min(t + rows, tokens);
    model.head().forward(c, x.rows(t, end), logits.rows(0, end - t));
    emit(t, logits.rows(0, end - t));
  }
}

/// `logits` [M, N] of any device and float dtype as float64 or, unless they are float64, float32 in host memory, after
/// the stream's work.
class HostLogits {
 public:
  HostLogits(const Stream& stream, const Tensor& logits);
  const Tensor& tensor() const { return tensor_; }

 private:
  std::vector<std::byte> memory_;
  Tensor tensor_;
};

/// Index of the largest entry of each row of `logits` [M, N], the lowest where several are equal. Waits for the stream.
std::vector<std::int64_t> argmax_rows(const Stream& stream, const Tensor& logits);

/// One document of tokens in host memory, as a batch of one segment. Throws FormatError for ids outside [0,
/// vocabulary).
class PromptBatch {
 public:
  PromptBatch(std::span<const std::int64_t> tokens, std::int64_t vocabulary);
  /// On the context's device; takes room from its workspace where that is not the host. This object lives until the
  /// stream is done with it.
  TokenBatch batch(const Context& c) const;

 private:
  std::vector<std::int32_t> tokens_, labels_, start_, positions_;
};

/// `count` tokens that follow `prompt` greedily; every step runs the whole text again, without caches.
std::vector<std::int64_t> generate_greedily(const Context& c, const Transformer& model,
                                            std::span<const std::int64_t> prompt, std::int64_t count);

}  // namespace deltapipe
