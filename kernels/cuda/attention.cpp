// The contract of kernels/attention.h on CUDA: bf16, head sizes that are multiples of 16 up to 256, by cuDNN.
//
// A segment whose queries all belong to one document that begins at key 0 is one dense sequence. Else every document is
// a sequence of a packed call: queries, keys and lse are found by offsets, nothing is moved, and documents cost what
// they are long. cuDNN's plans know the number of sequences and the length of the longest, so both are rounded up to
// powers of two: a handful of plans serves all batches.
//
// Backward. cuDNN sums dq with atomics, in an order that changes from run to run. Its deterministic way holds all
// products dS of a call in memory, heads * queries * keys * 2 bytes, too much for long segments: so queries are taken
// in blocks, a call each, and the keys' gradients of the blocks are summed in float32.
#include "kernels/attention.h"

#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/common.h"
#include "kernels/cuda/cudnn_attention.h"
#include "kernels/settings.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <span>
#include <vector>

namespace deltapipe::kernels::cuda {

decltype(kernels::attention_forward) attention_forward;
decltype(kernels::attention_backward) attention_backward;

namespace {

/// Queries of one call of the deterministic backward. At 20 heads and 32,768 keys a call holds 1.3 GB of dS.
constexpr std::int64_t deterministic_queries = 1024;
constexpr std::int64_t smallest_bucket = 64;  // queries or keys of a tile of cuDNN's kernels

/// Sizes of a call.
struct Sizes {
  const char* call;
  std::int64_t queries, keys, heads, kv_heads, head_dim;
  float scale;

  Sizes(const char* name, const Tensor& q, const Tensor& k, const Tensor& start, float s)
      : call(name),
        queries(q.dim(0)),
        keys(k.dim(0)),
        heads(q.dim(1)),
        kv_heads(k.dim(1)),
        head_dim(q.dim(2)),
        scale(s) {
    if (q.dtype != DType::bf16) {
      fail<InternalError>("{}: q is {}, on CUDA it must be bfloat16", call, name_of(q.dtype));
    }
    if (head_dim % 16 != 0 || head_dim > 256) {
      fail<InternalError>("{}: heads of {} channels, on CUDA they must have a multiple of 16, at most 256", call,
                          head_dim);
    }
    to_int(keys, call);
    if (!start.device.is_cpu()) fail<InternalError>("{}: start is on a device, it must be in host memory", call);
  }
  std::int64_t query_row() const { return heads * head_dim; }
  std::int64_t key_row() const { return kv_heads * head_dim; }
  std::size_t key_elements() const { return static_cast<std::size_t>(keys * key_row()); }
};

std::int64_t bucket(std::int64_t n, std::int64_t all) {
  const auto power = static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(n)));
  const std::int64_t whole = (all + smallest_bucket - 1) / smallest_bucket * smallest_bucket;
  return std::clamp(power, smallest_bucket, whole);
}

/// The documents that the queries belong to, in order.
std::vector<Sequence> documents_of(const Sizes& n, const Tensor& start) {
  const auto* starts = start.as<std::int32_t>();
  const auto offset = static_cast<std::int32_t>(n.keys - n.queries);
  std::vector<Sequence> documents;
  for (std::int32_t i = 0; i < n.queries; ++i) {
    const std::int32_t first = std::max(starts[i], 0);
    if (starts[i] > offset + i || (i > 0 && starts[i] < starts[i - 1])) {
      fail<InternalError>("{}: start[{}] is {}, expected at most {} and at least its predecessor", n.call, i, starts[i],
                          offset + i);
    }
    if (documents.empty() || documents.back().key != first) documents.push_back({i, 0, first, offset + i - first});
    ++documents.back().queries;
    ++documents.back().keys;
  }
  return documents;
}

