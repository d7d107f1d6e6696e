// Causal softmax attention with grouped key/value heads (GQA) of one segment of queries against all keys up to its end.
// Never holds more than a block of scores: the running softmax of Milakov & Gimelshein, "Online normalizer calculation
// for softmax", 2018, and the recomputing backward of Dao et al., "FlashAttention", 2022.
//
// L queries are the last L of Lk keys ("bottom-right" causal): query i sits at key index p = Lk - L + i and sees the
// keys max(start[i], 0) .. p. start (int32 [L]) is the first key of the query's document, in key indices; it may be
// negative (the document begins before the first key), never exceeds p and never falls as i grows. It is in host memory
// on every backend, since the work is cut by it, and is read before a call returns. Documents cost what they are long:
// blocks of keys that no query of a block sees are skipped.
// Query head h reads key/value head h / (Hq / Hkv). With s_ij = scale q_i . k_j over the keys that i sees:
//   lse_i = log sum_j exp(s_ij),  p_ij = exp(s_ij - lse_i),  o_i = sum_j p_ij v_j,
//   dv_j = sum_i p_ij do_i,  ds_ij = p_ij (do_i . v_j - do_i . o_i),  dq_i = scale sum_j ds_ij k_j,
//   dk_j = scale sum_i ds_ij q_i, the sums of dk and dv also over the query heads of the group.
#pragma once

#include "core/arena.h"
#include "core/stream.h"
#include "core/tensor.h"

// The CPU takes float32 and float64, CUDA bfloat16 with d a multiple of 16, at most 256.
namespace deltapipe::kernels {

/// q [L, Hq, d], k and v [Lk, Hkv, d] -> o [L, Hq, d], all of one dtype, and lse [Hq, L], natural logarithm, float32
/// (or float64 when q is float64). o aliases nothing. Workspace: none on the CPU. Throws InternalError for a start that
/// breaks the contract.
void attention_forward(const Stream& stream, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& start,
                       float scale, const Tensor& o, const Tensor& lse, Arena& workspace);

/// Gradients dq [L, Hq, d] (overwritten) and dk, dv [Lk, Hkv, d] = (accumulate_kv ? what is there : 0) + gradient, of
/// the dtype of q; q, k, v, start, scale as in forward, o and lse its results. Outputs alias nothing. Workspace on the
/// CPU: Hq * L values of lse's dtype; on CUDA see kernels/cuda/README.md.
void attention_backward(const Stream& stream, const Tensor& d_o, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Tensor& o, const Tensor& lse, const Tensor& start, float scale, const Tensor& dq,
                        const Tensor& dk, const Tensor& dv, bool accumulate_kv, Arena& workspace);

}  // namespace deltapipe::kernels
