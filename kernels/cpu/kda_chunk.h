// The parts of chunked KDA on the CPU, a chunk of one head at a time. kernels/cpu/kda.cpp puts them together.
//
// A chunk of n <= 64 tokens with incoming state S, cumulative decay G_i (the sum of g over the chunk's tokens 0 .. i)
// and D_ij = exp(G_i - G_j):
//   M_ij = beta_i (k_i . k_j D_ij) for j < i,  A = (I + M)^-1,  Aqk_ij = scale (q_i . k_j D_ij) for j <= i
//   rhs = beta v - (beta k exp(G)) S,  v_new = A rhs
//   o = (scale q exp(G)) S + Aqk v_new,  S_out = exp(G_end) S + (k exp(G_end - G))^T v_new
// and, from d_o and dS = d S_out:
//   dv_new = Aqk^T d_o + (k exp(G_end - G)) dS,  Y = d rhs = A^T dv_new,  dM = -Y v_new^T,  dAqk = d_o v_new^T
//   dS_in = exp(G_end) dS + (scale q exp(G))^T d_o - (beta k exp(G))^T Y
//
// No exponent is ever positive and no difference of cumulative sums is formed: each decay between two tokens is built
// from sums over the tokens between them. Inside a block of 16 tokens D is a running product; between blocks it is
// exp(block's first row .. i) * exp(gap between the blocks) * exp(j + 1 .. end of j's block).
// A document's first token has g = -inf: every decay across it is exactly 0, and documents separate without masks.
//
// q rows and k rows of one token lie side by side ("pairs": row 2i belongs to q, row 2i + 1 to k), so that one product
// serves both.
#pragma once

#include "kernels/cpu/kda_gate.h"

#include <cstdint>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace deltapipe::kernels::cpu::kda {

inline constexpr std::int64_t chunk_tokens = 64;
inline constexpr std::int64_t block_tokens = 16;
inline constexpr std::int64_t chunk_blocks = chunk_tokens / block_tokens;
inline constexpr std::int64_t block_pairs = chunk_blocks * (chunk_blocks - 1) / 2;

/// Flushes subnormal numbers to zero on this thread while it lives. Decays multiply down into that range, where
/// x86 is a hundred times slower, and nothing below 1e-38 reaches a result of float.
class FlushSubnormals {
 public:
#if defined(__SSE2__)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }  // flush-to-zero, denormals-are-zero
  ~FlushSubnormals() { _mm_setcsr(saved_); }
#else
  FlushSubnormals() {}
  ~FlushSubnormals() {}
#endif
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
#if defined(__SSE2__)
  unsigned saved_;
#endif
};

/// Hands out parts of one allocation; with a null base it only counts.
template <class T>
class Carver {
 public:
  explicit Carver(T* base) : base_(base) {}
  T* take(std::int64_t n) {
    T* p = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (n + 15) / 16 * 16;
    return p;
  }
  std::int64_t used() const { return used_; }

 private:
  T* base_;
  std::int64_t used_ = 0;
};

/// One head of one segment. Pointers stand at the segment's first token; a row_* is the distance between tokens.
template <class T>
struct Head {
  std::int64_t length, k_dim, v_dim;
  std::int64_t row_k, row_v, row_b;
  const T *q, *k, *v, *f, *b;
  const T* dt_bias;  // [K]
  Gate<T> gate;
  T scale;
  const std::int32_t* start;  // [L]
};

/// The state-free part of a chunk (prepare_chunk), and what the scans leave for the gradients.
template <class T>
struct Chunk {
  std::int64_t first = 0, n = 0;  // tokens [first, first + n) of the segment
  T* qb;                          // [n, 2, K]  scale * q and beta * k, q and k normalised
  T* k;                           // [n, K]     k normalised
  T* qbg;                         // [n, 2, K]  qb * exp(G)
  T* kg;                          // [n, K]     k * exp(G_end - G)
  T* pair;                        // [n, 2, 64] rows of Aqk and of A; zero above the diagonal
  T *beta, *rq, *rk;              // [n]        reciprocal norms of q and k
  T* e;                           // [n, K]     exp(g)
  T* pre;                         // [n, K]     decay from the block's first token (exclusive) to i (inclusive)
  T* tail;                        // [n, K]     decay from i (exclusive) to the block's last token
  T* head;                        // [4, K]     decay from the chunk's start to the block's first token, inclusive
  T* rear;                        // [4, K]     decay from the block's last token to the chunk's end
  T* gap;                         // [6, K]     decay from block J's last token to block I's first, at gap_index(J, I)
  T* decay;                       // [K]        exp(G_end)
  // Present when gradients are wanted:
  T* z;       // [n, 2, V] d_o and -Y
  T* v_new;   // [n, V]
  T* state;   // [K, V] incoming state
  T* dstate;  // [K, V] gradient of the outgoing state

