// The scans over chunks. The V columns of a state are independent given a chunk's record, so a block of threads owns
// 32 or 64 columns of one head and walks all its chunks. A "chain" warp holds 16 columns of the state, transposed, as
// tensor core accumulators: every product's result is, repacked, the left operand of the next, and nothing but the
// records passes through shared memory. A second warp a chain does what is not on the chain: outputs or stores forward,
// the products of d_o in reverse. Two producer threads keep the records coming by bulk copies.
//
// Two chains a block of threads spread few heads over many multiprocessors; four read a record half as often.
#include "kernels/cuda/kda_common.cuh"

namespace deltapipe::kernels::cuda::kda {
namespace {

constexpr int slice = 16;  // columns a chain
constexpr int slice_bytes = chunk_tokens * slice * 2;
constexpr int values_ahead = 3;  // buffers of a slice of v or d_o

enum class Mode { outputs, states, map };

template <int K, int chain_count, Mode mode>
struct ForwardShared {
  static constexpr int chains = chain_count;
  static constexpr bool outputs = mode == Mode::outputs;
  static constexpr int state_stages = 3, output_stages = !outputs ? 1 : K == 64 ? 4 : chains == 2 ? 3 : 2;
  std::uint8_t state[state_stages][Record<K>::state_bytes];
  std::uint8_t output[output_stages][outputs ? Record<K>::output_bytes : 16];
  std::uint8_t values[chains][values_ahead][slice_bytes];
  uint4 handed[chains][K / 16 + 4][32];  // operands of the state and of v_new
  std::uint64_t state_full[state_stages], state_empty[state_stages];
  std::uint64_t output_full[output_stages], output_empty[output_stages];
};

template <int K, int chain_count>
struct ReverseShared {
  static constexpr int chains = chain_count;
  static constexpr int state_stages = K == 64 || chains == 2 ? 3 : 2, output_stages = 2;
  std::uint8_t state[state_stages][Record<K>::state_bytes];
  std::uint8_t output[output_stages][Record<K>::output_bytes];
  std::uint8_t values[chains][values_ahead][slice_bytes];
  float4 handed[chains][8 + K / 8][32];  // d_o^T Aqk and d_o^T qg
  std::uint64_t state_full[state_stages], state_empty[state_stages];
  std::uint64_t output_full[output_stages], output_empty[output_stages];
};

/// Position in a ring of `stages` buffers.
template <int stages>
struct Ring {
  int stage = 0, phase = 0;
  __device__ __forceinline__ void next() {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

template <class Shared>
__device__ __forceinline__ void init_barriers(Shared& s) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shared::state_stages; ++i) {
      barrier_init(&s.state_full[i], 1);
      barrier_init(&s.state_empty[i], Shared::chains);
    }
    for (int i = 0; i < Shared::output_stages; ++i) {
      barrier_init(&s.output_full[i], 1);
      barrier_init(&s.output_empty[i], Shared::chains);
    }
    barrier_fence_init();
  }
  __syncthreads();
}

/// One thread: copies part of every record of a head into a ring, `step` chunks at a time.
template <int stages, int bytes>
__device__ void produce(std::uint8_t (*ring)[bytes], std::uint64_t* full, std::uint64_t* empty,
                        const std::uint8_t* record, std::ptrdiff_t step, int chunks) {
  Ring<stages> at;
  for (int c = 0; c < chunks; ++c) {
    if (c >= stages) barrier_wait(&empty[at.stage], at.phase ^ 1);
    barrier_expect(&full[at.stage], bytes);
    bulk_copy(ring[at.stage], record + c * step, bytes, &full[at.stage]);
    at.next();
  }
}

/// One warp: 16 columns of a chunk's rows of v or d_o, zeros beyond the segment's end. Always commits one group.
__device__ __forceinline__ void fetch_slice(std::uint8_t* to, const std::uint16_t* from, std::size_t row, int chunk,
                                            int length, bool wanted, int lane) {
  if (wanted) {
    const int first = chunk * chunk_tokens;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int token = n * 16 + lane / 2;
      const bool live = first + token < length;
      copy_async_16(shared_address(to + token * 32 + (lane & 1) * 16),
                    from + (live ? (first + token) * row : 0) + (lane & 1) * 8, live);
    }
  }
  copy_async_commit();
}

