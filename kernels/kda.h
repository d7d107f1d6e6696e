// Kimi Delta Attention (KDA): a linear attention with a gated delta rule. Per head, with state S [K, V]:
//   S <- diag(exp(g_t)) S;  S <- S + beta_t k_t (v_t - k_t^T S)^T;  o_t = scale * S^T q_t
// where q and k are L2-normalised, beta = sigmoid(b) and the log decay g <= 0 comes from f, a_log and dt_bias.
// Sources: Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", 2024 (chunked
// form); Kimi Team, "Kimi Linear", 2025 (gate a channel).
//
// S segments of L tokens (L any positive number), H heads, K key and V value channels (K = V = head_dim in models).
// A segment is a contiguous run of tokens of one sequence and has its own incoming state. start [S, L] int32 is the
// index, relative to the segment's first token, of the first token of each token's document, negative when the document
// began before the segment; the state is zero where a document starts, so an incoming state reaches only tokens with a
// negative start; it must be finite all the same. acc: float32, or float64 when the inputs are float64. No tensor
// written aliases any other tensor.
//
// A segment is an affine map of its incoming state, S_out = M S_in + E, and so is its gradient,
// dS_in = M^T dS_out + E'. Maps compose associatively: a scan over segments on any ranks gives every segment its
// incoming state before its outputs are computed.
#pragma once

#include "core/arena.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace deltapipe::kernels {

struct KdaInputs {
  Tensor q, k;     // [S, L, H, K] after convolution and SiLU, before the L2 norm x / sqrt(sum x^2 + 1e-6)
  Tensor v;        // [S, L, H, V]
  Tensor f;        // [S, L, H, K] gate projection, before dt_bias
  Tensor b;        // [S, L, H] logits of beta
  Tensor a_log;    // [H] acc
  Tensor dt_bias;  // [H, K] acc
  Tensor start;    // [S, L] int32
  float scale = 1.0f;
  /// 0: g = -exp(a_log) * softplus(f + dt_bias). Negative: g = gate_lower_bound * sigmoid(exp(a_log) * (f + dt_bias)).
  float gate_lower_bound = 0.0f;
};

struct KdaGradients {
  Tensor dq, dk, dv, df, db;  // shapes and dtype of the inputs; overwritten
  Tensor da_log;              // [H] acc, += gradient; skipped when empty
  Tensor ddt_bias;            // [H, K] acc, += gradient; skipped when empty
};

/// What a call makes of its inputs before any state enters can serve the next call on the same inputs: segment maps
/// come first, outputs or gradients follow. `records` below: empty, or u8 [kda_records_bytes] in device memory, which
/// maps fill and which then take the place of preparing anew, in kda_forward kda_segment_map's, in kda_backward any
/// map's. Gradients are the same to the bit; outputs, of a scan that walks pieces of a segment side by side, the same
/// but for rounding. 0 where nothing is kept (the CPU): pass an empty tensor.
std::int64_t kda_records_bytes(const Stream& stream, const KdaInputs& inputs);

/// state_in [S, H, K, V] acc, empty: zeros -> o [S, L, H, V] in the inputs' dtype, state_out [S, H, K, V] acc or empty.
void kda_forward(const Stream& stream, const KdaInputs& inputs, const Tensor& records, const Tensor& state_in,
                 const Tensor& o, const Tensor& state_out, Arena& workspace);

/// d_o [S, L, H, V], dstate_out [S, H, K, V] acc (empty: zeros) -> gradients and dstate_in [S, H, K, V] acc or empty,
/// overwritten. Needs nothing from forward but its inputs: what else it uses is recomputed.
void kda_backward(const Stream& stream, const KdaInputs& inputs, const Tensor& records, const Tensor& state_in,
                  const Tensor& d_o, const Tensor& dstate_out, const KdaGradients& gradients, const Tensor& dstate_in,
                  Arena& workspace);

/// The map of every segment: m [S, H, K, K], e [S, H, K, V], both acc, overwritten. inputs.q matters to records alone.
void kda_segment_map(const Stream& stream, const KdaInputs& inputs, const Tensor& records, const Tensor& m,
                     const Tensor& e, Arena& workspace);

/// e [S, H, K, V] acc, overwritten: dstate_in when dstate_out = 0. With m of kda_segment_map, dS_in = m^T dS_out + e.
void kda_backward_map(const Stream& stream, const KdaInputs& inputs, const Tensor& records, const Tensor& d_o,
                      const Tensor& e, Arena& workspace);

/// Map 1, then map 2: m_out = m2 m1, e_out = m2 e1 + e2. m [S, H, K, K], e [S, H, K, V], acc.
void kda_compose_maps(const Stream& stream, const Tensor& m1, const Tensor& e1, const Tensor& m2, const Tensor& e2,
                      const Tensor& m_out, const Tensor& e_out);

/// out = m state + e, or m^T state + e. m [S, H, K, K]; state, e, out [S, H, K, V]; acc.
void kda_apply_map(const Stream& stream, const Tensor& m, bool transpose_m, const Tensor& state, const Tensor& e,
                   const Tensor& out);

}  // namespace deltapipe::kernels