  Chunk(Carver<T>& carver, std::int64_t k_dim, std::int64_t v_dim, bool gradients);
  static std::int64_t elements(std::int64_t k_dim, std::int64_t v_dim, bool gradients) {
    Carver<T> count(nullptr);
    Chunk(count, k_dim, v_dim, gradients);
    return count.used();
  }

  std::int64_t blocks() const { return (n + block_tokens - 1) / block_tokens; }
  std::int64_t block_size(std::int64_t block) const {
    const std::int64_t left = n - block * block_tokens;
    return left < block_tokens ? left : block_tokens;
  }
  static std::int64_t gap_index(std::int64_t j, std::int64_t i) { return i * (i - 1) / 2 + j; }
};

/// Temporaries of one task. `columns` is the widest state it meets: V, or V + K for a segment map.
template <class T>
struct Scratch {
  T* state;     // [K, columns]
  T* ps;        // [64, 2, columns]
  T* v_new;     // [64, columns]
  T* anchored;  // [16, 2, K] rows of a block times pre
  T* keys;      // [64, K]  k * tail, transposed or with a gap
  T* keys_gap;  // [64, K]
  T* run;       // [K]
  // Present when gradients are wanted:
  T* dqk;       // [64, 2, K]
  T* dkg;       // [64, K]
  T* products;  // [64, 2, 64]
  T* inner;     // [64, 2, K]
  T* reached;   // [64, K]
  T* wide;      // [64, K]
  T* state_t;   // [V, K]
  T* v_new_t;   // [V, 64]
  T* rows;      // [4, K]

  Scratch(Carver<T>& carver, std::int64_t k_dim, std::int64_t v_dim, std::int64_t columns, bool gradients);
  static std::int64_t elements(std::int64_t k_dim, std::int64_t v_dim, std::int64_t columns, bool gradients) {
    Carver<T> count(nullptr);
    Scratch(count, k_dim, v_dim, columns, gradients);
    return count.used();
  }
};

/// Fills everything of `c` that needs no state, for tokens [first, first + n).
template <class T>
void prepare_chunk(const Head<T>& h, std::int64_t first, std::int64_t n, Chunk<T>& c, Scratch<T>& s);

/// state [K, columns] <- outgoing state. Values are h.v in the first V columns, zero in any further ones. Leaves
/// v_new [n, columns] there. o [n, V] (rows row_v apart) receives the outputs, unless it is null.
template <class T>
void advance_state(const Head<T>& h, const Chunk<T>& c, std::int64_t columns, T* state, T* v_new, T* o, Scratch<T>& s);

/// dstate [K, V] <- gradient of the incoming state, from that of the outgoing one and d_o [n, V] (rows row_v apart).
/// Leaves z [n, 2, V].
template <class T>
void retreat_state(const Head<T>& h, const Chunk<T>& c, const T* d_o, T* dstate, T* z, Scratch<T>& s);

/// Where a head's gradients go; rows as in Head, pointers at the segment's first token.
template <class T>
struct HeadGradients {
  T *dq, *dk, *dv, *df, *db;
};

/// The gradients of one chunk from c.z, c.v_new, c.state and c.dstate. sums [K + 1]: this chunk's ddt_bias and da_log.
template <class T>
void chunk_gradients(const Head<T>& h, const Chunk<T>& c, const HeadGradients<T>& out, T* sums, Scratch<T>& s);

}  // namespace deltapipe::kernels::cpu::kda
