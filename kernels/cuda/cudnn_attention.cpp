#include "kernels/cuda/cudnn_attention.h"

#include "kernels/cuda/common.h"

#include <cudnn_frontend.h>

#include <bit>
#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>

namespace deltapipe::kernels::cuda {
namespace {

namespace fe = cudnn_frontend;
using TensorNode = std::shared_ptr<fe::graph::Tensor_attributes>;

/// Names of a graph's tensors between building and running it.
enum Id : std::int64_t {
  id_q = 1,
  id_k,
  id_v,
  id_o,
  id_lse,
  id_d_o,
  id_dq,
  id_dk,
  id_dv,
  id_query_lengths,
  id_key_lengths,
  id_query_offsets,
  id_key_offsets,
  id_lse_offsets
};

void check(const fe::error_t& status, const AttentionKind& kind, const char* call) {
  if (status.is_good()) return;
  fail<InternalError>(
      "{}: cuDNN {} has no way to run {} sequences of {} queries and {} keys, {} / {} heads of {}{}: {}", call,
      cudnnGetVersion(), kind.sequences, kind.queries, kind.keys, kind.heads, kind.kv_heads, kind.head_dim,
      kind.deterministic ? ", deterministic" : "", status.err_msg);
}

void check(cudnnStatus_t status, const char* call) {
  if (status != CUDNN_STATUS_SUCCESS) fail<InternalError>("{}: cuDNN: {}", call, cudnnGetErrorString(status));
}

/// A graph of one attention operation.
class Builder {
 public:
  explicit Builder(const AttentionKind& kind) : kind_(kind), graph_(std::make_shared<fe::graph::Graph>()) {
    graph_->set_io_data_type(fe::DataType_t::BFLOAT16)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
    if (kind_.packed) {
      query_lengths_ = index(id_query_lengths, kind_.sequences, fe::DataType_t::INT32);
      key_lengths_ = index(id_key_lengths, kind_.sequences, fe::DataType_t::INT32);
      query_offsets_ = index(id_query_offsets, kind_.sequences + 1, fe::DataType_t::INT64);
      key_offsets_ = index(id_key_offsets, kind_.sequences + 1, fe::DataType_t::INT64);
      lse_offsets_ = index(id_lse_offsets, kind_.sequences + 1, fe::DataType_t::INT64);
    }
  }

  std::shared_ptr<fe::graph::Graph> forward() {
    auto options = fe::graph::SDPA_attributes().set_generate_stats(true);
    set_common(options);
    auto [o, lse] = graph_->sdpa(queries(id_q), keys(id_k), keys(id_v), options);
    give_query_layout(*o, id_o);
    give_lse_layout(*lse);
    o->set_output(true);
    lse->set_output(true).set_data_type(fe::DataType_t::FLOAT);
    return graph_;
  }

  std::shared_ptr<fe::graph::Graph> backward() {
    auto options = fe::graph::SDPA_backward_attributes().set_deterministic_algorithm(kind_.deterministic);
    set_common(options);
    if (kind_.packed) options.set_max_total_seq_len_q(kind_.total_queries).set_max_total_seq_len_kv(kind_.total_keys);
    const TensorNode lse = graph_->tensor(fe::graph::Tensor_attributes().set_data_type(fe::DataType_t::FLOAT));
    give_lse_layout(*lse);
    auto [dq, dk, dv] =
        graph_->sdpa_backward(queries(id_q), keys(id_k), keys(id_v), queries(id_o), queries(id_d_o), lse, options);
    give_query_layout(*dq, id_dq);
    give_key_layout(*dk, id_dk);
    give_key_layout(*dv, id_dv);
    for (const TensorNode& t : {dq, dk, dv}) t->set_output(true);
    return graph_;
  }

 private:
  using Attributes = fe::graph::Tensor_attributes;

  template <class Options>
  void set_common(Options& options) const {
    options.set_attn_scale(kind_.scale)
        .set_diagonal_alignment(kind_.square ? fe::DiagonalAlignment_t::TOP_LEFT
                                             : fe::DiagonalAlignment_t::BOTTOM_RIGHT)
        .set_diagonal_band_right_bound(0);
    if (kind_.packed) options.set_padding_mask(true).set_seq_len_q(query_lengths_).set_seq_len_kv(key_lengths_);
  }

  TensorNode index(Id id, std::int64_t n, fe::DataType_t type) const {
    return graph_->tensor(Attributes().set_uid(id).set_dim({n, 1, 1, 1}).set_stride({1, 1, 1, 1}).set_data_type(type));
  }
  TensorNode queries(Id id) const {
    const TensorNode t = graph_->tensor(Attributes());
    give_query_layout(*t, id);
    return t;
  }
  TensorNode keys(Id id) const {
    const TensorNode t = graph_->tensor(Attributes());
    give_key_layout(*t, id);
    return t;
  }
  void give_query_layout(Attributes& t, Id id) const {
    give_layout(t, id, kind_.heads, kind_.queries, kind_.query_row, query_offsets_);
  }
  /// k, v and their gradients share offsets: with others cuDNN's deterministic backward leaves gradients unwritten.
  void give_key_layout(Attributes& t, Id id) const {
    give_layout(t, id, kind_.kv_heads, kind_.keys, kind_.key_row, key_offsets_);
  }
  /// cuDNN's order of dimensions is sequence, head, token, channel; ours in memory is token, head, channel.
  void give_layout(Attributes& t, Id id, std::int64_t heads, std::int64_t tokens, std::int64_t row,
                   const TensorNode& offsets) const {
    t.set_uid(id)
        .set_dim({kind_.sequences, heads, tokens, kind_.head_dim})
        .set_stride({tokens * row, kind_.head_dim, row, 1});
    if (kind_.packed) t.set_ragged_offset(offsets);
  }
  void give_lse_layout(Attributes& t) const {
    const std::int64_t row = kind_.packed ? kind_.total_queries : kind_.queries;
    t.set_uid(id_lse)
        .set_dim({kind_.sequences, kind_.heads, kind_.queries, 1})
        .set_stride({kind_.heads * row, row, 1, 1});
    if (kind_.packed) t.set_ragged_offset(lse_offsets_);
  }

