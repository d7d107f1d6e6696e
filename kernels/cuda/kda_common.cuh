// What the KDA kernels share: the record of a chunk, tensor-core and copy instructions, and the part of every chunk
// that loads q, k and f, normalises them and turns the gate into decays.
//
// Symbols are those of kernels/cpu/kda_chunk.h. Blocks are 16 tokens. Inside a block, c_i is the log2 of the decay from
// the block's first token (exclusive) to token i (inclusive), restarted where a document starts. Decays between blocks
// are exponentials of sums over the tokens between them, so no exponent is positive, with one exception: a "plain"
// block, one in which no document starts after its first token and no channel decays by more than 2^-range_limit, is
// handled by a single product anchored at both its ends, whose rescaling factor 2^(-c_15) stays far inside float's
// range. Other blocks take an exact path pair by pair.
#pragma once

#include "kernels/cuda/kda_kernels.h"

#include <cuda.h>

#include <cuda_bf16.h>

namespace deltapipe::kernels::cuda::kda {

inline constexpr int chunk_tokens = 64;
inline constexpr int block_tokens = 16;
inline constexpr float log2e = 1.4426950408889634f;
inline constexpr float ln2 = 0.6931471805599453f;
/// 2^109 times a key and 2^-109 times one are normal floats. A gate bounded at -5 stays within: 15 * 5 * log2 e =
/// 108.2.
inline constexpr float range_limit = 109.0f;

/// One chunk of one head as the scans read it: byte offsets. Tiles are bf16 in panels of 64 columns, one after the
/// other, row-major, with the 16-byte pieces of row r at position p stored at p ^ (r % 8): what wgmma calls a 128-byte
/// swizzle, so that a plain bulk copy lands in shared memory as its right operand.
template <int K>
struct Record {
  static constexpr int panel = chunk_tokens * 128;
  static constexpr int tile = chunk_tokens * K * 2;
  static constexpr int square = panel;
  static constexpr int nbg = 0;                                          // [64, K]  -beta k exp(G)
  static constexpr int kg = tile;                                        // [64, K]  k exp(G_end - G)
  static constexpr int a = 2 * tile;                                     // [64, 64] (I + M)^-1
  static constexpr int decay = a + square;                               // [K] fp32 exp(G_end)
  static constexpr int beta = decay + 4 * K;                             // [64] fp32
  static constexpr int state_bytes = beta + 4 * chunk_tokens;            // what the state's own chain needs ends here
  static constexpr int state_room = (state_bytes + 1023) / 1024 * 1024;  // in shared memory: operands begin at 1,024s
  static constexpr int qg = 0;                                           // after state_bytes: [64, K] scale q exp(G)
  static constexpr int aqk = tile;                                       // [64, 64] causal
  static constexpr int output_bytes = tile + square;
  static constexpr int bytes = state_bytes + output_bytes;
};

/// Multiprocessors of the current device.
inline int processors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

/// Boxes of [64 tokens, 64 columns] of a bf16 tensor [S, L, H, K], for load_box and store_box.
cudaError_t box_map(CUtensorMap* map, const Problem& p, const std::uint16_t* tensor);

// ---------------------------------------------------------------- instructions

__device__ __forceinline__ std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ std::uint32_t pack(float lo, float hi) {
  std::uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
__device__ __forceinline__ float low(std::uint32_t x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high(std::uint32_t x) { return __uint_as_float(x & 0xffff0000u); }
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ void load_matrices(std::uint32_t (&r)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(std::uint32_t (&r)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void store_matrices_transposed(std::uint32_t address, const std::uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
/// d [16, 8] += a [16, 16] b [16, 8], bf16 operands.
__device__ __forceinline__ void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
/// The accumulators of a [16, 16] product as the bf16 left operand of the next one.
__device__ __forceinline__ void as_operand(std::uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack(left[0], left[1]);
  a[1] = pack(left[2], left[3]);
  a[2] = pack(right[0], right[1]);
  a[3] = pack(right[2], right[3]);
}

__device__ __forceinline__ void copy_async_16(std::uint32_t to, const void* from, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(present ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ float4 quad(const float* x) { return *reinterpret_cast<const float4*>(x); }
template <int pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

__device__ __forceinline__ void barrier_init(std::uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void barrier_expect(std::uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void barrier_arrive(std::uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_wait(std::uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
/// Copies contiguous global memory into shared memory; completes on `barrier`. Sizes and addresses: multiples of 16.
__device__ __forceinline__ void bulk_copy(void* to, const void* from, int bytes, std::uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
/// Which block of its cluster this is.
__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
/// All threads of the cluster's blocks that have not ended; what each wrote before, the others see after.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}
/// Arrives at the barrier in the same place of a block of the cluster.
__device__ __forceinline__ void barrier_arrive_at(std::uint64_t* barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
/// A box of a tensor (box_map) at a column and token into swizzled shared memory; completes on `barrier` with all
/// of the box's bytes, zeros where it lies outside.
__device__ __forceinline__ void load_box(void* to, const CUtensorMap& from, int column, int token, int head,
                                         int segment, std::uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(shared_address(to)),
      "l"(&from), "r"(column), "r"(token), "r"(head), "r"(segment), "r"(shared_address(barrier))
      : "memory");
}
/// The way back, of what lies inside; part of the thread's next group.
__device__ __forceinline__ void store_box(const CUtensorMap& to, int column, int token, int head, int segment,
                                          const void* from) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(&to),
               "r"(column), "r"(token), "r"(head), "r"(segment), "r"(shared_address(from))
               : "memory");
}
__device__ __forceinline__ void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
/// Until the thread's groups of stores have read shared memory; until they have ended.
__device__ __forceinline__ void store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
/// Waits for the thread's own reads and writes of shared memory, and orders them, and what barriers have ordered before
/// them, with bulk copies issued after it. No barrier does: one may be passed with loads in flight, and a bulk copy
/// that it sets off can overtake them.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
/// Contiguous global memory into the second-level cache; size and address: multiples of 16.
__device__ __forceinline__ void prefetch(const void* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
/// Barrier `id` of a group of `threads` threads, whole warps.
template <int threads>
__device__ __forceinline__ void group_sync(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(threads) : "memory");
}
/// Lets the next kernel of the stream, if it was launched to run beside this one, start once every block has called
/// this.
__device__ __forceinline__ void start_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
/// Waits for the end of the kernel that this one runs beside, if any: who follows in the stream counts on both.
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
/// Tells other multiprocessors of what this thread has written to global memory, and what barriers have ordered before.
__device__ __forceinline__ void set_flag(int* flag) {
  asm volatile(
      "fence.acq_rel.gpu;\n"
      "fence.proxy.async;\n"
      "st.release.gpu.s32 [%0], 1;" ::"l"(flag)
      : "memory");
}
__device__ __forceinline__ bool flag_is_set(const int* flag) {
  int x;
  asm volatile("ld.acquire.gpu.s32 %0, [%1];" : "=r"(x) : "l"(flag) : "memory");
  return x != 0;
}
/// Registers a thread, for a group of four warps: more, or fewer, than the kernel started with.
template <bool more, int count>
__device__ __forceinline__ void set_registers() {
  if constexpr (more) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
  }
}

/// x, as a value that the compiler knows nothing about: what follows from it is computed again here, not kept in
/// registers from where it was computed before.
__device__ __forceinline__ int anew(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---------------------------------------------------------------- tiles

/// Byte offset of the 16-byte piece `piece` of row `row` in a swizzled tile whose rows are `width` bf16 wide: the tiles
/// that stay in shared memory, without panels.
template <int width>
__device__ __forceinline__ int piece_offset(int row, int piece) {
  return row * (2 * width) + ((piece ^ (row & 7)) << 4);
}

/// The lane's ldmatrix address offset for a 16 x 16 block at (row, column) of a swizzled tile, row a multiple of 8,
/// matrices in the order (rows 0-7, columns 0-7), (rows 8-15, columns 0-7), (rows 0-7, columns 8-15), (rows 8-15,
/// columns 8-15): the left operand's order, and transposed the right operand's for two neighbouring column groups.
template <int width>
__device__ __forceinline__ int block_offset(int row, int column, int lane) {
  return row * (2 * width) + piece_offset<width>(lane & 15, (column >> 3) + (lane >> 4));
}
/// The same with matrices 1 and 2 exchanged: the right operand's order, untransposed, for two groups of 8 rows.
template <int width>
__device__ __forceinline__ int block_offset_right(int row, int column, int lane) {
  return row * (2 * width) + piece_offset<width>((lane & 7) + ((lane >> 4) << 3), (column >> 3) + ((lane >> 3) & 1));
}

// ---------------------------------------------------------------- gate

__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.0f + exp2_fast(-x * log2e)); }

/// A head's gate: g = -rate softplus(x), or when bounded g = bound sigmoid(rate x), with x = f + dt_bias.
template <bool bounded>
struct Gate {
  float rate, bound;

  /// log2(1 + y) for y in [0, 1]; below 1e-3, where the sum loses y, by its series: the third term is 3e-7 of the
  /// first.
  __device__ __forceinline__ static float log2_1p(float y) {
    const float series = y * (log2e - 0.5f * log2e * y);
    return y < 1e-3f ? series : log2_fast(1.0f + y);
  }
  /// g in log2 units is factor() times unit(z), z = x log2 e.
  __device__ __forceinline__ float factor() const { return bounded ? bound * log2e : -rate; }
  __device__ __forceinline__ float unit(float z) const {
    if constexpr (bounded) {
      return reciprocal(1.0f + exp2_fast(-rate * z));
    } else {
      return fmaxf(z, 0.0f) + log2_1p(exp2_fast(-fabsf(z)));
    }
  }
  /// df from dg, in natural units; adds this element's part of da_log.
  __device__ __forceinline__ float backward(float x, float dg, float& da) const {
    if constexpr (bounded) {
      const float y = exp2_fast(-fabsf(rate * x) * log2e), r = reciprocal(1.0f + y);
      const float d = bound * rate * y * r * r * dg;
      da += d * x;
      return d;
    } else {
      const float y = exp2_fast(-fabsf(x) * log2e), r = reciprocal(1.0f + y), by_rate = -rate * dg;
      da += by_rate * (fmaxf(x, 0.0f) + ln2 * log2_1p(y));
      return by_rate * (x >= 0.0f ? r : y * r);
    }
  }
};

// ---------------------------------------------------------------- tokens of a chunk

/// Per-token values of a chunk in shared memory.
struct Tokens {
  float4 row[chunk_tokens];  // scale over the norm of q, -beta over the norm of k, 1 over the norms of k and of q
  float beta[chunk_tokens];
  unsigned begins[2];  // a bit a token: it starts a document
  int exact[4];        // the block needs the exact path

  /// The bits of a block's 16 tokens.
  __device__ __forceinline__ unsigned starts(int block) const {
    return begins[block / 2] >> (block % 2 * 16) & 0xffffu;
  }
};
/// With the bits of a block: no document starts after its first token up to token i; none after token i.
__device__ __forceinline__ bool reached(unsigned starts, int i) { return (starts & ((2u << i) - 2u)) == 0; }
__device__ __forceinline__ bool reaches(unsigned starts, int i) { return starts >> (i + 1) == 0; }

/// What one of 2 K threads owns of a chunk: two neighbouring channels of one block's 16 tokens.
template <int K>
struct Share {
  int pair, block;  // channels 2 pair and 2 pair + 1
  __device__ __forceinline__ explicit Share(int thread) : pair(thread % (K / 2)), block(thread / (K / 2)) {}
};

/// Where a chunk of a head lies in the inputs. Chunks of all heads follow each other in time.
struct Place {
  int segment, head, chunk, tokens;
  std::size_t first;  // (segment * length + first token) * heads + head
  __device__ __forceinline__ Place(const Problem& p, int index) {
    const int heads = p.segments * p.heads;
    chunk = index / heads;
    segment = index % heads / p.heads;
    head = index % p.heads;
    tokens = min(chunk_tokens, p.length - chunk * chunk_tokens);
    first = (static_cast<std::size_t>(segment) * p.length + chunk * chunk_tokens) * p.heads + head;
  }
  /// Position among [segment, head, chunk].
  __device__ __forceinline__ std::size_t slot(const Problem& p, int chunks) const {
    return (static_cast<std::size_t>(segment) * p.heads + head) * chunks + chunk;
  }
};

template <int K>
__device__ __forceinline__ void load_share(std::uint32_t (&x)[16], const std::uint16_t* from, const Problem& p,
                                           const Place& at, const Share<K>& own) {
  const auto* words = reinterpret_cast<const std::uint32_t*>(from) +
                      (at.first + static_cast<std::size_t>(own.block) * 16 * p.heads) * (K / 2) + own.pair;
  const std::size_t row = static_cast<std::size_t>(p.heads) * (K / 2);
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i] = own.block * 16 + i < at.tokens ? words[i * row] : 0u;
}

/// A chunk's rows into a swizzled tile by copy_async, zeros beyond the segment's end.
template <int K, int threads>
__device__ __forceinline__ void fetch_tile(std::uint8_t* tile, const std::uint16_t* from, const Problem& p,
                                           const Place& at, int thread) {
  constexpr int pieces = K / 8, step = threads / pieces;  // rows a step
  static_assert(step % 8 == 0);
  const int r = thread / pieces, piece = thread % pieces;
  const std::uint16_t* source = from + (at.first + static_cast<std::size_t>(r) * p.heads) * K + piece * 8;
  const std::uint32_t to = shared_address(tile) + piece_offset<K>(r, piece);
  const std::size_t stride = static_cast<std::size_t>(p.heads) * (K * step);
  if (at.tokens == chunk_tokens) {
#pragma unroll
    for (int n = 0; n < chunk_tokens / step; ++n) copy_async_16(to + n * step * 2 * K, source + n * stride, true);
  } else {
#pragma unroll 1
    for (int n = 0; n < chunk_tokens / step; ++n) {
      const bool live = r + step * n < at.tokens;
      copy_async_16(to + n * step * 2 * K, live ? source + n * stride : from, live);
    }
  }
}

/// What a thread keeps in registers of a chunk whose tiles are on their way.
struct Ahead {
  float rate;      // a_log, until store_tokens
  float2 bias;     // dt_bias of channels 2 (thread % (K / 2)) and the next
  unsigned token;  // of token `thread`: b, and bit 16: it starts a document
};
template <int K>
__device__ __forceinline__ void load_ahead(const Problem& p, const Place& at, int thread, Ahead& x) {
  x.rate = p.a_log[at.head];
  x.bias = reinterpret_cast<const float2*>(p.dt_bias)[at.head * (K / 2) + thread % (K / 2)];
  x.token = 0;
  if (thread < at.tokens) {
    const int token = at.chunk * chunk_tokens + thread;
    x.token = p.b[at.first + static_cast<std::size_t>(thread) * p.heads];
    if (p.start[static_cast<std::size_t>(at.segment) * p.length + token] == token) x.token |= 0x10000u;
  }
}
/// What needs no q or k. A barrier follows.
__device__ __forceinline__ void store_tokens(Tokens& s, const Place& at, int thread, Ahead& x) {
  x.rate = expf(x.rate);
  if (thread < 64) {
    s.beta[thread] = thread < at.tokens ? sigmoid(low(x.token)) : 0.0f;
    s.begins[thread / 32] = __ballot_sync(0xffffffffu, x.token >> 16 != 0);
    if (thread < 4) s.exact[thread] = 0;
  }
}

/// Fills s.row, after a barrier, from swizzled tiles of q and k. Sums of squares are the diagonals of a block's
/// products with itself.
template <int K, int warps>
__device__ __forceinline__ void find_norms(Tokens& s, const std::uint8_t* q, const std::uint8_t* k, float scale,
                                           int warp, int lane) {
  for (int task = warp; task < 8; task += warps) {
    const int block = task % 4;
    const bool is_q = task < 4;
    float upper[4] = {}, lower[4] = {};
    const std::uint32_t tile = shared_address(is_q ? q : k);
#pragma unroll
    for (int n = 0; n < K / 16; ++n) {
      std::uint32_t a[4];
      load_matrices(a, tile + block_offset<K>(16 * block, 16 * n, lane));
      mma(upper, a, a[0], a[2]);
      mma(lower, a, a[1], a[3]);
    }
    if ((lane & 3) != lane >> 3) continue;
    const bool odd = (lane >> 2 & 1) != 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int token = 16 * block + lane / 4 + 8 * h;
      const float r = rsqrtf((h == 0 ? (odd ? upper[1] : upper[0]) : (odd ? lower[3] : lower[2])) + 1e-6f);
      if (is_q) {
        s.row[token].x = scale * r;
        s.row[token].w = r;
      } else {
        s.row[token].y = -s.beta[token] * r;
        s.row[token].z = r;
      }
    }
  }
}

/// c (see above) of the thread's channels and `count` tokens of a block, as if the block began with them; g of the
/// block's first token: minus infinity where a document starts. starts: the tokens' bits. leads: the tokens are the
/// block's first. whole: no document starts but at the block's first token, and all tokens lie inside the segment (g is
/// 0 beyond its end).
template <bool whole, int count, bool bounded>
__device__ __forceinline__ void cumulate_as(const std::uint32_t (&f)[count], const Gate<bounded>& gate, float2 bias,
                                            unsigned starts, bool leads, int live, float (&c)[count][2],
                                            float (&g_first)[2]) {
  const float factor = gate.factor(), b0 = bias.x * log2e, b1 = bias.y * log2e;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    float unit0 = gate.unit(fmaf(low(f[i]), log2e, b0)), unit1 = gate.unit(fmaf(high(f[i]), log2e, b1));
    if (!whole && i >= live) unit0 = unit1 = 0.0f;
    if (i == 0) {
      g_first[0] = starts & 1u ? -INFINITY : factor * unit0;
      g_first[1] = starts & 1u ? -INFINITY : factor * unit1;
      const bool zero = leads || (!whole && (starts & 1u));
      c[0][0] = zero ? 0.0f : factor * unit0;
      c[0][1] = zero ? 0.0f : factor * unit1;
    } else {
      const bool begins = !whole && (starts >> i & 1u);
      c[i][0] = begins ? 0.0f : fmaf(factor, unit0, c[i - 1][0]);
      c[i][1] = begins ? 0.0f : fmaf(factor, unit1, c[i - 1][1]);
    }
  }
}
/// rate: exp(a_log); bias: dt_bias of the thread's channels; live: how many of the tokens lie inside the segment.
template <int count>
__device__ __forceinline__ void cumulate(const std::uint32_t (&f)[count], float bound, float rate, float2 bias,
                                         unsigned starts, bool leads, int live, float (&c)[count][2],
                                         float (&g_first)[2]) {
  const bool whole = starts <= (leads ? 1u : 0u) && live >= count;
  if (bound == 0.0f) {
    const Gate<false> gate{rate, 0.0f};
    if (whole) {
      cumulate_as<true, count>(f, gate, bias, starts, leads, live, c, g_first);
    } else {
      cumulate_as<false, count>(f, gate, bias, starts, leads, live, c, g_first);
    }
  } else {
    const Gate<true> gate{rate, bound};
    if (whole) {
      cumulate_as<true, count>(f, gate, bias, starts, leads, live, c, g_first);
    } else {
      cumulate_as<false, count>(f, gate, bias, starts, leads, live, c, g_first);
    }
  }
}

}  // namespace deltapipe::kernels::cuda::kda