/// acc [16, 64 or K] += a [16, 16 tokens] tile[token, columns], for column groups [0, groups).
template <int width>
__device__ __forceinline__ void multiply_rows(float (*acc)[4], const std::uint32_t (&a)[4], std::uint32_t tile, int row,
                                              int groups, int lane) {
#pragma unroll
  for (int n = 0; n < width / 16; ++n) {
    if (n >= groups) break;
    std::uint32_t b[4];
    load_matrices_transposed(b, tile + block_offset<width>(row, 16 * n, lane));
    mma(acc[2 * n], a, b[0], b[1]);
    mma(acc[2 * n + 1], a, b[2], b[3]);
  }
}
/// acc [16, 64] += a [16, 16 columns] tile[token, column]^T, for groups of 16 tokens [first, 4).
template <int width>
__device__ __forceinline__ void multiply_transposed(float (*acc)[4], const std::uint32_t (&a)[4], std::uint32_t tile,
                                                    int column, int first, int lane) {
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    if (n < first) continue;
    std::uint32_t b[4];
    load_matrices(b, tile + block_offset_right<width>(16 * n, column, lane));
    mma(acc[2 * n], a, b[0], b[1]);
    mma(acc[2 * n + 1], a, b[2], b[3]);
  }
}

template <int groups>
__device__ __forceinline__ void clear(float (&x)[groups][4]) {
#pragma unroll
  for (int n = 0; n < groups; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) x[n][e] = 0.0f;
  }
}

/// The lane's part of a transposed state slice from or to [K, V] in memory.
template <int K>
__device__ __forceinline__ void load_state(float (&s)[K / 8][4], const float* state, int columns, int first, int lane) {
#pragma unroll
  for (int n = 0; n < K / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int x = 8 * n + lane % 4 * 2 + (e & 1), v = first + lane / 4 + (e & 2) * 4;
      s[n][e] = state[x * columns + v];
    }
  }
}
template <int K>
__device__ __forceinline__ void store_state(const float (&s)[K / 8][4], float* state, int columns, int first,
                                            int lane) {
#pragma unroll
  for (int n = 0; n < K / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int x = 8 * n + lane % 4 * 2 + (e & 1), v = first + lane / 4 + (e & 2) * 4;
      state[x * columns + v] = s[n][e];
    }
  }
}

/// A [16, 16 m] left operand to rows [first, first + 16) of 8x8 tiles of a matrix `groups` tiles wide.
__device__ __forceinline__ void store_tiles(std::uint16_t* to, const std::uint32_t (&a)[4], int first, int groups,
                                            int m, int lane) {
  auto* words = reinterpret_cast<std::uint32_t*>(to) + lane;
  const int at = first / 8 * groups + 2 * m;
  words[at * 32] = a[0];
  words[(at + groups) * 32] = a[1];
  words[(at + 1) * 32] = a[2];
  words[(at + groups + 1) * 32] = a[3];
}

template <int K>
__device__ __forceinline__ void scale_columns(float (&s)[K / 8][4], const float* decay, int lane) {
#pragma unroll
  for (int n = 0; n < K / 8; ++n) {
    const float2 d = *reinterpret_cast<const float2*>(decay + 8 * n + lane % 4 * 2);
    s[n][0] *= d.x;
    s[n][1] *= d.y;
    s[n][2] *= d.x;
    s[n][3] *= d.y;
  }
}

template <int chains>
constexpr int forward_threads = (2 * chains + 2) * 32;  // chains, helpers, producers

