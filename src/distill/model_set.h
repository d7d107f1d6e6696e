// Everything of a job that lives in memory: arenas, and teacher and student inside them. The same code runs twice: once
// with measuring arenas and a dry stream, which finds every size, then for real.
#pragma once

#include "core/arena.h"
#include "core/stream.h"
#include "model/transformer.h"

#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace deltapipe {

struct ArenaSet {
  Arena student;  // weights
  Arena teacher;  // weights
  Arena gradients;
  Arena optimizer;    // moments, and master weights where they differ from the weights
  Arena batch;        // tokens, labels, document starts, positions; loss sums
  Arena activations;  // what forward keeps for backward
  Arena workspace;    // scratch inside one call

  static ArenaSet measuring(Device device);
  /// Takes memory of the peaks that this set measured.
  ArenaSet reserve() const;
  std::vector<const Arena*> all() const {
    return {&student, &teacher, &gradients, &optimizer, &batch, &activations, &workspace};
  }
  std::size_t peak_bytes() const;
  /// "student 12.3 MiB, teacher ..., total ...": one line an arena.
  std::string table() const;
};

class ModelSet {
 public:
  /// `teacher` may be null. Weights are uninitialised.
  ModelSet(const ModelSpec& student, const ModelSpec* teacher, DType dtype, ArenaSet& arenas, const Stream& stream);

  ParameterTable& student_parameters() { return student_parameters_; }
  ParameterTable* teacher_parameters() { return teacher_parameters_ ? &*teacher_parameters_ : nullptr; }
  const Transformer& student() const { return *student_; }
  const Transformer* teacher() const { return teacher_.get(); }

 private:
  ParameterTable student_parameters_;
  std::optional<ParameterTable> teacher_parameters_;
  std::unique_ptr<Transformer> student_;
  std::unique_ptr<Transformer> teacher_;
};

}  // namespace deltapipe
