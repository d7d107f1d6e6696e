// Small teachers and students with random weights in float64, for whole-model tests.
#pragma once

#include "comm/sequence_parallel.h"
#include "data/host_batch.h"
#include "distill/distiller.h"
#include "distill/model_set.h"
#include "distill/student_init.h"
#include "kernels/elementwise.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace deltapipe::testing {

inline ModelSpec tiny_teacher(Mlp mlp = Mlp::squared_relu, bool tied = false, std::int64_t layers = 4) {
  ModelSpec s;
  s.model_type = mlp == Mlp::squared_relu ? "arcee" : "llama";
  s.vocabulary = 23;
  s.hidden = 12;
  s.intermediate = 20;
  s.heads = 4;
  s.kv_heads = 2;
  s.head_dim = 6;
  s.max_positions = 4096;
  s.tied_embeddings = tied;
  s.mlp = mlp;
  s.rope = {.theta = 10000.0, .factor = 20.0, .original_max_positions = 64};
  s.mixers.assign(static_cast<std::size_t>(layers), Mixer::rope);
  return s;
}

inline ModelSpec tiny_student(const ModelSpec& teacher, const std::vector<std::string>& mixers,
                              double gate_lower_bound = 0.0) {
  StudentConfig c;
  c.mixers = mixers;
  c.kda.gate_lower_bound = gate_lower_bound;
  c.kda.gate_rank = 3;
  return make_student_spec(c, &teacher, 0);
}

/// Random weights of about unit-scale outputs, a function of (seed, who, name).
void randomize(ParameterTable& table, std::uint64_t seed, const std::string& who);

/// A student, a teacher and one batch, all in memory of measured size.
class TinyJob {
 public:
  TinyJob(const ModelSpec& student, const ModelSpec* teacher, std::int64_t sequences, std::int64_t length,
          Objective objective, bool recompute = false, std::int64_t loss_block = 7, DType dtype = DType::f64,
          const SequenceParallel* sequence = nullptr);

  /// Random weights of about unit-scale outputs, different for every parameter.
  void randomize(std::uint64_t seed);
  /// Random tokens, documents beginning at `starts` (positions in the concatenation of all sequences, 0 included).
  void fill_tokens(std::uint64_t seed, const std::vector<std::int64_t>& starts);

  /// Loss of the batch, without and with gradients (which are zeroed first); under sequence parallelism this rank's
  /// share of both.
  double loss();
  double loss_and_gradients();

  ParameterTable& parameters() { return models_->student_parameters(); }
  ModelSet& models() { return *models_; }
  HostBatch& batch() { return *batch_; }
  const ArenaSet& arenas() const { return arenas_; }
  Objective objective;
  /// Weight of one token; 0: one over the batch's unmasked tokens.
  double token_weight = 0;

 private:
  void build(ArenaSet& arenas, const Stream& stream);
  void run(const Stream& stream, ArenaSet& arenas);

  ModelSpec student_spec_;
  std::unique_ptr<ModelSpec> teacher_spec_;
  std::int64_t sequences_, length_, loss_block_;
  bool recompute_;
  DType dtype_;
  const SequenceParallel* sequence_;  // null: one rank
  ArenaSet arenas_;
  std::unique_ptr<ModelSet> models_;
  std::unique_ptr<HostBatch> batch_;
  LossSums sums_;
  MicrobatchState microbatch_;
};

}  // namespace deltapipe::testing