template <int K, int chains, Mode mode>
__global__ void __launch_bounds__(forward_threads<chains>, 1)
    forward_kernel(const __grid_constant__ Problem p, const __grid_constant__ ForwardScan io, int chunks) {
  extern __shared__ __align__(1024) std::uint8_t memory[];
  using Shared = ForwardShared<K, chains, mode>;
  auto& s = *reinterpret_cast<Shared*>(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int columns = mode == Mode::map ? 2 * K : K;  // a map's columns ride behind the state's
  const int slices = columns / (slice * chains), head = blockIdx.x / slices;
  const int pair = warp % chains, first = (blockIdx.x % slices * chains + pair) * slice;
  const std::uint8_t* records =
      static_cast<const std::uint8_t*>(io.records) + static_cast<std::size_t>(head) * chunks * Record<K>::bytes;
  const std::size_t row = static_cast<std::size_t>(p.heads) * K;
  const std::size_t tokens = (static_cast<std::size_t>(head / p.heads) * p.length * p.heads + head % p.heads) * K;
  const int full = 1 + 2 * pair, empty = full + 1;  // named barriers between a chain and its helper
  init_barriers(s);

  if (warp >= 2 * chains) {
    if (lane != 0) return;
    if (warp == 2 * chains) {
      produce<Shared::state_stages, Record<K>::state_bytes>(s.state, s.state_full, s.state_empty, records,
                                                            Record<K>::bytes, chunks);
    } else if constexpr (mode == Mode::outputs) {
      produce<Shared::output_stages, Record<K>::output_bytes>(
          s.output, s.output_full, s.output_empty, records + Record<K>::state_bytes, Record<K>::bytes, chunks);
    }
    return;
  }
  if (warp >= chains) {  // helper
    if (mode == Mode::map) return;
    Ring<Shared::output_stages> at;
    for (int c = 0; c < chunks; ++c) {
      std::uint32_t state[K / 16][4], v_new[4][4];
      pair_sync(full);
#pragma unroll
      for (int n = 0; n < K / 16 + 4; ++n) {
        const uint4 x = s.handed[pair][n][lane];
        std::uint32_t(&to)[4] = n < K / 16 ? state[n < K / 16 ? n : 0] : v_new[n < K / 16 ? 0 : n - K / 16];
        to[0] = x.x;
        to[1] = x.y;
        to[2] = x.z;
        to[3] = x.w;
      }
      if (c + 1 < chunks) pair_arrive(empty);
      if constexpr (mode == Mode::states) {
        const std::size_t slot = static_cast<std::size_t>(head) * chunks + c;
#pragma unroll
        for (int n = 0; n < K / 16; ++n) store_tiles(io.states + slot * K * K, state[n], first, K / 8, n, lane);
#pragma unroll
        for (int n = 0; n < 4; ++n) store_tiles(io.v_new + slot * K * chunk_tokens, v_new[n], first, 8, n, lane);
      } else {
        barrier_wait(&s.output_full[at.stage], at.phase);
        const std::uint32_t tile = shared_address(s.output[at.stage]);
        float o[8][4];
        clear(o);
#pragma unroll
        for (int n = 0; n < K / 16; ++n) {
          multiply_transposed<K>(o, state[n], tile + Record<K>::qg, 16 * n, 0, lane);
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          multiply_transposed<chunk_tokens>(o, v_new[n], tile + Record<K>::aqk, 16 * n, n, lane);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(&s.output_empty[at.stage]);
        at.next();
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          const std::uint32_t x = transpose_matrix(pack(o[n][0], o[n][1])),
                              y = transpose_matrix(pack(o[n][2], o[n][3]));
          const int token = c * chunk_tokens + 8 * n + lane / 4;
          if (token < p.length) {
            auto* to = reinterpret_cast<std::uint32_t*>(io.o + tokens + token * row + first) + lane % 4;
            to[0] = x;
            to[4] = y;
          }
        }
      }
    }
    return;
  }

  // chain
  float state[K / 8][4];
  if (mode == Mode::map && first >= K) {
#pragma unroll
    for (int n = 0; n < K / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        state[n][e] = 8 * n + lane % 4 * 2 + (e & 1) == first - K + lane / 4 + (e & 2) * 4 ? 1.0f : 0.0f;
      }
    }
  } else if (io.state_in != nullptr) {
    load_state<K>(state, io.state_in + static_cast<std::size_t>(head) * K * K, K, first, lane);
  } else {
    clear(state);
  }
  const bool has_values = mode != Mode::map || first < K;
  const std::uint16_t* values = p.v + tokens + first;
  for (int c = 0; c < values_ahead - 1; ++c) {
    fetch_slice(s.values[pair][c], values, row, c, p.length, has_values && c < chunks, lane);
  }
  Ring<Shared::state_stages> at;
  Ring<values_ahead> now;
  for (int c = 0; c < chunks; ++c) {
    {
      const int ahead = c + values_ahead - 1;
      fetch_slice(s.values[pair][ahead % values_ahead], values, row, ahead, p.length, has_values && ahead < chunks,
                  lane);
    }
    std::uint32_t operand[K / 16][4];
#pragma unroll
    for (int n = 0; n < K / 16; ++n) as_operand(operand[n], state[2 * n], state[2 * n + 1]);
    if (mode != Mode::map) {
      if (c > 0) pair_sync(empty);
#pragma unroll
      for (int n = 0; n < K / 16; ++n) {
        s.handed[pair][n][lane] = {operand[n][0], operand[n][1], operand[n][2], operand[n][3]};
      }
    }
    copy_async_wait<values_ahead - 1>();
    __syncwarp();
    barrier_wait(&s.state_full[at.stage], at.phase);
    const std::uint8_t* record = s.state[at.stage];
    const std::uint32_t tile = shared_address(record);

    // rhs = beta v - (beta k exp(G)) S, transposed
    float rhs[8][4];
    if (has_values) {
      const auto* beta = reinterpret_cast<const float*>(record + Record<K>::beta);
      const std::uint32_t from =
          shared_address(s.values[pair][now.stage]) + ((lane & 7) + (lane >> 4) * 8) * 32 + ((lane >> 3) & 1) * 16;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        std::uint32_t v[4];  // (tokens 0-7, columns 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15)
        load_matrices_transposed(v, from + n * 16 * 32);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float2 b = *reinterpret_cast<const float2*>(beta + 16 * n + 8 * h + lane % 4 * 2);
          rhs[2 * n + h][0] = b.x * low(v[2 * h]);
          rhs[2 * n + h][1] = b.y * high(v[2 * h]);
          rhs[2 * n + h][2] = b.x * low(v[2 * h + 1]);
          rhs[2 * n + h][3] = b.y * high(v[2 * h + 1]);
        }
      }
    } else {
      clear(rhs);
    }
    now.next();
