// What every layer call needs beside its tensors.
#pragma once

#include "core/arena.h"
#include "core/stream.h"

namespace deltapipe {

class SequenceParallel;
class WeightTape;

struct Context {
  Stream stream;
  Arena& workspace;  // scratch inside a call; empty again when the call returns
  // The ranks that share this rank's sequences; null: it has them to itself.
  const SequenceParallel* sequence = nullptr;
  WeightTape* tape = nullptr;  // where backward notes the gradients of linear layers' weights; null: it adds them
};

}  // namespace deltapipe
