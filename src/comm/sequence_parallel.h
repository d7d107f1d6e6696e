// The three exchanges of sequence parallelism, over the sequence axis: rows before each segment for the convolution
// (halo), the state that enters each segment for KDA (scan), and all keys and values for softmax attention (gather).
//
// N ranks, B sequences, S = B * layout.local_segments() local segments of L tokens in the order of sequence_layout.h;
// `a` is the size of an element. One message carries all B sequences. Traffic of rank r of N, forward and backward:
//
//   halo of R = W - 1 rows of D  contiguous: 1 message of B R D a bytes to rank r + 1, if there is one
//   (Purpose::conv_halo)         zigzag: 1 such message to each of r + 1 and r - 1 that exists
//                                1 round
//   scan with states of          ceil(log2 N) rounds, of distance d = 1, 2, 4, ... < N.
//   e = B H K V a bytes          contiguous, with v = r (backward v = N - 1 - r): if v + d < N, 1 message of e bytes
//   and m = B H K K a            where v < d, else of e + m
//   (Purpose::kda_state)         zigzag: the same with v = r both ways, and if r >= d a second message, to r - d, of
//                                e + m bytes where r + d >= N, else of 2 (e + m)
//   keys of F elements           N - 1 messages of S L F a bytes, 1 round; the gradients the same, in blocks
//   (Purpose::attention_kv)      (mpi_communicator.h)
//
// How the scan works. A segment is the affine map S_out = M S_in + E; (M1, E1) then (M2, E2) is (M2 M1, M2 E1 + E2),
// which is associative, so ranks combine runs of segments that double each round: Hillis & Steele, "Data parallel
// algorithms", CACM 1986, in the exclusive form. The state before a sequence is zero, so a run that begins there is its
// E alone: M is neither sent nor formed. Zigzag: rank r holds left map L_r and right map R_r, in sequence order
// L_0 .. L_{N-1} R_{N-1} .. R_0. What lies between L_r and R_r belongs to ranks r + 1 .. N - 1, and groups of ranks
// nest: [a, b) and [b, c) with left runs A1, A2 and right runs B1, B2 join to A = A1 then A2, B = B2 then B1. One scan
// over lower ranks gives the state that enters L_r; a scan of pairs (A, B) over higher ranks, in the same rounds, gives
// the map from L_r's outgoing state to R_r's incoming one. A group that reaches the last rank is one map, A then B.
// Gradients of outgoing states obey dS_{i-1} = M_i^T dS_i + e_i: the same scans from the other end of the sequence.
#pragma once

#include "comm/communicator.h"
#include "comm/sequence_layout.h"
#include "core/arena.h"
#include "core/stream.h"
#include "core/tensor.h"

#include <array>

namespace deltapipe {

class SequenceParallel {
 public:
  /// `sequence` outlives this object.
  SequenceParallel(Communicator& sequence, LayoutKind kind) : comm_(sequence), layout_(kind, sequence.size()) {}

  const SequenceLayout& layout() const { return layout_; }
  int rank() const { return comm_.rank(); }
  Communicator& communicator() const { return comm_; }

  /// A started gather_halo or gather_keys. It borrows its tensors and what it took from the workspace until finished.
  struct Started {
    Pending pending;
    Tensor out;                    // what finish writes
    std::array<Tensor, 2> packed;  // as received
    std::array<int, 2> slots{};    // of each packed halo
  };

  /// x [S, L, D] -> halo [S, W - 1, D], overwritten: the rows before each segment, oldest first; zeros before a
  /// sequence. Throws ConfigError when a segment is shorter than the halo.
  void gather_halo(const Stream& stream, const Tensor& x, const Tensor& halo, Arena& workspace) const;
  [[nodiscard]] Started start_gather_halo(const Stream& stream, const Tensor& x, const Tensor& halo,
                                          Arena& workspace) const;
  void finish_gather_halo(const Stream& stream, Started& started) const;
  /// The adjoint: dhalo [S, W - 1, D] is added onto the last rows of the segments it came from, dx [S, L, D]; rows
  /// before a sequence are dropped.
  void return_halo(const Stream& stream, const Tensor& dhalo, const Tensor& dx, Arena& workspace) const;

  /// Maps m [S, H, K, K], e [S, H, K, V] (kernels::kda_segment_map), float32 or float64 -> state_in [S, H, K, V],
  /// overwritten: the state that enters each segment, zero before each sequence.
  void scan(const Stream& stream, const Tensor& m, const Tensor& e, const Tensor& state_in, Arena& workspace) const;
  /// m as in scan, e [S, H, K, V] of kernels::kda_backward_map -> dstate_out [S, H, K, V], overwritten: the gradient of
  /// the state that leaves each segment, zero after each sequence.
  void scan_backward(const Stream& stream, const Tensor& m, const Tensor& e, const Tensor& dstate_out,
                     Arena& workspace) const;

  /// local [S, L, F] -> whole [B, T, F], in sequence order, overwritten; any dtype.
  void gather_keys(const Stream& stream, const Tensor& local, const Tensor& whole, Arena& workspace) const;
  [[nodiscard]] Started start_gather_keys(const Stream& stream, const Tensor& local, const Tensor& whole,
                                          Arena& workspace) const;
  void finish_gather_keys(const Stream& stream, Started& started) const;
  /// The adjoint: whole [B, T, F], this rank's part of the gradient for every token, float32 or float64 -> local
  /// [S, L, F], overwritten: the sum over the ranks, in rank order.
  void scatter_key_gradients(const Stream& stream, const Tensor& whole, const Tensor& local, Arena& workspace) const;

 private:
  Started start_halo(const Stream& stream, const Tensor& from, std::int64_t from_row, const Tensor& out,
                     std::int64_t rows, int step, Arena& workspace) const;
  std::int64_t batch_of(const Tensor& local, const char* what) const;
  bool is_gathered_in_order(const Tensor& whole) const;
  void copy_parts(const Stream& stream, const Tensor& by_rank, const Tensor& whole, bool to_whole) const;

  Communicator& comm_;
  SequenceLayout layout_;
};

}  // namespace deltapipe
