// The contract of kernels/attention.h on CUDA: bf16, head sizes that are multiples of 16 up to 256, by cuDNN.
//
// A segment whose queries all belong to one document that begins at key 0 is one dense sequence. Else every document is
// a sequence of a packed call: queries, keys and lse are found by offsets, nothing is moved, and documents cost what
// they are long. cuDNN's plans know the number of sequences and the length of the longest, so both are rounded up to
// powers of two: a handful of plans serves all batches.
//
// Backward. cuDNN sums dq with atomics, in an order that changes from run to run. Its deterministic way holds all
// products dS of a call in memory, heads * queries * keys * 2 bytes, too much for long segments. So a call takes the
// query heads of one key/value head and a block of queries, and the keys' gradients of the blocks are summed in
// float32. cuDNN 9.14 left parts of dk and dv unwritten where their rows were shorter than those of k and v, so k and v
// of the head are brought into the layout of its gradients.
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

/// Bytes of dS that a call of the deterministic backward may hold: 4,096 queries of 5 heads at 32,768 keys.
constexpr std::int64_t most_product_bytes = std::int64_t{5} << 28;
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
  std::int64_t group() const { return heads / kv_heads; }
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

/// Queries of a block of the deterministic backward.
std::int64_t block_queries(const Sizes& n) {
  const std::int64_t fit = most_product_bytes / (2 * n.group() * bucket(n.keys, n.keys));
  const auto power = static_cast<std::int64_t>(std::bit_floor(static_cast<std::uint64_t>(fit)));
  return std::clamp(power, smallest_bucket, bucket(n.queries, n.queries));
}

/// Documents in blocks of at most `most` queries.
std::vector<Sequence> blocks_of(const std::vector<Sequence>& documents, std::int32_t most) {
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
          .square = n.queries == n.keys,
          .queries = n.queries,
          .keys = n.keys,
          .total_queries = n.queries,
          .total_keys = n.keys,
          .heads = n.heads,
          .kv_heads = n.kv_heads,
          .head_dim = n.head_dim,
          .query_row = n.query_row(),
          .key_row = n.key_row(),
          .scale = n.scale};
}

/// `base` for packed sequences, of which none has more than `most_queries` queries.
AttentionKind packed_kind(AttentionKind base, std::span<const Sequence> sequences, std::int64_t most_queries) {
  std::int32_t longest = 0;
  base.square = !base.deterministic;  // blocks of queries are of both kinds: one plan for all
  for (const Sequence& s : sequences) {
    longest = std::max(longest, s.keys);
    base.square = base.square && s.queries == s.keys;
  }
  base.packed = true;
  base.sequences = static_cast<std::int64_t>(std::bit_ceil(sequences.size()));
  base.keys = bucket(longest, base.total_keys);
  base.queries = std::min(base.keys, bucket(most_queries, base.total_queries));
  return base;
}

/// One kind of the deterministic backward: a key/value head with its query heads, its keys on their own.
AttentionKind one_head_kind(const Sizes& n) {
  AttentionKind kind = dense_kind(n, true);
  kind.deterministic = true;
  kind.heads = n.group();
  kind.kv_heads = 1;
  kind.key_row = n.head_dim;
  kind.queries = block_queries(n);
  kind.keys = bucket(n.keys, n.keys);
  return kind;
}

/// Sequences of one call, and where in the table they are.
struct Call {
  AttentionKind kind;
  std::span<const Sequence> sequences;
  std::int64_t first = 0;  // entry
};

/// Entries of a call: one more than its sequences, and a multiple of 4, so that the next call's begin at 16 bytes, as
/// cuDNN wants tensors.
std::int64_t entries_of(const AttentionKind& kind) { return (kind.sequences + 1 + 3) / 4 * 4; }

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
  const AttentionKind& kind = calls.front().kind;  // all have the same rows
  const SequenceRows rows{kind.query_row, kind.key_row};
  SequenceList list{};
  int filled = 0, written = 0;
  const auto flush = [&] {
    check(write_sequences(list, written, filled, rows, table, stream), n.call);
    written += filled;
    filled = 0;
  };
  for (const Call& c : calls) {
    const Sequence& last = c.sequences.back();
    const Sequence empty{last.query + last.queries, 0, last.key + last.keys, 0};
    for (std::int64_t i = 0; i < entries_of(c.kind); ++i) {
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
  return 4 * static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(n.queries)));
}

void clear(void* memory, std::size_t bytes, const Sizes& n, cudaStream_t stream) {
  if (bytes > 0) check(cudaMemsetAsync(memory, 0, bytes, stream), n.call);
}

