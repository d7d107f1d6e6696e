#include "comm/sequence_layout.h"

#include "comm/block_copy.h"

namespace deltapipe {

std::string_view name_of(LayoutKind kind) { return kind == LayoutKind::zigzag ? "zigzag" : "contiguous"; }

SequenceLayout::SequenceLayout(LayoutKind kind, int ranks) : kind_(kind), ranks_(ranks) {
  require(ranks >= 1, "SequenceLayout: no ranks");
}

std::int64_t SequenceLayout::segment_length(std::int64_t tokens) const {
  if (tokens <= 0 || tokens % segments() != 0) {
    fail<ConfigError>("a sequence of {} tokens does not divide into {} equal segments (mesh.sequence = {}, layout {})",
                      tokens, segments(), ranks_, name_of(kind_));
  }
  return tokens / segments();
}

void cut_rows(const SequenceLayout& layout, int rank, const Tensor& whole, const Tensor& local) {
  require(whole.shape.rank() == 2 && whole.dtype == DType::i32, "cut_rows: whole is not int32 [B, T]");
  const std::int64_t batch = whole.dim(0), tokens = whole.dim(1), length = layout.segment_length(tokens);
  const int slots = layout.local_segments();
  if (!(local.shape == Shape{batch * slots, length})) {
    fail<InternalError>("cut_rows: local is {}, expected {}", local.shape.str(), Shape{batch * slots, length}.str());
  }
  for (int slot = 0; slot < slots; ++slot) {
    copy_blocks(Stream::cpu(), batch, length, whole, layout.segment_at(rank, slot) * length, tokens, local,
                slot * length, slots * length);
  }
}

void cut_batch(const SequenceLayout& layout, int rank, const TokenBatch& whole, const TokenBatch& local) {
  const Shape from{whole.segments, whole.length}, to{local.segments, local.length};
  const auto cut = [&](const Tensor& a, const Tensor& b) { cut_rows(layout, rank, a.view(from), b.view(to)); };
  cut(whole.tokens, local.tokens);
  cut(whole.labels, local.labels);
  cut(whole.start, local.start);
  cut(whole.positions, local.positions);
  auto* start = local.start.as<std::int32_t>();
  for (std::int64_t s = 0; s < local.segments; ++s) {
    const int slot = static_cast<int>(s % layout.local_segments());
    const auto first = static_cast<std::int32_t>(layout.segment_at(rank, slot) * local.length);
    for (std::int64_t t = 0; t < local.length; ++t) start[s * local.length + t] -= first;
  }
}

}  // namespace deltapipe
