// What a rank of the pipeline holds: the chunks of teacher and student, and the way to the ranks before and after.
#pragma once

#include "comm/communicator.h"
#include "data/host_batch.h"
#include "distill/distiller.h"
#include "pipeline/schedule.h"

#include <span>
#include <vector>

namespace deltapipe::pipeline {

class Stages {
 public:
  /// `pipeline` and the models behind `chunks` outlive this object. More than one chunk needs more than one rank.
  Stages(Communicator& pipeline, std::vector<Distiller> chunks);

  /// Prepares the ways of all messages, before the first of them. All ranks of the pipeline call it.
  void connect() const;

  int ranks() const { return pipeline_->size(); }
  int rank() const { return pipeline_->rank(); }
  int chunks() const { return static_cast<int>(chunks_.size()); }
  int count() const { return ranks() * chunks(); }
  int stage_of(int chunk) const { return chunk * ranks() + rank(); }
  bool is_first(int chunk) const { return stage_of(chunk) == 0; }
  bool is_last(int chunk) const { return stage_of(chunk) == count() - 1; }
  const Distiller& chunk(int i) const { return chunks_[static_cast<std::size_t>(i)]; }
  bool has_teacher() const { return chunks_.front().teacher() != nullptr; }

  /// Who a message is for. An evaluation may come while messages of the next step, sent ahead, are under way: they
  /// must not match each other.
  enum class Use : std::uint8_t { training, evaluation };

  // Hidden states go downstream, to the next stage's rank; gradients upstream. Messages of one kind and use arrive in
  // the order sent. A started send borrows its tensor.
  [[nodiscard]] Pending start_send(const Stream& stream, const Tensor& x, MessageKind kind,
                                   Use use = Use::training) const;
  void receive(const Stream& stream, const Tensor& x, MessageKind kind, Use use = Use::training) const;

  /// One microbatch from end to end without gradients: adds all losses on the logits (and the teacher's, when there is
  /// one) to `sums` of the last stage's rank. Every rank of the pipeline calls it with the same batch.
  void evaluate(const Context& c, const TokenBatch& batch, const kernels::DistillWeights& weights, const LossSums& sums,
                MicrobatchState& state, Arena& activations) const;

 private:
  int peer(MessageKind kind, bool sending) const;

  Communicator* pipeline_;
  std::vector<Distiller> chunks_;
};

}  // namespace deltapipe::pipeline