  const AttentionKind& kind_;
  std::shared_ptr<fe::graph::Graph> graph_;
  TensorNode query_lengths_, key_lengths_, query_offsets_, key_offsets_, lse_offsets_;
};

struct Plan {
  std::shared_ptr<fe::graph::Graph> graph;
  std::size_t workspace = 0;
};

/// cuDNN's handle of one device and the plans made for it.
class DeviceAttention {
 public:
  const Plan& plan(const AttentionKind& kind, const char* call) {
    const auto found = plans_.find(kind);
    if (found != plans_.end()) return found->second;
    if (handle_ == nullptr) check(cudnnCreate(&handle_), call);
    Builder builder(kind);
    Plan plan{kind.backward ? builder.backward() : builder.forward()};
    check(plan.graph->build(handle_, {fe::HeurMode_t::A}), kind, call);
    std::int64_t bytes = 0;
    check(plan.graph->get_workspace_size(bytes), kind, call);
    plan.workspace = static_cast<std::size_t>(bytes);
    return plans_.emplace(kind, std::move(plan)).first->second;
  }

  void run(const AttentionKind& kind, const AttentionTensors& t, void* workspace, cudaStream_t stream,
           const char* call) {
    const Plan& p = plan(kind, call);
    check(cudnnSetStream(handle_, stream), call);
    std::unordered_map<std::int64_t, void*> memory{{id_q, t.q}, {id_k, t.k}, {id_v, t.v}, {id_o, t.o}, {id_lse, t.lse}};
    if (kind.backward) memory.insert({{id_d_o, t.d_o}, {id_dq, t.dq}, {id_dk, t.dk}, {id_dv, t.dv}});
    if (kind.packed) {
      memory.insert({{id_query_lengths, t.query_lengths},
                     {id_key_lengths, t.key_lengths},
                     {id_query_offsets, t.query_offsets},
                     {id_key_offsets, t.key_offsets},
                     {id_lse_offsets, t.lse_offsets}});
    }
    check(p.graph->execute(handle_, memory, workspace), kind, call);
  }

 private:
  cudnnHandle_t handle_ = nullptr;
  std::map<AttentionKind, Plan> plans_;
};

/// Calls `f` with the current device's plans, one thread at a time.
template <class F>
auto with_device(const char* call, const F& f) {
  static std::mutex mutex;
  static auto& devices = *new std::map<int, DeviceAttention>();  // outlives all users: the driver goes first at exit
  int device = 0;
  cuda::check(cudaGetDevice(&device), call);
  const std::lock_guard lock(mutex);
  return f(devices[device]);
}

}  // namespace

// What cudnn-frontend lays out for packed sequences, the most of all kinds: sums of dq, or dS where backward is
// deterministic; dk and dv of every query head where heads share keys; row sums of d_o * o. Plans of cuDNN 9.19 for an
// H100 add up to 17 KiB and, a sequence, 240 bytes forward and 448 backward.
std::size_t attention_workspace_bound(const AttentionKind& kind) {
  const auto most_sequences = std::bit_ceil(static_cast<std::size_t>(kind.total_queries));
  const std::size_t margin = (std::size_t{64} << 10) + 512 * most_sequences;
  if (!kind.backward) return margin;
  const auto floats = [](std::int64_t n) { return static_cast<std::size_t>(n) * sizeof(float); };
  const std::int64_t group = kind.heads / kind.kv_heads;
  const std::size_t row_sums = floats(kind.total_queries * kind.heads);
  const std::size_t full_heads = group == 1 ? 0 : 2 * floats(kind.total_keys * kind.key_row * group);
  const std::size_t dq = kind.deterministic
                             ? static_cast<std::size_t>(kind.sequences * kind.heads * kind.queries * kind.keys) * 2
                             : floats(kind.total_queries * kind.query_row);
  return dq + full_heads + row_sums + margin;
}

std::size_t attention_plan_workspace(const AttentionKind& kind, const char* call) {
  return with_device(call, [&](DeviceAttention& device) { return device.plan(kind, call).workspace; });
}

void run_attention(const AttentionKind& kind, const AttentionTensors& tensors, void* workspace, cudaStream_t stream,
                   const char* call) {
  with_device(call, [&](DeviceAttention& device) { device.run(kind, tensors, workspace, stream, call); });
}

}  // namespace deltapipe::kernels::cuda