/// The packed call of all documents, its table written.
Call pack(const Sizes& n, const std::vector<Sequence>& documents, bool backward, AttentionTensors& t,
          cudaStream_t stream, Arena& workspace) {
  const Call call{packed_kind(dense_kind(n, backward), documents, n.queries), documents};
  const std::int64_t entries = entries_of(call.kind);
  const SequenceTable table =
      carve_table(take_workspace(workspace, table_bytes(entries), "attention sequences"), entries);
  write_table(n, {&call, 1}, table, stream);
  point_to(table, 0, t);
  return call;
}

void run(const Call& call, const AttentionTensors& t, const Sizes& n, cudaStream_t stream, Arena& workspace) {
  void* memory = take_workspace(workspace, attention_plan_workspace(call.kind, n.call), "attention workspace");
  run_attention(call.kind, t, memory, stream, n.call);
}

/// Tensors shaped like keys: k and v, or dk and dv.
struct KeyPair {
  std::uint16_t *k, *v;
};

KeyPair take_key_pair(std::int64_t elements, const char* label, Arena& workspace) {
  const auto take = [&] { return bits(workspace.allocate(DType::bf16, {elements}, label)); };
  std::uint16_t* k = take();
  return {k, take()};
}
constexpr const char* gradients_label = "attention key gradients";
constexpr const char* head_label = "attention keys of a head";

/// One call for all documents. Keys that no query sees get zeros.
void backward_in_one_call(const Sizes& n, const std::vector<Sequence>& documents, const AttentionTensors& all,
                          bool accumulate, cudaStream_t stream, Arena& workspace) {
  AttentionTensors t = all;
  const KeyPair out{static_cast<std::uint16_t*>(t.dk), static_cast<std::uint16_t*>(t.dv)};
  const KeyPair into = accumulate ? take_key_pair(n.keys * n.key_row(), gradients_label, workspace) : out;
  t.dk = into.k;
  t.dv = into.v;
  const Call call =
      is_dense(n, documents) ? Call{dense_kind(n, true), documents} : pack(n, documents, true, t, stream, workspace);
  run(call, t, n, stream, workspace);
  const auto unseen = static_cast<std::size_t>(documents.front().key * n.key_row());
  if (!accumulate) {
    clear(out.k, unseen * sizeof(*out.k), n, stream);
    clear(out.v, unseen * sizeof(*out.v), n, stream);
    return;
  }
  const std::size_t seen = static_cast<std::size_t>(n.keys * n.key_row()) - unseen;
  check(add_gradients(into.k + unseen, seen, out.k + unseen, stream), n.call);
  check(add_gradients(into.v + unseen, seen, out.v + unseen, stream), n.call);
}

/// Cuts blocks into calls: short documents go together while they hold no more dS than the largest block does.
std::vector<Call> cut_into_calls(const AttentionKind& largest, std::span<const Sequence> blocks) {
  const auto products = [](const AttentionKind& k) { return k.sequences * k.queries * k.keys; };
  const auto kind_of = [&](std::size_t begin, std::size_t end) {
    return packed_kind(largest, blocks.subspan(begin, end - begin), largest.queries);
  };
  std::vector<Call> calls;
  std::int64_t entries = 0;
  for (std::size_t begin = 0, end; begin < blocks.size(); begin = end) {
    // Blocks of one document share keys: one a call.
    for (end = begin + 1; end < blocks.size() && blocks[end].key > blocks[end - 1].key; ++end) {
      if (products(kind_of(begin, end + 1)) > products(largest)) break;
    }
    calls.push_back({kind_of(begin, end), blocks.subspan(begin, end - begin), entries});
    entries += entries_of(calls.back().kind);
  }
  return calls;
}

/// Moves pointers to the query heads of key/value head `kv`.
void point_to_queries(const Sizes& n, std::int64_t kv, AttentionTensors& t) {
  const std::int64_t query = kv * n.group() * n.head_dim;
  for (void** p : {&t.q, &t.o, &t.d_o, &t.dq}) *p = static_cast<std::uint16_t*>(*p) + query;
  t.lse = static_cast<float*>(t.lse) + kv * n.group() * n.queries;
}

/// Rows of head `kv` of x [keys, kv_heads, head_dim], one after another.
void gather_head(const Sizes& n, std::int64_t kv, const void* x, std::uint16_t* rows, cudaStream_t stream) {
  const std::size_t width = static_cast<std::size_t>(n.head_dim) * sizeof(*rows);
  const auto* first = static_cast<const std::uint16_t*>(x) + kv * n.head_dim;
  check(cudaMemcpy2DAsync(rows, width, first, width * static_cast<std::size_t>(n.kv_heads), width,
                          static_cast<std::size_t>(n.keys), cudaMemcpyDeviceToDevice, stream),
        n.call);
}

