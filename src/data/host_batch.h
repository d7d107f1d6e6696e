// The sequences of one step or evaluation in host memory, cut into this rank's segments and into microbatches, and
// their copy on the device that computes.
#pragma once

#include "comm/sequence_layout.h"
#include "core/arena.h"
#include "core/stream.h"
#include "core/token_batch.h"
#include "data/loader.h"

#include <cstdint>

namespace deltapipe {

class HostBatch {
 public:
  /// Room for `sequences` sequences of `length` tokens, from `host`, an arena in host memory, and from `device`, which
  /// is the same one on the CPU. Rank `rank` of `layout` will work on its segments of each; whole sequences are kept
  /// too (16 bytes a token), as every rank of the layout reads them all.
  HostBatch(Arena& host, Arena& device, std::int64_t sequences, std::int64_t length,
            const SequenceLayout& layout = SequenceLayout(LayoutKind::contiguous, 1), int rank = 0);

  std::int64_t sequences() const { return whole_.segments; }
  std::int64_t length() const { return whole_.length; }
  /// Where the whole sequence i goes.
  SequenceSpans spans(std::int64_t i) const;
  /// After the sequences were filled: makes this rank's segments of them, and queues their copy to the device. The
  /// sequences stay as they are until that is done.
  void cut(const Stream& stream) const;
  /// Unmasked labels of all sequences, other ranks' segments included.
  std::int64_t count_unmasked() const;
  /// This rank's segments of sequences [begin, end) as one microbatch.
  TokenBatch microbatch(std::int64_t begin, std::int64_t end) const;

 private:
  void cut_whole() const;

  SequenceLayout layout_;
  int rank_;
  TokenBatch whole_, local_;  // the same memory when the layout has one segment
  TokenBatch device_;         // local_, on the CPU the same memory; key_start stays in host memory
};

}  // namespace deltapipe
