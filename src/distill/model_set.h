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
  Arena optimizer;      // moments, and master weights where they differ from the weights
  Arena batch;          // tokens, labels, document starts, positions; loss sums
  Arena activations;    // what forward keeps for backward
  Arena communication;  // what is on its way to other ranks
  Arena workspace;      // scratch inside one call
  Arena host;           // on CUDA: page-locked host memory of batches, sums read back, optimizer states kept there

  static ArenaSet measuring(Device device);
  /// Takes memory of the peaks that this set measured.
  ArenaSet reserve() const;
  /// Those in the device's memory.
  std::vector<const Arena*> all() const {
    return {&student, &teacher, &gradients, &optimizer, &batch, &activations, &communication, &workspace};
  }
  /// Host memory for what the device is given a copy of: `batch` itself on the CPU.
  Arena& staging() { return batch.device().is_cpu() ? batch : host; }
  /// Of all arenas in the device's memory.
  std::size_t peak_bytes() const;
  /// "student 12.3 MiB, teacher ..., total ...": one line an arena.
  std::string table() const;
};

class ModelSet {
 public:
  /// Teacher and student, whole or the given ranges of layers of both (of a pipeline's rank, one a chunk). `teacher`
  /// may be null. Weights are uninitialised.
  ModelSet(const ModelSpec& student, const ModelSpec* teacher, DType dtype, ArenaSet& arenas, const Stream& stream,
           const std::vector<LayerRange>& ranges = {});

  ParameterTable& student_parameters() { return student_.parameters; }
  ParameterTable* teacher_parameters() { return teacher_ ? &teacher_->parameters : nullptr; }
  /// Of the first range, which is the whole model where none was given.
  const Transformer& student() const { return *student_.chunks.front(); }
  const Transformer* teacher() const { return teacher_ ? teacher_->chunks.front().get() : nullptr; }
  const Transformer& student_chunk(std::size_t i) const { return *student_.chunks[i]; }
  const Transformer* teacher_chunk(std::size_t i) const { return teacher_ ? teacher_->chunks[i].get() : nullptr; }
  std::size_t chunks() const { return student_.chunks.size(); }

 private:
  struct Model {
    Model(const ModelSpec& spec, const std::vector<LayerRange>& ranges, DType dtype, Arena& weights,
          const Stream& stream);
    ParameterTable parameters;
    std::vector<std::unique_ptr<Transformer>> chunks;
  };
  Model student_;
  std::unique_ptr<Model> teacher_;
};

}  // namespace deltapipe
