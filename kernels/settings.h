// Choices for all kernels of the process, made once before the first of them runs.
#pragma once

#include "core/stream.h"

namespace deltapipe::kernels {

struct Settings {
  /// The same call on the same device gives the same bits. Costs speed in attention's backward on CUDA and lets GEMM
  /// algorithms be chosen by what cuBLASLt expects of them, not by timing. The CPU always is.
  bool deterministic = true;
};

inline Settings& settings() {
  static Settings values;
  return values;
}

/// Called before and after every operation that is run (not measured), with its name, when set: for profiles. An
/// operation on CUDA is only queued in between, unless the observer waits for the stream.
using CallObserver = void (*)(const Stream& stream, const char* name, bool begins);
inline CallObserver call_observer = nullptr;

}  // namespace deltapipe::kernels
