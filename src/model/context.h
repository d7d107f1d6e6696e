// What every layer call needs beside its tensors.
#pragma once

#include "core/arena.h"
#include "core/stream.h"

namespace deltapipe {

struct Context {
  Stream stream;
  Arena& workspace;  // scratch inside a call; empty again when the call returns
};

}  // namespace deltapipe