/// Documents in blocks of at most deterministic_queries queries.
std::vector<Sequence> blocks_of(const std::vector<Sequence>& documents) {
  constexpr auto most = static_cast<std::int32_t>(deterministic_queries);
  std::vector<Sequence> blocks;
  for (const Sequence& d : documents) {
    for (std::int32_t done = 0; done < d.queries; done += most) {
      const std::int32_t queries = std::min(most, d.queries - done);
      blocks.push_back({d.query + done, queries, d.key, d.keys - d.queries + done + queries});
    }
  }
  return blocks;
}

bool is_dense(const Sizes& n, const std::vector<Sequence>& documents) {
  // Shorter ones go the packed way too: cuDNN has no backward of a single query and key.
  return documents.size() == 1 && documents.front().key == 0 && n.queries >= smallest_bucket;
}

AttentionKind dense_kind(const Sizes& n, bool backward) {
  return {.backward = backward,
          .queries = n.queries,
          .keys = n.keys,
          .total_queries = n.queries,
          .total_keys = n.keys,
          .heads = n.heads,
          .kv_heads = n.kv_heads,
          .head_dim = n.head_dim,
          .scale = n.scale};
}

AttentionKind packed_kind(const Sizes& n, bool backward, std::span<const Sequence> sequences) {
  AttentionKind kind = dense_kind(n, backward);
  std::int32_t queries = 0, keys = 0;
  for (const Sequence& s : sequences) {
    queries = std::max(queries, s.queries);
    keys = std::max(keys, s.keys);
  }
  kind.packed = true;
  kind.sequences = static_cast<std::int64_t>(std::bit_ceil(sequences.size()));
  kind.queries = bucket(queries, n.queries);
  kind.keys = bucket(keys, n.keys);
  return kind;
}

/// Sequences of one call, and where in the table they are.
struct Call {
  AttentionKind kind;
  std::span<const Sequence> sequences;
  std::int64_t first = 0;  // entry; a call has one more than kind.sequences
};

std::size_t table_bytes(std::int64_t entries) {
  return static_cast<std::size_t>(entries) * (3 * sizeof(std::int64_t) + 2 * sizeof(std::int32_t));
}

SequenceTable carve_table(void* memory, std::int64_t entries) {
  auto* offsets = static_cast<std::int64_t*>(memory);
  auto* lengths = reinterpret_cast<std::int32_t*>(offsets + 3 * entries);
  return {offsets, offsets + entries, offsets + 2 * entries, lengths, lengths + entries};
}

/// Fills the table: each call's sequences, then empty ones where they end.
void write_table(const Sizes& n, std::span<const Call> calls, const SequenceTable& table, cudaStream_t stream) {
  SequenceList list{};
  int filled = 0, written = 0;
  const auto flush = [&] {
    check(write_sequences(list, written, filled, n.query_row(), n.key_row(), table, stream), n.call);
    written += filled;
    filled = 0;
  };
  for (const Call& c : calls) {
    const Sequence& last = c.sequences.back();
    const Sequence empty{last.query + last.queries, 0, last.key + last.keys, 0};
    for (std::int64_t i = 0; i <= c.kind.sequences; ++i) {
      list.at[filled++] = i < std::ssize(c.sequences) ? c.sequences[static_cast<std::size_t>(i)] : empty;
      if (filled == SequenceList::capacity) flush();
    }
  }
  if (filled > 0) flush();
}

void point_to(const SequenceTable& table, std::int64_t first, AttentionTensors& t) {
  t.query_offsets = table.query_offsets + first;
  t.key_offsets = table.key_offsets + first;
  t.lse_offsets = table.lse_offsets + first;
  t.query_lengths = table.query_lengths + first;
  t.key_lengths = table.key_lengths + first;
}

/// Entries of the table that any documents of this many queries may need, in one call or in blocks.
std::int64_t most_entries(const Sizes& n) {
  return 2 * static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(n.queries))) + 1;
}

void clear(void* memory, std::size_t bytes, const Sizes& n, cudaStream_t stream) {
  if (bytes > 0) check(cudaMemsetAsync(memory, 0, bytes, stream), n.call);
}

/// dk and dv of a call.
struct KeyGradients {
  std::uint16_t *dk, *dv;
};

