// Softmax attention by cuDNN's graph API on plain pointers, one call for one or many sequences.
// kernels/cuda/attention.cpp makes the contract of kernels/attention.h of it; cudnn-frontend's headers stay in
// cudnn_attention.cpp.
#pragma once

#include <cuda_runtime_api.h>

#include <compare>
#include <cstddef>
#include <cstdint>

namespace deltapipe::kernels::cuda {

/// What a cuDNN plan depends on. Plans are built at the first call of their kind, which takes the host about a second
/// (cuDNN compiles kernels for them), and kept for the life of the process.
struct AttentionKind {
  bool backward = false;
  /// Of backward: dq without atomic sums, at the price of sequences * heads * queries * keys * 2 bytes of workspace.
  bool deterministic = false;
  /// Every sequence has as many keys as queries. A causal mask is then the same from either corner, and cuDNN has faster
  /// kernels for the one it counts from the first key.
  bool square = false;
  bool packed = false;  // sequences of unequal lengths, at given offsets; else one, of exactly these lengths
  std::int64_t sequences = 1;
  std::int64_t queries = 0, keys = 0;              // of the longest sequence; its last query sees its last key
  std::int64_t total_queries = 0, total_keys = 0;  // that the tensors hold
  std::int64_t heads = 0, kv_heads = 0, head_dim = 0;
  // Elements from a token to the next in q, o, d_o and dq; in k, v, dk and dv.
  std::int64_t query_row = 0, key_row = 0;
  float scale = 1;
  auto operator<=>(const AttentionKind&) const = default;
};

/// Device memory. Queries, keys and what is shaped like them: [tokens, heads, head_dim], bf16, tokens a row apart. lse
/// [heads, total_queries], float32, natural logarithm.
struct AttentionTensors {
  void *q = nullptr, *k = nullptr, *v = nullptr, *o = nullptr, *lse = nullptr;
  void *d_o = nullptr, *dq = nullptr, *dk = nullptr, *dv = nullptr;
  // Packed: [sequences] lengths; [sequences + 1] first elements of each sequence in the query and key tensors and in a
  // head's row of lse. Sequences of length 0 are allowed.
  std::int32_t *query_lengths = nullptr, *key_lengths = nullptr;
  std::int64_t *query_offsets = nullptr, *key_offsets = nullptr, *lse_offsets = nullptr;
};

/// Bytes of workspace that no plan of this kind, dense or packed, with any number of sequences in total_queries and
/// total_keys, asks for more of. Needs no device.
std::size_t attention_workspace_bound(const AttentionKind& kind);
/// Bytes of workspace that the plan of this kind asks for. Builds it.
std::size_t attention_plan_workspace(const AttentionKind& kind, const char* call);
void run_attention(const AttentionKind& kind, const AttentionTensors& tensors, void* workspace, cudaStream_t stream,
                   const char* call);

}  // namespace deltapipe::kernels::cuda
