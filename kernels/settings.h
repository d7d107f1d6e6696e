// Choices for all kernels of the process, made once before the first of them runs.
#pragma once

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

}  // namespace deltapipe::kernels