KeyGradients take_key_gradients(const Sizes& n, Arena& workspace) {
  const auto take = [&] {
    return bits(workspace.allocate(DType::bf16, {n.keys, n.kv_heads, n.head_dim}, "attention key gradients"));
  };
  std::uint16_t* dk = take();
  return {dk, take()};
}

/// One call for all documents. Keys that no query sees get zeros.
void backward_in_one_call(const Sizes& n, const std::vector<Sequence>& documents, AttentionTensors t, bool accumulate,
                          cudaStream_t stream, Arena& workspace) {
  const KeyGradients out{static_cast<std::uint16_t*>(t.dk), static_cast<std::uint16_t*>(t.dv)};
  const KeyGradients into = accumulate ? take_key_gradients(n, workspace) : out;
  t.dk = into.dk;
  t.dv = into.dv;
  const std::size_t unseen = static_cast<std::size_t>(documents.front().key * n.key_row());
  Call call{.kind = dense_kind(n, true), .sequences = documents};
  if (!is_dense(n, documents)) {
    call.kind = packed_kind(n, true, documents);
    const SequenceTable table =
        carve_table(take_workspace(workspace, table_bytes(call.kind.sequences + 1), "attention sequences"),
                    call.kind.sequences + 1);
    write_table(n, {&call, 1}, table, stream);
    point_to(table, 0, t);
    if (!accumulate) {
      clear(out.dk, unseen * sizeof(*out.dk), n, stream);
      clear(out.dv, unseen * sizeof(*out.dv), n, stream);
    }
  }
  void* memory = take_workspace(workspace, attention_plan_workspace(call.kind, n.call), "attention workspace");
  run_attention(call.kind, t, memory, stream, n.call);
  if (!accumulate) return;
  const std::size_t seen = n.key_elements() - unseen;
  check(add_gradients(into.dk + unseen, seen, out.dk + unseen, stream), n.call);
  check(add_gradients(into.dv + unseen, seen, out.dv + unseen, stream), n.call);
}

/// Cuts blocks into calls: short documents go together while they hold no more dS than the largest block does.
std::vector<Call> cut_into_calls(const Sizes& n, std::span<const Sequence> blocks) {
  const auto products = [](const AttentionKind& k) { return k.sequences * k.queries * k.keys; };
  const std::int64_t most = bucket(deterministic_queries, n.queries) * bucket(n.keys, n.keys);
  std::vector<Call> calls;
  std::int64_t entries = 0;
  for (std::size_t begin = 0, end; begin < blocks.size(); begin = end) {
    for (end = begin + 1; end < blocks.size() && blocks[end].key > blocks[end - 1].key; ++end) {
      if (products(packed_kind(n, true, blocks.subspan(begin, end + 1 - begin))) > most) break;
    }
    Call call{packed_kind(n, true, blocks.subspan(begin, end - begin)), blocks.subspan(begin, end - begin), entries};
    call.kind.deterministic = true;
    entries += call.kind.sequences + 1;
    calls.push_back(call);
  }
  return calls;
}

