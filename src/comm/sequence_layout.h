// How a sequence of T tokens is cut over the N ranks of the sequence axis.
//   contiguous  N segments, rank r owns segment r
//   zigzag      2 N segments, rank r owns segments r and 2 N - 1 - r: the causal attention of an early and a late one
//               together costs every rank the same
// Segments are equal. A rank keeps a batch of B sequences as S = B * local_segments() segments of L tokens, sequence by
// sequence, each in ascending order: its slot s is segment segment_at(rank, s % local_segments()) of sequence
// s / local_segments().
#pragma once

#include "core/token_batch.h"

#include <cstdint>
#include <string_view>

namespace deltapipe {

enum class LayoutKind : std::uint8_t { contiguous, zigzag };
std::string_view name_of(LayoutKind kind);

class SequenceLayout {
 public:
  SequenceLayout(LayoutKind kind, int ranks);

  LayoutKind kind() const { return kind_; }
  int ranks() const { return ranks_; }
  int local_segments() const { return kind_ == LayoutKind::zigzag ? 2 : 1; }
  int segments() const { return ranks_ * local_segments(); }
  int segment_at(int rank, int slot) const { return slot == 0 ? rank : segments() - 1 - rank; }
  int owner_of(int segment) const { return segment < ranks_ ? segment : segments() - 1 - segment; }
  int slot_of(int segment) const { return segment < ranks_ ? 0 : 1; }

  /// L for sequences of `tokens` tokens. Throws ConfigError when they do not divide.
  std::int64_t segment_length(std::int64_t tokens) const;

 private:
  LayoutKind kind_;
  int ranks_;
};

/// A rank's segments out of whole sequences, in host memory: whole [B, T] -> local [B * local_segments, L], int32.
void cut_rows(const SequenceLayout& layout, int rank, const Tensor& whole, const Tensor& local);

/// The same for a batch: `whole` has B segments of T tokens, `local` B * local_segments of L. start is made relative to
/// each segment's first token (negative where the document began before it), positions stay those of the sequence.
void cut_batch(const SequenceLayout& layout, int rank, const TokenBatch& whole, const TokenBatch& local);

}  // namespace deltapipe
