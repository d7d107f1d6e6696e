#include "data/host_batch.h"

#include "core/device_memory.h"

#include <algorithm>

namespace deltapipe {
namespace {

TokenBatch allocate(Arena& arena, std::int64_t segments, std::int64_t length) {
  const auto flat = [&](const char* label) { return arena.allocate(DType::i32, {segments * length}, label); };
  TokenBatch b;
  b.segments = segments;
  b.length = length;
  b.tokens = flat("tokens");
  b.labels = flat("labels");
  b.start = flat("document starts").view({segments, length});
  b.positions = flat("positions");
  b.key_start = b.start;
  return b;
}

}  // namespace

HostBatch::HostBatch(Arena& host, Arena& device, std::int64_t sequences, std::int64_t length,
                     const SequenceLayout& layout, int rank)
    : layout_(layout), rank_(rank), whole_(allocate(host, sequences, length)), local_(whole_) {
  if (layout_.segments() > 1) {
    local_ = allocate(host, sequences * layout_.local_segments(), layout_.segment_length(length));
    local_.key_start = host.allocate(DType::i32, local_.start.shape, "document starts of keys");
  }
  device_ = device.device().is_cpu() ? local_ : allocate(device, local_.segments, local_.length);
  device_.key_start = local_.key_start;
}

SequenceSpans HostBatch::spans(std::int64_t i) const {
  const auto span = [&](const Tensor& t) {
    return std::span<std::int32_t>(t.as<std::int32_t>() + i * whole_.length, static_cast<std::size_t>(whole_.length));
  };
  return {span(whole_.tokens), span(whole_.labels), span(whole_.start), span(whole_.positions)};
}

void HostBatch::cut(const Stream& stream) const {
  if (layout_.segments() > 1) cut_whole();
  copy(stream, local_.tokens, device_.tokens);
  copy(stream, local_.labels, device_.labels);
  copy(stream, local_.start, device_.start);
  copy(stream, local_.positions, device_.positions);
}

void HostBatch::cut_whole() const {
  cut_batch(layout_, rank_, whole_, local_);
  const std::int32_t* start = local_.start.as<std::int32_t>();
  std::int32_t* key_start = local_.key_start.as<std::int32_t>();
  for (std::int64_t s = 0; s < local_.segments; ++s) {
    const int segment = layout_.segment_at(rank_, static_cast<int>(s % layout_.local_segments()));
    const auto first = static_cast<std::int32_t>(segment * local_.length);
    for (std::int64_t i = s * local_.length; i < (s + 1) * local_.length; ++i) key_start[i] = start[i] + first;
  }
}

std::int64_t HostBatch::count_unmasked() const {
  const std::int32_t* labels = whole_.labels.as<std::int32_t>();
  return std::count_if(labels, labels + whole_.size(), [](std::int32_t l) { return l != masked_label; });
}

TokenBatch HostBatch::microbatch(std::int64_t begin, std::int64_t end) const {
  const std::int64_t a = begin * layout_.local_segments(), b = end * layout_.local_segments();
  const auto flat = [&](const Tensor& t) { return t.rows(a * device_.length, b * device_.length); };
  TokenBatch m;
  m.segments = b - a;
  m.length = device_.length;
  m.tokens = flat(device_.tokens);
  m.labels = flat(device_.labels);
  m.start = device_.start.rows(a, b);
  m.positions = flat(device_.positions);
  m.key_start = device_.key_start.rows(a, b);
  return m;
}

}  // namespace deltapipe