void backward_in_order(const Sizes& n, const std::vector<Sequence>& documents, AttentionTensors t, bool accumulate,
                       cudaStream_t stream, Arena& workspace) {
  const KeyGradients out{static_cast<std::uint16_t*>(t.dk), static_cast<std::uint16_t*>(t.dv)};
  const KeyGradients of_call = take_key_gradients(n, workspace);
  t.dk = of_call.dk;
  t.dv = of_call.dv;
  const std::size_t elements = n.key_elements();
  float* sums = floats(workspace.allocate(DType::f32, {2, n.keys, n.kv_heads, n.head_dim}, "attention key gradients"));
  clear(sums, 2 * elements * sizeof(float), n, stream);
  const std::vector<Sequence> blocks = blocks_of(documents);
  const std::vector<Call> calls = cut_into_calls(n, blocks);
  const std::int64_t entries = calls.back().first + calls.back().kind.sequences + 1;
  const SequenceTable table =
      carve_table(take_workspace(workspace, table_bytes(entries), "attention sequences"), entries);
  write_table(n, calls, table, stream);
  for (const Call& c : calls) {
    const auto scope = workspace.scope();
    point_to(table, c.first, t);
    void* memory = take_workspace(workspace, attention_plan_workspace(c.kind, n.call), "attention workspace");
    run_attention(c.kind, t, memory, stream, n.call);
    const auto begin = static_cast<std::size_t>(c.sequences.front().key * n.key_row());
    const Sequence& last = c.sequences.back();
    const auto count = static_cast<std::size_t>((last.key + last.keys) * n.key_row()) - begin;
    check(add_to_sums(of_call.dk + begin, count, sums + begin, stream), n.call);
    check(add_to_sums(of_call.dv + begin, count, sums + elements + begin, stream), n.call);
  }
  check(round_sums(sums, elements, accumulate, out.dk, stream), n.call);
  check(round_sums(sums + elements, elements, accumulate, out.dv, stream), n.call);
}

}  // namespace

void attention_forward(const Stream& stream, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& start,
                       float scale, const Tensor& o, const Tensor& lse, Arena& workspace) {
  const Sizes n("attention_forward", q, k, start, scale);
  if (n.queries == 0) return;
  const auto scope = workspace.scope();
  if (stream.is_dry()) {
    take_workspace(workspace, table_bytes(most_entries(n)), "attention sequences");
    take_workspace(workspace, attention_workspace_bound(dense_kind(n, false)), "attention workspace");
    return;
  }
  AttentionTensors t{.q = q.data, .k = k.data, .v = v.data, .o = o.data, .lse = lse.data};
  const std::vector<Sequence> documents = documents_of(n, start);
  Call call{.kind = dense_kind(n, false), .sequences = documents};
  if (!is_dense(n, documents)) {
    call.kind = packed_kind(n, false, documents);
    const SequenceTable table =
        carve_table(take_workspace(workspace, table_bytes(call.kind.sequences + 1), "attention sequences"),
                    call.kind.sequences + 1);
    write_table(n, {&call, 1}, table, native(stream));
    point_to(table, 0, t);
  }
  void* memory = take_workspace(workspace, attention_plan_workspace(call.kind, n.call), "attention workspace");
  run_attention(call.kind, t, memory, native(stream), n.call);
}

void attention_backward(const Stream& stream, const Tensor& d_o, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Tensor& o, const Tensor& lse, const Tensor& start, float scale, const Tensor& dq,
                        const Tensor& dk, const Tensor& dv, bool accumulate_kv, Arena& workspace) {
  const Sizes n("attention_backward", q, k, start, scale);
  if (n.queries == 0) return;
  const auto scope = workspace.scope();
  const bool deterministic = settings().deterministic;
  if (stream.is_dry()) {
    AttentionKind kind = dense_kind(n, true);
    if (deterministic || accumulate_kv) take_key_gradients(n, workspace);
    if (deterministic) {
      kind.deterministic = true;
      kind.queries = bucket(deterministic_queries, n.queries);
      kind.keys = bucket(n.keys, n.keys);
      workspace.allocate(DType::f32, {2, n.keys, n.kv_heads, n.head_dim}, "attention key gradients");
    }
    take_workspace(workspace, table_bytes(most_entries(n)), "attention sequences");
    take_workspace(workspace, attention_workspace_bound(kind), "attention workspace");
    return;
  }
  AttentionTensors t{.q = q.data,
                     .k = k.data,
                     .v = v.data,
                     .o = o.data,
                     .lse = lse.data,
                     .d_o = d_o.data,
                     .dq = dq.data,
                     .dk = dk.data,
                     .dv = dv.data};
  const std::vector<Sequence> documents = documents_of(n, start);
  const auto run = deterministic ? backward_in_order : backward_in_one_call;
  run(n, documents, t, accumulate_kv, native(stream), workspace);
}

}  // namespace deltapipe::kernels::cuda
