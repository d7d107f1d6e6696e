// The sequences of one step or evaluation in host memory, cut into microbatches.
#pragma once

#include "core/arena.h"
#include "core/token_batch.h"
#include "data/loader.h"

#include <cstdint>

namespace deltapipe {

class HostBatch {
 public:
  /// Room for `sequences` sequences of `length` tokens, from `arena`.
  HostBatch(Arena& arena, std::int64_t sequences, std::int64_t length);

  std::int64_t sequences() const { return sequences_; }
  std::int64_t length() const { return length_; }
  /// Where sequence i goes.
  SequenceSpans spans(std::int64_t i) const;
  /// Unmasked labels of the first `sequences` sequences.
  std::int64_t count_unmasked(std::int64_t sequences) const;
  /// Sequences [begin, end) as one microbatch.
  TokenBatch microbatch(std::int64_t begin, std::int64_t end) const;

 private:
  std::int64_t sequences_, length_;
  Tensor tokens_, labels_, start_, positions_;  // int32 [sequences, length]
};

}  // namespace deltapipe