void backward_in_order(const Sizes& n, const std::vector<Sequence>& documents, const AttentionTensors& all,
                       bool accumulate, cudaStream_t stream, Arena& workspace) {
  const AttentionKind largest = one_head_kind(n);
  const std::vector<Sequence> blocks = blocks_of(documents, to_int(largest.queries, n.call));
  const std::vector<Call> calls = cut_into_calls(largest, blocks);
  const std::int64_t entries = calls.back().first + entries_of(calls.back().kind), elements = n.keys * n.head_dim;
  const KeyPair head = take_key_pair(elements, head_label, workspace);
  const KeyPair of_call = take_key_pair(elements, gradients_label, workspace);
  float* sums = floats(workspace.allocate(DType::f32, {2, elements}, gradients_label));
  const SequenceTable table =
      carve_table(take_workspace(workspace, table_bytes(entries), "attention sequences"), entries);
  write_table(n, calls, table, stream);
  for (std::int64_t kv = 0; kv < n.kv_heads; ++kv) {
    AttentionTensors t = all;
    point_to_queries(n, kv, t);
    gather_head(n, kv, all.k, head.k, stream);
    gather_head(n, kv, all.v, head.v, stream);
    t.k = head.k;
    t.v = head.v;
    t.dk = of_call.k;
    t.dv = of_call.v;
    clear(sums, static_cast<std::size_t>(2 * elements) * sizeof(float), n, stream);
    for (const Call& c : calls) {
      const auto scope = workspace.scope();
      point_to(table, c.first, t);
      run(c, t, n, stream, workspace);
      const Sequence &first = c.sequences.front(), &last = c.sequences.back();
      const std::int64_t begin = first.key * n.head_dim, end = (last.key + last.keys) * n.head_dim;
      check(add_to_sums(of_call.k + begin, static_cast<std::size_t>(end - begin), sums + begin, stream), n.call);
      check(add_to_sums(of_call.v + begin, static_cast<std::size_t>(end - begin), sums + elements + begin, stream),
            n.call);
    }
    const auto keys = static_cast<std::size_t>(n.keys), row = static_cast<std::size_t>(n.key_row());
    const int width = to_int(n.head_dim, n.call);
    auto* dk = static_cast<std::uint16_t*>(all.dk) + kv * n.head_dim;
    auto* dv = static_cast<std::uint16_t*>(all.dv) + kv * n.head_dim;
    check(round_sums(sums, keys, width, row, accumulate, dk, stream), n.call);
    check(round_sums(sums + elements, keys, width, row, accumulate, dv, stream), n.call);
  }
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
  const Call call = is_dense(n, documents) ? Call{dense_kind(n, false), documents}
                                           : pack(n, documents, false, t, native(stream), workspace);
  run(call, t, n, native(stream), workspace);
}

void attention_backward(const Stream& stream, const Tensor& d_o, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Tensor& o, const Tensor& lse, const Tensor& start, float scale, const Tensor& dq,
                        const Tensor& dk, const Tensor& dv, bool accumulate_kv, Arena& workspace) {
  const Sizes n("attention_backward", q, k, start, scale);
  if (n.queries == 0) return;
  const auto scope = workspace.scope();
  const bool deterministic = settings().deterministic;
  if (stream.is_dry()) {
    if (deterministic) {
      take_key_pair(n.keys * n.head_dim, head_label, workspace);
      take_key_pair(n.keys * n.head_dim, gradients_label, workspace);
      workspace.allocate(DType::f32, {2, n.keys * n.head_dim}, gradients_label);
    } else if (accumulate_kv) {
      take_key_pair(n.keys * n.key_row(), gradients_label, workspace);
    }
    take_workspace(workspace, table_bytes(most_entries(n)), "attention sequences");
    const AttentionKind largest = deterministic ? one_head_kind(n) : dense_kind(n, true);
    take_workspace(workspace, attention_workspace_bound(largest), "attention workspace");
    return;
  }
  const AttentionTensors t{.q = q.data,
                           .k = k.data,
                           .v = v.data,
                           .o = o.data,
                           .lse = lse.data,
                           .d_o = d_o.data,
                           .dq = dq.data,
                           .dk = dk.data,
                           .dv = dv.data};
  const auto backward = deterministic ? backward_in_order : backward_in_one_call;
  backward(n, documents_of(n, start), t, accumulate_kv, native(stream), workspace);
}

}  // namespace deltapipe::kernels::cuda
