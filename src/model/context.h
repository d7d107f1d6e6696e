// What every layer call needs beside its tensors.
#pragma once

#include "core/arena.h"
#include "core/stream.h"

namespace deltapipe {

class SequenceParallel;

struct Context {
  Stream stream;
  Arena& workspace;  // scratch inside a call; empty again when the call returns
  const SequenceParallel* sequence =
      nullptr;  // the ranks that share this rank's sequences; null: it has them to itself
};

}  // namespace deltapipe
