// A causal language model, or a range of its layers, as a list of parts that a step calls one by one: embedding,
// blocks, final norm, head.
#pragma once

#include "model/block.h"
#include "model/parameters.h"
#include "model/spec.h"

#include <vector>

namespace deltapipe {

class Transformer {
 public:
  /// Layers point into `parameters`, which holds at least parameters_of(spec, range); the rotary table is taken from
  /// `constants`. Both outlive this object.
  Transformer(const ModelSpec& spec, const LayerRange& range, ParameterTable& parameters, Arena& constants,
              const Stream& stream);
  Transformer(const Transformer&) = delete;
  Transformer& operator=(const Transformer&) = delete;

  const ModelSpec& spec() const { return spec_; }
  DType dtype() const { return dtype_; }
  const LayerRange& range() const { return range_; }
  bool has_embedding() const { return range_.first == 0; }
  bool has_head() const { return range_.last == spec_.layers(); }
  /// `layer` counts from the model's first.
  const Block& block(std::int64_t layer) const { return blocks_[static_cast<std::size_t>(layer - range_.first)]; }

  /// tokens of `batch` -> x [T, D]
  void embed(const Context& c, const TokenBatch& batch, const Tensor& x) const;
  void embed_backward(const Context& c, const TokenBatch& batch, const Tensor& dx) const;

  /// x [T, D] -> y [T, D], rstd [T]
  void final_norm(const Context& c, const Tensor& x, const Tensor& y, const Tensor& rstd) const;
  void final_norm_backward(const Context& c, const Tensor& dy, const Tensor& x, const Tensor& rstd,
                           const Tensor& dx) const;

  /// Vocabulary head over a block of tokens: y [M, D] -> logits [M, N].
  const Linear& head() const { return head_; }

  /// Runs every block without keeping anything: x [T, D] in place. `after_block(l, x)`, when given, sees x after block
  /// l.
  template <class F>
  void run_blocks(const Context& c, const TokenBatch& batch, const Tensor& x, const F& after_block) const {
    for (std::int64_t l = range_.first; l < range_.last; ++l) {
      const auto scope = c.workspace.scope();
      Block::Saved saved;
      block(l).forward(c, batch, x, x, saved, c.workspace);
      after_block(l, x);
    }
  }

 private:
  ModelSpec spec_;
  LayerRange range_;
  DType dtype_;
  RotaryTable rotary_;
  Parameter* embedding_ = nullptr;  // null without the model's first layer
  Parameter* norm_ = nullptr;       // null without its last
  Linear head_;
  std::vector<Block> blocks_;
};

}  // namespace deltapipe
