// Forward and backward of one microbatch through teacher and student, or through the same range of layers of both, in
// the pieces that a schedule orders (pipeline/schedule.h):
//   begin_teacher, forward_teacher       what the student needs of the teacher
//   begin_student, forward_student       with both heads and their losses on the range that ends the model
//   backward_student                     with the losses on hidden states
//   align                                mixer alignment in place of the student's two: no gradient crosses layers
// Between begin_* and forward_* the hidden state of the range before is put into place, unless the range embeds; before
// backward_student the gradient of the range's output, unless it ends the model.
#pragma once

#include "core/arena.h"
#include "core/token_batch.h"
#include "distill/objective.h"
#include "model/transformer.h"

#include <cstdint>
#include <vector>

namespace deltapipe {

/// What the teacher's forward of one microbatch leaves. Index 0 of the vectors is the range's first layer. One object
/// serves microbatch after microbatch, so that its lists take memory once and a step takes none.
struct TeacherState {
  TokenBatch batch;
  Tensor x;  // [T, D]: what enters the range, then what leaves it; after the final norm where the range ends the model
  std::vector<Tensor> hidden;               // [T, D] after each block that a hidden loss compares, empty elsewhere
  std::vector<Tensor> mixer_in, mixer_out;  // [T, D] of each block, for alignment alone
};

/// What the student's forward of one microbatch leaves for its backward.
struct StudentState {
  TokenBatch batch;
  std::vector<Tensor> hidden;       // [0] what enters the range, [i + 1] after its block i; each [T, D]
  std::vector<Block::Saved> saved;  // per block, unless recomputing
  Tensor gradient;                  // [T, D]: of the loss with respect to the hidden state backward has reached
};

/// Both of a microbatch that runs from end to end in one call.
struct MicrobatchState {
  TeacherState teacher;
  StudentState student;
};

class Distiller {
 public:
  /// `teacher` may be null when no loss needs it.
  Distiller(const Transformer& student, const Transformer* teacher, std::int64_t loss_block_tokens, bool recompute)
      : student_(&student), teacher_(teacher), loss_block_tokens_(loss_block_tokens), recompute_(recompute) {}

  const Transformer& student() const { return *student_; }
  const Transformer* teacher() const { return teacher_; }

  /// Takes room for what the teacher leaves behind.
  void begin_teacher(const TokenBatch& batch, const Objective& objective, TeacherState& state, Arena& keep) const;
  void forward_teacher(const Context& c, TeacherState& state) const;

  /// Takes room for the student's hidden states and, with `train`, for all that backward needs; otherwise the hidden
  /// state moves in one place.
  void begin_student(const TokenBatch& batch, StudentState& state, Arena& keep, bool train) const;
  /// `keep`, the arena of begin_student, gives room for what the blocks save, with `train` and unless recomputing.
  void forward_student(const Context& c, StudentState& state, Arena& keep, bool train) const;
  /// Both heads and the losses on logits, a block of tokens at a time; `teacher` may be null. With `train`,
  /// state.gradient is overwritten by the gradient of the student's last hidden state.
  void head(const Context& c, const kernels::DistillWeights& weights, double token_weight, bool train,
            const LossSums& sums, const TeacherState* teacher, StudentState& state) const;
  /// head() with the weights of `objective`; without a loss on logits the gradient is zero.
  void finish_forward(const Context& c, const Objective& objective, double token_weight, const LossSums& sums,
                      const TeacherState* teacher, StudentState& state) const;
  /// From state.gradient of the range's output to that of its input; adds the losses on hidden states. `complete` is
  /// told of each layer, and of the embedding, when this microbatch has added all of its gradients; with a tape in the
  /// context layers end there, and of those the tape's run() tells.
  void backward_student(const Context& c, const Objective& objective, double token_weight, const LossSums& sums,
                        const TeacherState* teacher, StudentState& state, const GradientsComplete& complete = {}) const;

  /// Mixer alignment from what forward_teacher kept. `complete` as in backward_student.
  void align(const Context& c, const Objective& objective, double token_weight, const LossSums& sums,
             const TeacherState& teacher, const GradientsComplete& complete = {}) const;
  /// Both for a whole model, layer by layer, so that one layer's tensors exist at a time.
  void align_through(const Context& c, const Objective& objective, double token_weight, const LossSums& sums,
                     const TokenBatch& batch, Arena& activations, const GradientsComplete& complete = {}) const;

 private:
  void align_layer(const Context& c, const TokenBatch& batch, std::int64_t layer, double scale, const Tensor& x,
                   const Tensor& wanted, const Tensor& sums) const;
  double alignment_scale(const Objective& objective, double token_weight) const;

  const Transformer* student_;
  const Transformer* teacher_;
  std::int64_t loss_block_tokens_;
  bool recompute_;
};

}  // namespace deltapipe
