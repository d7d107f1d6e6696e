#include "data/host_batch.h"

#include <algorithm>

namespace deltapipe {

HostBatch::HostBatch(Arena& arena, std::int64_t sequences, std::int64_t length)
    : sequences_(sequences),
      length_(length),
      tokens_(arena.allocate(DType::i32, {sequences, length}, "tokens")),
      labels_(arena.allocate(DType::i32, {sequences, length}, "labels")),
      start_(arena.allocate(DType::i32, {sequences, length}, "document starts")),
      positions_(arena.allocate(DType::i32, {sequences, length}, "positions")) {}

SequenceSpans HostBatch::spans(std::int64_t i) const {
  const auto span = [&](const Tensor& t) {
    return std::span<std::int32_t>(t.as<std::int32_t>() + i * length_, static_cast<std::size_t>(length_));
  };
  return {span(tokens_), span(labels_), span(start_), span(positions_)};
}

std::int64_t HostBatch::count_unmasked(std::int64_t sequences) const {
  const std::int32_t* labels = labels_.as<std::int32_t>();
  return std::count_if(labels, labels + sequences * length_, [](std::int32_t l) { return l != masked_label; });
}

TokenBatch HostBatch::microbatch(std::int64_t begin, std::int64_t end) const {
  const std::int64_t n = (end - begin) * length_;
  const auto flat = [&](const Tensor& t) { return t.rows(begin, end).view({n}); };
  return {end - begin, length_, flat(tokens_), flat(labels_), start_.rows(begin, end), flat(positions_)};
}

}  // namespace deltapipe
