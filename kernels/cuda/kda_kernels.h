// KDA on Hopper, below the tensors of kernels/kda.h: plain pointers, one struct a call. kernels/cuda/kda.cu adapts the
// contract to it. Every function queues kernels on `stream` and returns the first launch error.
//
// K = V = head_dim, 64 or 128. NC = ceil(length / 64) chunks a segment; a "head" is a pair (segment, head), segments
// outermost. Workspaces are 256-byte aligned and need no initial contents.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace deltapipe::kernels::cuda::kda {

/// The inputs of kernels/kda.h as device pointers; bf16 as its bit pattern.
struct Problem {
  const std::uint16_t *q, *k, *v, *f;  // [S, L, H, K]
  const std::uint16_t* b;              // [S, L, H]
  const float* a_log;                  // [H]
  const float* dt_bias;                // [H, K]
  const std::int32_t* start;           // [S, L]
  float scale;
  float gate_lower_bound;
  int segments, length, heads, head_dim;

  int chunks() const { return (length + 63) / 64; }
  std::size_t head_chunks() const { return static_cast<std::size_t>(segments) * heads * chunks(); }
};

struct Gradients {
  std::uint16_t *dq, *dk, *dv, *df, *db;
  float *da_log, *ddt_bias;  // +=; may be null
};

bool supports(int head_dim);

/// Bytes of the records that every call below prepares from its inputs, or takes as an earlier call on the same inputs
/// left them: `prepared` tells which. A forward that finds them prepared finds them so by segment_map.
std::size_t records_bytes(const Problem& p);

/// state_in, state_out [S, H, K, V], may be null.
cudaError_t forward(const Problem& p, void* records, bool prepared, const float* state_in, std::uint16_t* o,
                    float* state_out, cudaStream_t stream);

std::size_t backward_workspace(const Problem& p);
cudaError_t backward(const Problem& p, void* records, bool prepared, const float* state_in, const std::uint16_t* d_o,
                     const float* dstate_out, const Gradients& gradients, float* dstate_in, void* workspace,
                     cudaStream_t stream);

/// m [S, H, K, K], e [S, H, K, V].
cudaError_t segment_map(const Problem& p, void* records, float* m, float* e, cudaStream_t stream);
/// e [S, H, K, V].
cudaError_t backward_map(const Problem& p, void* records, const std::uint16_t* d_o, float* e, cudaStream_t stream);

/// out [n, rows, columns] = op(a) b + c, a [n, rows, rows], op the identity or transposition; c may be null.
cudaError_t multiply_add(int n, int rows, int columns, const float* a, bool transpose, const float* b, const float* c,
                         float* out, cudaStream_t stream);

// The phases.

/// How records are prepared while a scan reads them: chunk by chunk in the scan's order, and from some point on by
/// fewer multiprocessors than there are, so that the scan has the others.
struct Pace {
  int* ready = nullptr;  // [S, H, NC], set as a record becomes ready; null: the next kernel waits for all
  int late = 0;          // records that late_blocks blocks prepare alone, the last ones
  int late_blocks = 0;
  std::int64_t backwards = 0;  // 1: the last chunk first; wide, so that the struct has no padding
};
/// Records of every chunk (see kda_common.cuh), everything that needs no state.
cudaError_t prepare(const Problem& p, void* records, const Pace& pace, cudaStream_t stream);
/// Records that it has in hand at a time.
int prepared_at_once(int head_dim);

/// Forward scan. Either o (outputs) or states + v_new (for backward).
struct ForwardScan {
  const void* records;
  const float* state_in = nullptr;  // zeros when null
  float* state_out = nullptr;
  std::uint16_t* o = nullptr;       // [S, L, H, V]
  std::uint16_t* states = nullptr;  // per chunk: incoming state, [V, K] in 8x8 tiles
  std::uint16_t* v_new = nullptr;   // per chunk: [V, 64] in 8x8 tiles
  const int* ready = nullptr;       // of the prepare queued just before, which may still run
  // Pieces of the segments, scanned side by side; state_in is [pieces, S, H, K, V] then.
  int pieces = 1;
  // Of scan_maps alone, whose state_out is e: [pieces, S, H, ...]. Of a whole segment also the maps up to the first
  // marks - 1 of its `marks` pieces' ends.
  float* m = nullptr;
  int marks = 1;
  float *mark_m = nullptr, *mark_e = nullptr;
};
cudaError_t scan_forward(const Problem& p, const ForwardScan& s, cudaStream_t stream);

/// Maps of segments, cut into runs of chunks so that few heads fill the device: of every piece, then of the segments;
/// and the state that comes into each piece, with which a forward scan can walk all pieces at once.
struct PieceMaps {
  int pieces;
  bool from_start;  // map i is that of pieces 0 to i; the last one is the segment's and not kept here
  float* m;         // [pieces, S, H, K, K]
  float* e;         // [pieces, S, H, K, V]
  /// A segment is scanned in one go.
  bool whole() const { return pieces == 1 || from_start; }
};
/// Its m and e are null.
PieceMaps map_pieces(const Problem& p);
/// Of the pieces; where maps are whole, of the segments, too, into m and e. ready: as in ForwardScan.
cudaError_t scan_maps(const Problem& p, const void* records, const int* ready, const PieceMaps& maps, float* m,
                      float* e, cudaStream_t stream);
cudaError_t join_maps(const Problem& p, const PieceMaps& maps, float* m, float* e, cudaStream_t stream);
/// states [pieces, S, H, K, V]; state_in may be null.
cudaError_t piece_states(const Problem& p, const PieceMaps& maps, const float* state_in, float* states,
                         cudaStream_t stream);

/// Reverse scan of the state's gradient.
struct ReverseScan {
  const void* records;
  const std::uint16_t* d_o;           // [S, L, H, V]
  const float* dstate_out = nullptr;  // zeros when null
  float* dstate_in = nullptr;
  std::uint16_t* dstates = nullptr;  // per chunk: gradient of the outgoing state, [V, K] in 8x8 tiles
  std::uint16_t* minus_y = nullptr;  // per chunk: minus the gradient of rhs, [V, 64] in 8x8 tiles
  const int* ready = nullptr;        // as in ForwardScan
};
cudaError_t scan_reverse(const Problem& p, const ReverseScan& s, cudaStream_t stream);

/// Multiprocessors that a scan leaves: either one, or that of whole segments' maps.
int spare_processors(const Problem& p, bool maps);

/// All gradients of every chunk; sums [S, H, NC, K + 1]: each chunk's ddt_bias, then da_log.
struct ChunkGradients {
  const std::uint16_t *d_o, *states, *dstates, *v_new, *minus_y;
  Gradients out;
  float* sums;
};
cudaError_t chunk_gradients(const Problem& p, const ChunkGradients& g, cudaStream_t stream);
cudaError_t reduce_sums(const Problem& p, const float* sums, float* da_log, float* ddt_bias, cudaStream_t stream);

}  // namespace deltapipe::kernels::cuda::kda
