// The sequences of one step or evaluation in host memory, cut into this rank's segments and into microbatches.
#pragma once

#include "comm/sequence_layout.h"
#include "core/arena.h"
#include "core/token_batch.h"
#include "data/loader.h"

#include <cstdint>

namespace deltapipe {

class HostBatch {
 public:
  /// Room for `sequences` sequences of `length` tokens, from `arena`. Rank `rank` of `layout` will work on its segments
  /// of each; whole sequences are kept too (16 bytes a token), as every rank of the layout reads them all.
  HostBatch(Arena& arena, std::int64_t sequences, std::int64_t length,
            const SequenceLayout& layout = SequenceLayout(LayoutKind::contiguous, 1), int rank = 0);

  std::int64_t sequences() const { return whole_.segments; }
  std::int64_t length() const { return whole_.length; }
  /// Where the whole sequence i goes.
  SequenceSpans spans(std::int64_t i) const;
  /// After the sequences were filled: makes this rank's segments of them.
  void cut() const;
  /// Unmasked labels of all sequences, other ranks' segments included.
  std::int64_t count_unmasked() const;
  /// This rank's segments of sequences [begin, end) as one microbatch.
  TokenBatch microbatch(std::int64_t begin, std::int64_t end) const;

 private:
  SequenceLayout layout_;
  int rank_;
  TokenBatch whole_, local_;  // the same memory when the layout has one segment
};

}  // namespace deltapipe
