#include "comm/sequence_parallel.h"

#include "comm/block_copy.h"
#include "kernels/elementwise.h"

namespace deltapipe {
namespace {

void check_halo(const Tensor& x, const Tensor& halo, const char* what) {
  if (x.shape.rank() != 3 || halo.shape.rank() != 3 || halo.dim(0) != x.dim(0) || halo.dim(2) != x.dim(2) ||
      halo.dtype != x.dtype) {
    fail<InternalError>("{}: halo {} {} does not belong to {} {}", what, name_of(halo.dtype), halo.shape.str(),
                        name_of(x.dtype), x.shape.str());
  }
  if (x.dim(1) < halo.dim(1)) {
    fail<ConfigError>(
        "segments of {} tokens are shorter than the {} rows a convolution reaches back: use fewer sequence ranks",
        x.dim(1), halo.dim(1));
  }
}

}  // namespace

std::int64_t SequenceParallel::batch_of(const Tensor& local, const char* what) const {
  const int slots = layout_.local_segments();
  if (local.shape.rank() < 2 || local.dim(0) % slots != 0) {
    fail<InternalError>("{}: {} is not {} segments a sequence", what, local.shape.str(), slots);
  }
  return local.dim(0) / slots;
}

/// Moves `rows` rows of each local segment, from row `from_row`, to the owner of the segment `step` later (+1: the
/// next, -1: the one before). Rows that a segment of this rank receives from this rank itself are packed as well.
SequenceParallel::Started SequenceParallel::start_halo(const Stream& stream, const Tensor& from, std::int64_t from_row,
                                                       const Tensor& out, std::int64_t rows, int step,
                                                       Arena& workspace) const {
  const std::int64_t batch = batch_of(from, "halo"), D = from.dim(2), segment = from.dim(1) * D;
  const int slots = layout_.local_segments(), segments = layout_.segments();
  const auto exists = [&](int g) { return g >= 0 && g < segments; };
  std::array<Transfer, 2> sends, receives;
  std::size_t send_count = 0, receive_count = 0;
  Started started;
  started.out = out;
  started.slots.fill(-1);
  for (int slot = 0; slot < slots; ++slot) {
    const int own = layout_.segment_at(rank(), slot), source = own - step, target = own + step;
    const auto i = static_cast<std::size_t>(slot);
    if (exists(source)) {
      started.packed[i] = workspace.allocate(from.dtype, {batch, rows, D}, "halo received");
      started.slots[i] = slot;
      const int peer = layout_.owner_of(source);
      if (peer == rank()) {
        copy_blocks(stream, batch, rows * D, from, layout_.slot_of(source) * segment + from_row * D, slots * segment,
                    started.packed[i], 0, rows * D);
      } else {
        receives[receive_count++] = {peer, started.packed[i]};
      }
    }
    if (exists(target) && layout_.owner_of(target) != rank()) {
      const Tensor packed = workspace.allocate(from.dtype, {batch, rows, D}, "halo sent");
      copy_blocks(stream, batch, rows * D, from, slot * segment + from_row * D, slots * segment, packed, 0, rows * D);
      sends[send_count++] = {layout_.owner_of(target), packed};
    }
  }
  started.pending =
      comm_.start_exchange(stream, {sends.data(), send_count}, {receives.data(), receive_count}, Purpose::conv_halo);
  return started;
}

SequenceParallel::Started SequenceParallel::start_gather_halo(const Stream& stream, const Tensor& x, const Tensor& halo,
                                                              Arena& workspace) const {
  check_halo(x, halo, "gather_halo");
  const std::int64_t rows = halo.dim(1);
  return start_halo(stream, x, x.dim(1) - rows, halo, rows, +1, workspace);
}

void SequenceParallel::finish_gather_halo(const Stream& stream, Started& started) const {
  started.pending.wait(stream);
  const Tensor& halo = started.out;
  const int slots = layout_.local_segments();
  const std::int64_t block = halo.dim(1) * halo.dim(2), batch = halo.dim(0) / slots;
  for (int slot = 0; slot < slots; ++slot) {
    const auto i = static_cast<std::size_t>(slot);
    if (started.slots[i] >= 0) {
      copy_blocks(stream, batch, block, started.packed[i], 0, block, halo, slot * block, slots * block);
    } else {
      for (std::int64_t b = 0; b < batch; ++b) kernels::fill_zero(stream, halo.at(b * slots + slot));
    }
  }
}

void SequenceParallel::gather_halo(const Stream& stream, const Tensor& x, const Tensor& halo, Arena& workspace) const {
  const auto scope = workspace.scope();
  Started started = start_gather_halo(stream, x, halo, workspace);
  finish_gather_halo(stream, started);
}

void SequenceParallel::return_halo(const Stream& stream, const Tensor& dhalo, const Tensor& dx,
                                   Arena& workspace) const {
  check_halo(dx, dhalo, "return_halo");
  const auto scope = workspace.scope();
  const std::int64_t rows = dhalo.dim(1), length = dx.dim(1);
  Started started = start_halo(stream, dhalo, 0, dx, rows, -1, workspace);
  started.pending.wait(stream);
  const int slots = layout_.local_segments();
  for (int slot = 0; slot < slots; ++slot) {
    const auto i = static_cast<std::size_t>(slot);
    if (started.slots[i] < 0) continue;
    for (std::int64_t b = 0; b < dx.dim(0) / slots; ++b) {
      kernels::add_in_place(stream, started.packed[i].at(b), dx.at(b * slots + slot).rows(length - rows, length));
    }
  }
}

/// The parts of the ranks, in rank order, are the whole as it is.
bool SequenceParallel::is_gathered_in_order(const Tensor& whole) const {
  return layout_.ranks() == 1 || (layout_.local_segments() == 1 && whole.dim(0) == 1);
}

/// by_rank [N, S, L, F] to or from whole [B, T, F].
void SequenceParallel::copy_parts(const Stream& stream, const Tensor& by_rank, const Tensor& whole,
                                  bool to_whole) const {
  const int slots = layout_.local_segments();
  const std::int64_t batch = whole.dim(0), sequence = whole.dim(1) * whole.dim(2);
  const std::int64_t segment = sequence / layout_.segments();
  for (int g = 0; g < layout_.segments(); ++g) {
    const std::int64_t part = (layout_.owner_of(g) * batch * slots + layout_.slot_of(g)) * segment;
    if (to_whole) {
      copy_blocks(stream, batch, segment, by_rank, part, slots * segment, whole, g * segment, sequence);
    } else {
      copy_blocks(stream, batch, segment, whole, g * segment, sequence, by_rank, part, slots * segment);
    }
  }
}

SequenceParallel::Started SequenceParallel::start_gather_keys(const Stream& stream, const Tensor& local,
                                                              const Tensor& whole, Arena& workspace) const {
  const std::int64_t batch = batch_of(local, "gather_keys");
  require(local.shape.rank() == 3 && whole.shape == Shape{batch, local.dim(1) * layout_.segments(), local.dim(2)},
          "gather_keys: whole [B, T, F] does not belong to local [S, L, F]");
  Started started;
  started.out = whole;
  if (!is_gathered_in_order(whole)) {
    started.packed[0] = workspace.allocate(local.dtype, {whole.numel()}, "keys by rank");
  }
  started.pending =
      comm_.start_all_gather(stream, local, started.packed[0] ? started.packed[0] : whole, Purpose::attention_kv);
  return started;
}

void SequenceParallel::finish_gather_keys(const Stream& stream, Started& started) const {
  started.pending.wait(stream);
  if (started.packed[0]) copy_parts(stream, started.packed[0], started.out, true);
}

void SequenceParallel::gather_keys(const Stream& stream, const Tensor& local, const Tensor& whole,
                                   Arena& workspace) const {
  const auto scope = workspace.scope();
  Started started = start_gather_keys(stream, local, whole, workspace);
  finish_gather_keys(stream, started);
}

void SequenceParallel::scatter_key_gradients(const Stream& stream, const Tensor& whole, const Tensor& local,
                                             Arena& workspace) const {
  const std::int64_t batch = batch_of(local, "scatter_key_gradients");
  require(local.shape.rank() == 3 && whole.shape == Shape{batch, local.dim(1) * layout_.segments(), local.dim(2)},
          "scatter_key_gradients: whole [B, T, F] does not belong to local [S, L, F]");
  const auto scope = workspace.scope();
  Tensor by_rank = whole;
  if (!is_gathered_in_order(whole)) {
    by_rank = workspace.allocate(whole.dtype, {whole.numel()}, "key gradients by rank");
    copy_parts(stream, by_rank, whole, false);
  }
  comm_.reduce_scatter_sum(stream, by_rank, local, Purpose::attention_kv, workspace);
}

}  // namespace deltapipe