#pragma unroll
    for (int n = 0; n < K / 16; ++n) {
      multiply_transposed<K>(rhs, operand[n], tile + Record<K>::nbg, 16 * n, 0, lane);
    }
    if (mode == Mode::map) {  // the rest of the state's bits: maps are composed many times
#pragma unroll
      for (int n = 0; n < K / 16; ++n) {
        float left[4], right[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const std::uint32_t x = operand[n][e >> 1], y = operand[n][2 + (e >> 1)];
          left[e] = state[2 * n][e] - (e & 1 ? high(x) : low(x));
          right[e] = state[2 * n + 1][e] - (e & 1 ? high(y) : low(y));
        }
        std::uint32_t rest[4];
        as_operand(rest, left, right);
        multiply_transposed<K>(rhs, rest, tile + Record<K>::nbg, 16 * n, 0, lane);
      }
    }
    // v_new = A rhs
    float v_new[8][4];
    clear(v_new);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      std::uint32_t a[4];
      as_operand(a, rhs[2 * n], rhs[2 * n + 1]);
      multiply_transposed<chunk_tokens>(v_new, a, tile + Record<K>::a, 16 * n, n, lane);
    }
    // S = exp(G_end) S + kg^T v_new
    scale_columns<K>(state, reinterpret_cast<const float*>(record + Record<K>::decay), lane);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      std::uint32_t a[4];
      as_operand(a, v_new[2 * n], v_new[2 * n + 1]);
      if (mode != Mode::map) s.handed[pair][K / 16 + n][lane] = {a[0], a[1], a[2], a[3]};
      multiply_rows<K>(state, a, tile + Record<K>::kg, 16 * n, K / 16, lane);
    }
    if (mode != Mode::map) pair_arrive(full);
    __syncwarp();
    if (lane == 0) barrier_arrive(&s.state_empty[at.stage]);
    at.next();
  }
  copy_async_wait<0>();
  const std::size_t state_at = static_cast<std::size_t>(head) * K * K;
  if (mode == Mode::map && first >= K) {
    store_state<K>(state, io.m + state_at, K, first - K, lane);
  } else if (io.state_out != nullptr) {
    store_state<K>(state, io.state_out + state_at, K, first, lane);
  }
  wait_for_previous_kernel();
}

// Four chains: three groups of four warps, which divide the registers unevenly.
template <int chains>
constexpr int reverse_threads = (2 * chains + (chains == 4 ? 4 : 2)) * 32;

