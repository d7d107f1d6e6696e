// Forward and backward of one microbatch through teacher and student, or through the same range of layers of both, in
// the pieces that a schedule orders:
//   begin_teacher -> forward_teacher, begin_student -> forward_student -> head -> backward_student     (end to end)
//   align_mixers                                          (mixer alignment: no gradient crosses layers)
// Between begin_* and forward_* the hidden state of the range before is put into place, unless the range embeds.
#pragma once

#include "core/arena.h"
#include "core/token_batch.h"
#include "distill/objective.h"
#include "model/transformer.h"

#include <cstdint>
#include <vector>

namespace deltapipe {

/// What one microbatch keeps between the pieces. All tensors live in the activation arena. Index 0 of the vectors is
/// the range's first layer. One object serves microbatch after microbatch, so that its lists take memory once and a
/// step takes none.
struct MicrobatchState {
  TokenBatch batch;
  Tensor teacher;  // [T, D]: the teacher's hidden state; after the final norm where the range ends the model
  std::vector<Tensor> teacher_hidden;  // [T, D] after each compared teacher block, empty elsewhere
  std::vector<Tensor> hidden;          // student: [0] what enters the range, [i + 1] after its block i; each [T, D]
  std::vector<Block::Saved> saved;     // per student block, unless recomputing
  Tensor gradient;                     // [T, D]: of the loss with respect to the hidden state backward has reached
};

class Distiller {
 public:
  /// `teacher` may be null when no loss needs it.
  Distiller(const Transformer& student, const Transformer* teacher, std::int64_t loss_block_tokens, bool recompute)
      : student_(student), teacher_(teacher), loss_block_tokens_(loss_block_tokens), recompute_(recompute) {}

  /// One microbatch, forward and backward: adds to the student's gradients and to `sums`. `token_weight` is 1 over the
  /// unmasked tokens of the whole global batch. Activations are released on return; what `state` held before is of no
  /// matter, and what it holds afterwards is void.
  void train(const Context& c, const TokenBatch& batch, const Objective& objective, double token_weight,
             const LossSums& sums, MicrobatchState& state, Arena& activations) const;

  /// One microbatch, forward only: adds all losses on the logits (and the teacher's, when there is one) to `sums`.
  void evaluate(const Context& c, const TokenBatch& batch, const kernels::DistillWeights& weights, const LossSums& sums,
                MicrobatchState& state, Arena& activations) const;

  /// Takes room for what the teacher leaves behind.
  void begin_teacher(const Objective& objective, MicrobatchState& state, Arena& activations) const;
  void forward_teacher(const Context& c, MicrobatchState& state) const;
  /// Takes room for the student's hidden states: all of them with `keep`, else one.
  void begin_student(MicrobatchState& state, Arena& activations, bool keep) const;
  void forward_student(const Context& c, MicrobatchState& state, Arena& activations, bool keep) const;
  /// Takes room for the gradient of the range's last hidden state.
  void begin_backward(MicrobatchState& state, Arena& activations) const;
  /// Both heads and the losses on logits, a block of tokens at a time. With `train`, state.gradient is overwritten by
  /// the gradient of the student's last hidden state.
  void head(const Context& c, const kernels::DistillWeights& weights, double token_weight, bool train,
            const LossSums& sums, MicrobatchState& state) const;
  /// From state.gradient of the range's output to that of its input; adds the losses on hidden states.
  void backward_student(const Context& c, const Objective& objective, double token_weight, const LossSums& sums,
                        MicrobatchState& state) const;
  void align_mixers(const Context& c, const Objective& objective, double token_weight, const LossSums& sums,
                    const TokenBatch& batch, Arena& activations) const;

 private:
  const Transformer& student_;
  const Transformer* teacher_;
  std::int64_t loss_block_tokens_;
  bool recompute_;
};

}  // namespace deltapipe
