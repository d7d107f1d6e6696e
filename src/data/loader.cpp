#include "data/loader.h"

#include "core/error.h"
#include "data/sequence_order.h"

#include <algorithm>

namespace deltapipe {

WindowReader::WindowReader(const TokenDataset& dataset, std::int64_t sequence_length, bool isolate_documents)
    : dataset_(dataset), length_(static_cast<std::uint64_t>(sequence_length)), isolate_documents_(isolate_documents) {
  if (sequence_length <= 0 || sequence_length > INT32_MAX) {
    fail<ConfigError>("sequence length {}, expected 1 to {}", sequence_length, INT32_MAX);
  }
  windows_ = dataset.size() / length_;
  if (windows_ == 0) {
    fail<ConfigError>("{}: {} tokens are fewer than one sequence of {}; use more text or shorter sequences",
                      dataset.path().string(), dataset.size(), length_);
  }
}

void WindowReader::fill(std::uint64_t window, const SequenceSpans& out) const {
  require(window < windows_, "WindowReader::fill: no such window");
  require(out.tokens.size() == length_ && out.labels.size() == length_ && out.start.size() == length_ &&
              out.positions.size() == length_,
          "WindowReader::fill: spans must hold one sequence");
  const std::uint64_t begin = window * length_;
  const std::uint64_t end = begin + length_;
  // Ids are below 2^31, so their bits are the same in either sign.
  dataset_.read(begin, {reinterpret_cast<std::uint32_t*>(out.tokens.data()), out.tokens.size()});
  std::copy(out.tokens.begin() + 1, out.tokens.end(), out.labels.begin());

  std::uint64_t document = dataset_.document_of(begin);
  for (std::uint64_t t = begin; t < end; ++document) {  // t: the first token of `document` in the window
    const std::uint64_t document_end = dataset_.document_begin(document + 1);
    const auto start = isolate_documents_ ? static_cast<std::int32_t>(t - begin) : 0;
    for (; t < std::min(end, document_end); ++t) {
      const std::uint64_t i = t - begin;
      out.start[i] = start;
      out.positions[i] = static_cast<std::int32_t>(i) - start;
    }
    if (document_end <= end) {
      out.labels[document_end - 1 - begin] = masked_label;
    } else {  // the document goes on in the next window
      std::uint32_t next = 0;
      dataset_.read(end, {&next, 1});
      out.labels[length_ - 1] = static_cast<std::int32_t>(next);
    }
  }
}

SequenceLoader::SequenceLoader(const TokenDataset& dataset, std::int64_t sequence_length, std::uint64_t seed,
                               bool isolate_documents)
    : reader_(dataset, sequence_length, isolate_documents), seed_(seed) {}

std::uint64_t SequenceLoader::window_of(std::uint64_t position) const {
  const LoaderState state = state_at(position);
  return sequence_order(seed_, state.epoch, state.position, windows());
}

void SequenceLoader::fill(std::uint64_t position, const SequenceSpans& out) const {
  reader_.fill(window_of(position), out);
}

}  // namespace deltapipe
