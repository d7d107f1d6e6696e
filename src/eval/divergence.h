// Perplexity of student and teacher, their divergence and agreement on held-out text.
#pragma once

#include "comm/mesh.h"
#include "core/arena.h"
#include "data/host_batch.h"
#include "data/loader.h"
#include "pipeline/stages.h"

#include <cstdint>
#include <optional>
#include <string>

namespace deltapipe {

struct DivergenceResult {
  double tokens = 0;              // unmasked tokens measured
  double student_perplexity = 0;  // exp of the mean cross-entropy
  double student_accuracy = 0;    // top-1 next-token accuracy
  struct AgainstTeacher {
    double teacher_perplexity = 0;
    double teacher_accuracy = 0;
    double kl = 0;              // KL(teacher || student), nats a token, temperature 1
    double top1_agreement = 0;  // share of tokens where both prefer the same next token
  };
  std::optional<AgainstTeacher> teacher;

  /// One line for a log, a table for people, an object for programs.
  std::string line() const;
  std::string table() const;
  std::string json() const;
};

class DivergenceEvaluation {
 public:
  /// Takes its batch of one sequence of `length` tokens, and its sums, from `host` and `batch` (as HostBatch does);
  /// this rank works on its segments of it.
  DivergenceEvaluation(std::int64_t length, Arena& host, Arena& batch,
                       const SequenceLayout& layout = SequenceLayout(LayoutKind::contiguous, 1), int sequence_rank = 0);

  /// The first windows of `reader`, at most `max_tokens` tokens, and at least one window, dealt out over the data axis.
  /// Every rank of the mesh calls it and has the result. On a dry stream one window is measured and `reader` may be
  /// null.
  DivergenceResult run(const Context& c, const pipeline::Stages& stages, Mesh& mesh, const WindowReader* reader,
                       std::int64_t max_tokens, Arena& activations);

 private:
  HostBatch batch_;
  LossSums sums_;
  Tensor host_sums_;  // the same memory on the CPU
  MicrobatchState microbatch_;
};

}  // namespace deltapipe