template <int K, int chains>
__global__ void __launch_bounds__(reverse_threads<chains>, 1)
    reverse_kernel(const __grid_constant__ Problem p, const __grid_constant__ ReverseScan io, int chunks) {
  extern __shared__ __align__(1024) std::uint8_t memory[];
  using Shared = ReverseShared<K, chains>;
  auto& s = *reinterpret_cast<Shared*>(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  constexpr int slices = K / (slice * chains);
  const int head = blockIdx.x / slices, pair = warp % chains, first = (blockIdx.x % slices * chains + pair) * slice;
  const std::uint8_t* last_record = static_cast<const std::uint8_t*>(io.records) +
                                    (static_cast<std::size_t>(head) * chunks + chunks - 1) * Record<K>::bytes;
  const int full = 1 + 2 * pair, empty = full + 1;
  constexpr std::ptrdiff_t back = -static_cast<std::ptrdiff_t>(Record<K>::bytes);
  start_next_kernel();
  init_barriers(s);

  if (warp >= 2 * chains) {
    if constexpr (chains == 4) set_registers<false, 40>();
    if (lane != 0 || warp > 2 * chains + 1) return;
    if (warp == 2 * chains) {
      produce<Shared::state_stages, Record<K>::state_bytes>(s.state, s.state_full, s.state_empty, last_record, back,
                                                            chunks);
    } else {
      produce<Shared::output_stages, Record<K>::output_bytes>(s.output, s.output_full, s.output_empty,
                                                              last_record + Record<K>::state_bytes, back, chunks);
    }
    return;
  }
  if (warp >= chains) {  // helper: what d_o contributes
    if constexpr (chains == 4) set_registers<true, 208>();
    const std::size_t row = static_cast<std::size_t>(p.heads) * K;
    const std::uint16_t* d_o =
        io.d_o + (static_cast<std::size_t>(head / p.heads) * p.length * p.heads + head % p.heads) * K + first;
    for (int c = 0; c < values_ahead - 1; ++c) {
      fetch_slice(s.values[pair][c], d_o, row, chunks - 1 - c, p.length, c < chunks, lane);
    }
    Ring<Shared::output_stages> at;
    Ring<values_ahead> now;
    for (int c = 0; c < chunks; ++c) {
      const int ahead = c + values_ahead - 1;
      fetch_slice(s.values[pair][ahead % values_ahead], d_o, row, chunks - 1 - ahead, p.length, ahead < chunks, lane);
      copy_async_wait<values_ahead - 1>();
      __syncwarp();
      std::uint32_t a[4][4];
      const std::uint32_t from =
          shared_address(s.values[pair][now.stage]) + ((lane & 7) + (lane >> 4) * 8) * 32 + ((lane >> 3) & 1) * 16;
#pragma unroll
      for (int n = 0; n < 4; ++n) load_matrices_transposed(a[n], from + n * 16 * 32);
      now.next();
      float by_pair[8][4], by_state[K / 8][4];
      clear(by_pair);
      clear(by_state);
      barrier_wait(&s.output_full[at.stage], at.phase);
      const std::uint32_t tile = shared_address(s.output[at.stage]);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        multiply_rows<chunk_tokens>(by_pair, a[n], tile + Record<K>::aqk, 16 * n, n + 1, lane);
        multiply_rows<K>(by_state, a[n], tile + Record<K>::qg, 16 * n, K / 16, lane);
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(&s.output_empty[at.stage]);
      at.next();
      if (c > 0) pair_sync(empty);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        s.handed[pair][n][lane] = {by_pair[n][0], by_pair[n][1], by_pair[n][2], by_pair[n][3]};
      }
#pragma unroll
      for (int n = 0; n < K / 8; ++n) {
        s.handed[pair][8 + n][lane] = {by_state[n][0], by_state[n][1], by_state[n][2], by_state[n][3]};
      }
      pair_arrive(full);
    }
    copy_async_wait<0>();
    return;
  }

  // chain
  if constexpr (chains == 4) set_registers<true, 240>();
  float state[K / 8][4];
  if (io.dstate_out != nullptr) {
    load_state<K>(state, io.dstate_out + static_cast<std::size_t>(head) * K * K, K, first, lane);
  } else {
    clear(state);
  }
  Ring<Shared::state_stages> at;
  for (int c = 0; c < chunks; ++c) {
    const std::size_t slot = static_cast<std::size_t>(head) * chunks + chunks - 1 - c;
    std::uint32_t operand[K / 16][4];
#pragma unroll
    for (int n = 0; n < K / 16; ++n) as_operand(operand[n], state[2 * n], state[2 * n + 1]);
    if (io.dstates != nullptr) {
#pragma unroll
      for (int n = 0; n < K / 16; ++n) store_tiles(io.dstates + slot * K * K, operand[n], first, K / 8, n, lane);
    }
    barrier_wait(&s.state_full[at.stage], at.phase);
    const std::uint8_t* record = s.state[at.stage];
    const std::uint32_t tile = shared_address(record);
    scale_columns<K>(state, reinterpret_cast<const float*>(record + Record<K>::decay), lane);
    // dv_new = Aqk^T d_o + kg dS, transposed
    float dv[8][4];
    clear(dv);
#pragma unroll
    for (int n = 0; n < K / 16; ++n) multiply_transposed<K>(dv, operand[n], tile + Record<K>::kg, 16 * n, 0, anew(lane));
    pair_sync(full);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float4 x = s.handed[pair][n][lane];
      dv[n][0] += x.x;
      dv[n][1] += x.y;
      dv[n][2] += x.z;
      dv[n][3] += x.w;
    }
#pragma unroll
    for (int n = 0; n < K / 8; ++n) {
      const float4 x = s.handed[pair][8 + n][lane];
      state[n][0] += x.x;
      state[n][1] += x.y;
      state[n][2] += x.z;
      state[n][3] += x.w;
    }
    if (c + 1 < chunks) pair_arrive(empty);
    // Y = A^T dv_new
    float y[8][4];
    clear(y);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      std::uint32_t a[4];
      as_operand(a, dv[2 * n], dv[2 * n + 1]);
      multiply_rows<chunk_tokens>(y, a, tile + Record<K>::a, 16 * n, n + 1, lane);
    }
    // dS = exp(G_end) dS + qg^T d_o - (beta k exp(G))^T Y
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      std::uint32_t a[4];
      as_operand(a, y[2 * n], y[2 * n + 1]);
      multiply_rows<K>(state, a, tile + Record<K>::nbg, 16 * n, K / 16, lane);
      if (io.minus_y != nullptr) {
#pragma unroll
        for (int e = 0; e < 4; ++e) a[e] ^= 0x80008000u;
        store_tiles(io.minus_y + slot * K * chunk_tokens, a, first, 8, n, lane);
      }
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(&s.state_empty[at.stage]);
    at.next();
  }
  if (io.dstate_in != nullptr) {
    const int block = anew(blockIdx.x);
    store_state<K>(state, io.dstate_in + static_cast<std::size_t>(block / slices) * K * K, K,
                   (block % slices * chains + pair) * slice, lane);
  }
}

