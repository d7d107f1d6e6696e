// From a token dataset to training sequences of T tokens.
//
// Window w of the token stream is tokens [w T, w T + T); there are floor(N / T) of them, and tokens after the last
// whole window are never seen. For each of its positions t = 0 .. T - 1, all as int32 so that kernels take them
// unchanged:
//   tokens[t]     the token
//   labels[t]     the token that follows it in the stream, or -1 (masked)
//   start[t]      position in the window of the first token of t's document
//   positions[t]  t - start[t]
//
// Corner cases:
// - The label of the last position is the first token of the next window, when the same document goes on there.
// - labels[t] is -1 at the last token of every document (a document never predicts the next one) and at the end of the
//   stream, with and without isolation.
// - A document that began in an earlier window has start 0: its positions count from the window's first token, and its
//   earlier tokens are out of reach.
// - With isolate_documents = false, start is 0 and positions are t everywhere.
// - A window may lie inside one document, or hold many; a document of one token has only a masked label.
#pragma once

#include "data/token_dataset.h"

#include <cstdint>
#include <span>

namespace deltapipe {

inline constexpr std::int32_t masked_label = -1;

/// Where one sequence goes; each of T elements, owned by the caller.
struct SequenceSpans {
  std::span<std::int32_t> tokens;
  std::span<std::int32_t> labels;
  std::span<std::int32_t> start;
  std::span<std::int32_t> positions;
};

/// Windows by number, in the order of the file: what evaluation reads. Allocates nothing after construction; fill may
/// be called from several threads.
class WindowReader {
 public:
  /// `dataset` must outlive this object. Throws ConfigError when T is not positive or the dataset is shorter than one
  /// window.
  WindowReader(const TokenDataset& dataset, std::int64_t sequence_length, bool isolate_documents);

  std::uint64_t windows() const { return windows_; }
  std::int64_t sequence_length() const { return static_cast<std::int64_t>(length_); }
  /// Throws InternalError for a window that does not exist or spans of another length, FormatError for a damaged token.
  void fill(std::uint64_t window, const SequenceSpans& out) const;

 private:
  const TokenDataset& dataset_;
  std::uint64_t length_;
  bool isolate_documents_;
  std::uint64_t windows_;
};

/// Where a stage stands: `position` sequences of `epoch` have been taken.
struct LoaderState {
  std::uint64_t epoch = 0;
  std::uint64_t position = 0;  // in [0, windows)
  friend bool operator==(const LoaderState&, const LoaderState&) = default;
};

/// All windows once an epoch, each epoch in another order (data/sequence_order.h). Any rank may ask for any sequence at
/// any time: what it gets depends on the dataset, T, seed, isolation and the sequence's number alone.
class SequenceLoader {
 public:
  /// As WindowReader.
  SequenceLoader(const TokenDataset& dataset, std::int64_t sequence_length, std::uint64_t seed, bool isolate_documents);

  std::uint64_t windows() const { return reader_.windows(); }
  std::int64_t sequence_length() const { return reader_.sequence_length(); }
  /// Sequence number `position`, counted from the start of the stage over all epochs. Errors as WindowReader::fill.
  void fill(std::uint64_t position, const SequenceSpans& out) const;
  /// The window that `position` shows.
  std::uint64_t window_of(std::uint64_t position) const;

  LoaderState state_at(std::uint64_t position) const { return {position / windows(), position % windows()}; }
  /// Inverse of state_at.
  std::uint64_t position_of(const LoaderState& state) const { return state.epoch * windows() + state.position; }

 private:
  WindowReader reader_;
  std::uint64_t seed_;
};

}  // namespace deltapipe
