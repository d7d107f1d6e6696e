// The tokens of one microbatch as a rank sees them: S segments of L tokens, each a contiguous run of one sequence. A
// rank that has sequences to itself holds S whole ones; where ranks share sequences (comm/sequence_layout.h), its
// segments of them, sequence by sequence.
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
  Tensor key_start;           // int32 [S, L]: start, counted from the sequence's first token instead of the segment's;
                              // in host memory on every backend (kernels/attention.h)
  std::int64_t size() const { return segments * length; }
};

}  // namespace deltapipe