/// beside: the kernel may run while the one before it does, which has called start_next_kernel.
template <class Kernel, class Io>
cudaError_t launch(Kernel kernel, int blocks, int threads, std::size_t shared, bool beside, cudaStream_t stream,
                   const Problem& p, const Io& io) {
  const cudaError_t set =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (set != cudaSuccess) return set;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = beside ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, p, io, p.chunks());
}

template <int K, int chains, Mode mode>
cudaError_t forward_of(const Problem& p, const ForwardScan& s, cudaStream_t stream) {
  const int blocks = p.segments * p.heads * (mode == Mode::map ? 2 * K : K) / (slice * chains);
  return launch(forward_kernel<K, chains, mode>, blocks, forward_threads<chains>,
                sizeof(ForwardShared<K, chains, mode>), s.beside, stream, p, s);
}

template <int K>
cudaError_t forward_of(const Problem& p, const ForwardScan& s, cudaStream_t stream) {
  const int pairs = p.segments * p.heads * K / (2 * slice), all = processors();
  if (s.m != nullptr) return forward_of<K, 2, Mode::map>(p, s, stream);
  if (s.states != nullptr) {
    return (s.beside ? 2 : 1) * pairs <= all ? forward_of<K, 2, Mode::states>(p, s, stream)
                                             : forward_of<K, 4, Mode::states>(p, s, stream);
  }
  return pairs <= all ? forward_of<K, 2, Mode::outputs>(p, s, stream) : forward_of<K, 4, Mode::outputs>(p, s, stream);
}

template <int K, int chains>
cudaError_t reverse_of(const Problem& p, const ReverseScan& s, cudaStream_t stream) {
  return launch(reverse_kernel<K, chains>, p.segments * p.heads * K / (slice * chains), reverse_threads<chains>,
                sizeof(ReverseShared<K, chains>), false, stream, p, s);
}

template <int K>
cudaError_t reverse_of(const Problem& p, const ReverseScan& s, cudaStream_t stream) {
  return p.segments * p.heads * K / (2 * slice) <= processors() ? reverse_of<K, 2>(p, s, stream)
                                                                : reverse_of<K, 4>(p, s, stream);
}

}  // namespace

cudaError_t scan_forward(const Problem& p, const ForwardScan& s, cudaStream_t stream) {
  return p.head_dim == 128 ? forward_of<128>(p, s, stream) : forward_of<64>(p, s, stream);
}

cudaError_t scan_reverse(const Problem& p, const ReverseScan& s, cudaStream_t stream) {
  return p.head_dim == 128 ? reverse_of<128>(p, s, stream) : reverse_of<64>(p, s, stream);
}

}  // namespace deltapipe::kernels::cuda::kda
