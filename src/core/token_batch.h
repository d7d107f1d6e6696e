// The tokens of one microbatch as a rank sees them: S segments of L tokens, each a contiguous run of one sequence.
#pragma once

#include "core/tensor.h"

#include <cstdint>

namespace deltapipe {

struct TokenBatch {
  std::int64_t segments = 0;  // S
  std::int64_t length = 0;    // L
  Tensor tokens;              // int32 [S * L]
  Tensor labels;              // int32 [S * L]; -1: masked
  Tensor start;               // int32 [S, L]: first token of t's document, relative to the segment's first token
  Tensor positions;           // int32 [S * L]: distance from the document's first token, for rotary embeddings
  std::int64_t size() const { return segments * length; }
};

}  // namespace deltapipe
