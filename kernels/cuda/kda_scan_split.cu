// The scans over chunks, for few heads, where the time is a chunk's latency: two warps share a chain of 16 columns.
// Each holds half of the state's channels and makes half of the tokens' rows; what both need, as operands, passes
// through shared memory three times a chunk. Two helper warps a chain do what is not on it, as in kda_scan.cu. A block
// of threads owns 32 columns of one head.
//
// Halves: of the state, channels [0, K/2) and [K/2, K); of the tokens, blocks 0 and 3, and blocks 1 and 2, which makes
// the triangular products equally long.
#include "kernels/cuda/kda_scan.cuh"

namespace deltapipe::kernels::cuda::kda {
namespace {

constexpr int chains = 2;
constexpr int threads = (4 * chains + 2) * 32;  // chains' warps, helpers, producers
template <int K>
constexpr int slices = K / (slice * chains);  // blocks of threads a head
/// What the warps of a chain hand each other: left operands of the state, of rhs or dv_new, and of v_new or Y.
template <int K>
struct Exchange {
  uint4 state[K / 16][32];
  uint4 middle[4][32];
  uint4 last[4][32];
};

template <int K, bool outputs>
struct ForwardShared {
  static constexpr int readers = chains;
  static constexpr int state_stages = 3, output_stages = outputs ? 3 : 1;
  std::uint8_t state[state_stages][Record<K>::state_bytes];
  std::uint8_t output[output_stages][outputs ? Record<K>::output_bytes : 16];
  std::uint8_t values[chains][2][values_ahead][slice_bytes / 2];
  Exchange<K> exchange[chains];
  std::uint64_t state_full[state_stages], state_empty[state_stages];
  std::uint64_t output_full[output_stages], output_empty[output_stages];
};

template <int K>
struct ReverseShared {
  static constexpr int readers = chains;
  static constexpr int state_stages = 3, output_stages = 2;
  std::uint8_t state[state_stages][Record<K>::state_bytes];
  std::uint8_t output[output_stages][Record<K>::output_bytes];
  std::uint8_t values[chains][values_ahead][slice_bytes];
  Exchange<K> exchange[chains];
  float4 handed[chains][2][4 + K / 16][32];  // d_o^T Aqk of half of the tokens, d_o^T qg of half of the channels
  std::uint64_t state_full[state_stages], state_empty[state_stages];
  std::uint64_t output_full[output_stages], output_empty[output_stages];
};

/// Named barriers of a chain: between its warps, its helpers, and both.
struct Barriers {
  int chain, full, empty, helpers;
  __device__ __forceinline__ explicit Barriers(int chain_index)
      : chain(1 + 4 * chain_index), full(chain + 1), empty(chain + 2), helpers(chain + 3) {}
};

/// Which tokens' blocks a warp owns, and which its partner.
struct Half {
  int index, own[2], other[2];
  __device__ __forceinline__ explicit Half(int half) : index(half), own{half, 3 - half}, other{1 - half, 2 + half} {}
};

__device__ __forceinline__ void put(uint4 (*to)[32], int n, const std::uint32_t (&a)[4], int lane) {
  to[n][lane] = {a[0], a[1], a[2], a[3]};
}
__device__ __forceinline__ void get(std::uint32_t (&a)[4], const uint4 (*from)[32], int n, int lane) {
  const uint4 x = from[n][lane];
  a[0] = x.x;
  a[1] = x.y;
  a[2] = x.z;
  a[3] = x.w;
}

/// acc [16, 16] += a [16, 16 columns] tile[token, column]^T, for 16 tokens.
template <int width>
__device__ __forceinline__ void multiply_block_transposed(float (&acc)[2][4], const std::uint32_t (&a)[4],
                                                          std::uint32_t tile, int token, int column, int lane) {
  std::uint32_t b[4];
  load_matrices(b, tile + block_offset_right<width>(token, column, lane));
  mma(acc[0], a, b[0], b[1]);
  mma(acc[1], a, b[2], b[3]);
}
/// acc [16, 16] += a [16, 16 tokens] tile[token, column], for 16 columns.
template <int width>
__device__ __forceinline__ void multiply_block(float (&acc)[2][4], const std::uint32_t (&a)[4], std::uint32_t tile,
                                               int token, int column, int lane) {
  std::uint32_t b[4];
  load_matrices_transposed(b, tile + block_offset<width>(token, column, lane));
  mma(acc[0], a, b[0], b[1]);
  mma(acc[1], a, b[2], b[3]);
}

/// acc[m] += the sum over blocks n <= own[m] of x[n] tile[own[m], n]^T: a lower triangle of blocks.
__device__ __forceinline__ void multiply_lower(float (&acc)[2][2][4], const std::uint32_t (&own)[2][4],
                                               const std::uint32_t (&other)[2][4], std::uint32_t tile, const Half& h,
                                               int lane) {
  const auto add = [&](float(&to)[2][4], const std::uint32_t(&a)[4], int m, int n) {
    multiply_block_transposed<chunk_tokens>(to, a, tile, 16 * m, 16 * n, lane);
  };
  add(acc[0], own[0], h.own[0], h.own[0]);
  add(acc[1], own[0], h.own[1], h.own[0]);
  add(acc[1], own[1], h.own[1], h.own[1]);
  add(acc[1], other[0], h.own[1], h.other[0]);
  if (h.index == 0) {
    add(acc[1], other[1], h.own[1], h.other[1]);
  } else {
    add(acc[0], other[0], h.own[0], h.other[0]);
  }
}
/// acc[m] += the sum over blocks n >= own[m] of x[n] tile[n, own[m]].
__device__ __forceinline__ void multiply_upper(float (&acc)[2][2][4], const std::uint32_t (&own)[2][4],
                                               const std::uint32_t (&other)[2][4], std::uint32_t tile, const Half& h,
                                               int lane) {
  const auto add = [&](float(&to)[2][4], const std::uint32_t(&a)[4], int m, int n) {
    multiply_block<chunk_tokens>(to, a, tile, 16 * n, 16 * m, lane);
  };
  add(acc[0], own[0], h.own[0], h.own[0]);
  add(acc[0], own[1], h.own[0], h.own[1]);
  add(acc[1], own[1], h.own[1], h.own[1]);
  add(acc[0], other[1], h.own[0], h.other[1]);
  if (h.index == 0) {
    add(acc[0], other[0], h.own[0], h.other[0]);
  } else {
    add(acc[1], other[1], h.own[1], h.other[1]);
  }
}

__device__ __forceinline__ void clear_blocks(float (&x)[2][2][4]) {
  clear(x[0]);
  clear(x[1]);
}

/// Half of a state += x tile, with x [16, 64] in operands of the tokens' own and other blocks.
template <int K>
__device__ __forceinline__ void update_state(float (&state)[K / 16][4], const std::uint32_t (&a)[4], std::uint32_t tile,
                                             int token, int first, int lane) {
#pragma unroll
  for (int n = 0; n < K / 32; ++n) {
    std::uint32_t b[4];
    load_matrices_transposed(b, tile + block_offset<K>(token, first + 16 * n, lane));
    mma(state[2 * n], a, b[0], b[1]);
    mma(state[2 * n + 1], a, b[2], b[3]);
  }
}

template <int K, Mode mode>
__global__ void __launch_bounds__(threads, 1)
    forward_split_kernel(const __grid_constant__ Problem p, const __grid_constant__ ForwardScan io, int chunks) {
  extern __shared__ __align__(1024) std::uint8_t memory[];
  using Shared = ForwardShared<K, mode == Mode::outputs>;
  auto& s = *reinterpret_cast<Shared*>(memory);
  constexpr int frags = K / 32;  // operands of half of a state
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int head = blockIdx.x / slices<K>, chain = warp / 2 % chains;
  const int first = (blockIdx.x % slices<K> * chains + chain) * slice;
  const std::size_t row = static_cast<std::size_t>(p.heads) * K;
  const std::size_t tokens = (static_cast<std::size_t>(head / p.heads) * p.length * p.heads + head % p.heads) * K;
  const Barriers barriers(chain);
  const Half half(warp % 2);
  init_barriers(s);

  if (warp >= 4 * chains) {
    const int* ready = io.ready == nullptr ? nullptr : io.ready + static_cast<std::size_t>(head) * chunks;
    const std::uint8_t* records =
        static_cast<const std::uint8_t*>(io.records) + static_cast<std::size_t>(head) * chunks * Record<K>::bytes;
    if (warp == 4 * chains) {
      produce<Shared::state_stages, Record<K>::state_bytes>(s.state, s.state_full, s.state_empty, records,
                                                            Record<K>::bytes, chunks, ready, lane);
    } else if constexpr (mode == Mode::outputs) {
      produce<Shared::output_stages, Record<K>::output_bytes>(s.output, s.output_full, s.output_empty,
                                                              records + Record<K>::state_bytes, Record<K>::bytes,
                                                              chunks, ready, lane);
    }
    return;
  }
  Exchange<K>& x = s.exchange[chain];
  if (warp >= 2 * chains) {  // helper
    Ring<Shared::output_stages> at;
    for (int c = 0; c < chunks; ++c) {
      group_sync<128>(barriers.full);
      if (mode == Mode::outputs && c > 0 && half.index == 0) release(&s.output_empty[at.previous()], lane);
      if constexpr (mode == Mode::states) {
        std::uint32_t state[frags][4], v_new[2][4];
#pragma unroll
        for (int n = 0; n < frags; ++n) get(state[n], x.state, half.index * frags + n, lane);
#pragma unroll
        for (int n = 0; n < 2; ++n) get(v_new[n], x.last, half.own[n], lane);
        if (c + 1 < chunks) group_arrive<128>(barriers.empty);
        const std::size_t slot = static_cast<std::size_t>(head) * chunks + c;
#pragma unroll
        for (int n = 0; n < frags; ++n) {
          store_tiles(io.states + slot * K * K, state[n], first, K / 8, half.index * frags + n, lane);
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          store_tiles(io.v_new + slot * K * chunk_tokens, v_new[n], first, 8, half.own[n], lane);
        }
      } else {
        std::uint32_t state[2 * frags][4], own[2][4], other[2][4];
#pragma unroll
        for (int n = 0; n < 2 * frags; ++n) get(state[n], x.state, n, lane);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          get(own[n], x.last, half.own[n], lane);
          get(other[n], x.last, half.other[n], lane);
        }
        if (c + 1 < chunks) group_arrive<128>(barriers.empty);
        barrier_wait(&s.output_full[at.stage], at.phase);
        const std::uint32_t tile = shared_address(s.output[at.stage]);
        float o[2][2][4];
        clear_blocks(o);
#pragma unroll
        for (int n = 0; n < 2 * frags; ++n) {
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            multiply_block_transposed<K>(o[m], state[n], tile + Record<K>::qg, 16 * half.own[m], 16 * n, lane);
          }
        }
        multiply_lower(o, own, other, tile + Record<K>::aqk, half, lane);
        at.next();
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int g = 0; g < 2; ++g) {
            const std::uint32_t left = transpose_matrix(pack(o[m][g][0], o[m][g][1]));
            const std::uint32_t right = transpose_matrix(pack(o[m][g][2], o[m][g][3]));
            const int token = c * chunk_tokens + 16 * half.own[m] + 8 * g + lane / 4;
            if (token < p.length) {
              auto* to = reinterpret_cast<std::uint32_t*>(io.o + tokens + token * row + first) + lane % 4;
              to[0] = left;
              to[4] = right;
            }
          }
        }
      }
    }
    return;
  }

  // chain
  const int from_channel = half.index * (K / 2);
  const std::size_t state_at = static_cast<std::size_t>(head) * K * K + static_cast<std::size_t>(from_channel) * K;
  float state[K / 16][4];
  if (io.state_in != nullptr) {
    load_state<K / 2>(state, io.state_in + state_at, K, first, lane);
  } else {
    clear(state);
  }
  const std::uint16_t* values = p.v + tokens + first;
  const auto fetch = [&](int stage, int c) {
    if (c < chunks) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        fetch_block(s.values[chain][half.index][stage] + m * 512, values, row, c, 16 * half.own[m], p.length, lane);
      }
    }
    copy_async_commit();
  };
  for (int c = 0; c < values_ahead - 1; ++c) fetch(c, c);
  Ring<Shared::state_stages> at;
  Ring<values_ahead> now;
  for (int c = 0; c < chunks; ++c) {
    fetch((c + values_ahead - 1) % values_ahead, c + values_ahead - 1);
    std::uint32_t operand[frags][4];
#pragma unroll
    for (int n = 0; n < frags; ++n) as_operand(operand[n], state[2 * n], state[2 * n + 1]);
    if (c > 0) group_sync<128>(barriers.empty);
#pragma unroll
    for (int n = 0; n < frags; ++n) put(x.state, half.index * frags + n, operand[n], lane);
    copy_async_wait<values_ahead - 1>();
    __syncwarp();
    barrier_wait(&s.state_full[at.stage], at.phase);
    const std::uint8_t* record = s.state[at.stage];
    const std::uint32_t tile = shared_address(record);

    // rhs = beta v - (beta k exp(G)) S, transposed: own tokens
    float rhs[2][2][4];
    {
      const auto* beta = reinterpret_cast<const float*>(record + Record<K>::beta);
      const std::uint32_t from = shared_address(s.values[chain][half.index][now.stage]) +
                                 ((lane & 7) + (lane >> 4) * 8) * 32 + ((lane >> 3) & 1) * 16;
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        std::uint32_t v[4];  // (tokens 0-7, columns 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15)
        load_matrices_transposed(v, from + m * 512);
#pragma unroll
        for (int g = 0; g < 2; ++g) {
          const float2 b = *reinterpret_cast<const float2*>(beta + 16 * half.own[m] + 8 * g + lane % 4 * 2);
          rhs[m][g][0] = b.x * low(v[2 * g]);
          rhs[m][g][1] = b.y * high(v[2 * g]);
          rhs[m][g][2] = b.x * low(v[2 * g + 1]);
          rhs[m][g][3] = b.y * high(v[2 * g + 1]);
        }
      }
      now.next();
    }
    const auto multiply_keys = [&](const std::uint32_t(&a)[4], int channel) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        multiply_block_transposed<K>(rhs[m], a, tile + Record<K>::nbg, 16 * half.own[m], channel, lane);
      }
    };
#pragma unroll
    for (int n = 0; n < frags; ++n) multiply_keys(operand[n], from_channel + 16 * n);
    group_sync<64>(barriers.chain);
    if (c > 0 && half.index == 0) release(&s.state_empty[at.previous()], lane);
#pragma unroll
    for (int n = 0; n < frags; ++n) {
      std::uint32_t a[4];
      get(a, x.state, (1 - half.index) * frags + n, lane);
      multiply_keys(a, K / 2 - from_channel + 16 * n);
    }
    // v_new = A rhs
    std::uint32_t own[2][4], other[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      as_operand(own[m], rhs[m][0], rhs[m][1]);
      put(x.middle, half.own[m], own[m], lane);
    }
    scale_columns<K / 2>(state, reinterpret_cast<const float*>(record + Record<K>::decay) + from_channel, lane);
    group_sync<64>(barriers.chain);
#pragma unroll
    for (int m = 0; m < 2; ++m) get(other[m], x.middle, half.other[m], lane);
    float v_new[2][2][4];
    clear_blocks(v_new);
    multiply_lower(v_new, own, other, tile + Record<K>::a, half, lane);
    // S = exp(G_end) S + kg^T v_new
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      as_operand(own[m], v_new[m][0], v_new[m][1]);
      put(x.last, half.own[m], own[m], lane);
    }
    group_arrive<128>(barriers.full);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      update_state<K>(state, own[m], tile + Record<K>::kg, 16 * half.own[m], from_channel, lane);
    }
    group_sync<64>(barriers.chain);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      get(other[m], x.last, half.other[m], lane);
      update_state<K>(state, other[m], tile + Record<K>::kg, 16 * half.other[m], from_channel, lane);
    }
    at.next();
  }
  copy_async_wait<0>();
  if (io.state_out != nullptr) store_state<K / 2>(state, io.state_out + state_at, K, first, lane);
  wait_for_previous_kernel();
}

template <int K>
__global__ void __launch_bounds__(threads, 1)
    reverse_split_kernel(const __grid_constant__ Problem p, const __grid_constant__ ReverseScan io, int chunks) {
  extern __shared__ __align__(1024) std::uint8_t memory[];
  using Shared = ReverseShared<K>;
  auto& s = *reinterpret_cast<Shared*>(memory);
  constexpr int frags = K / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int head = blockIdx.x / slices<K>, chain = warp / 2 % chains;
  const int first = (blockIdx.x % slices<K> * chains + chain) * slice;
  const Barriers barriers(chain);
  const Half half(warp % 2);
  const int from_channel = half.index * (K / 2);
  init_barriers(s);

  if (warp >= 4 * chains) {
    constexpr std::ptrdiff_t back = -static_cast<std::ptrdiff_t>(Record<K>::bytes);
    const int* ready = io.ready == nullptr ? nullptr : io.ready + static_cast<std::size_t>(head) * chunks + chunks - 1;
    const std::uint8_t* last_record = static_cast<const std::uint8_t*>(io.records) +
                                      (static_cast<std::size_t>(head) * chunks + chunks - 1) * Record<K>::bytes;
    if (warp == 4 * chains) {
      produce<Shared::state_stages, Record<K>::state_bytes>(s.state, s.state_full, s.state_empty, last_record, back,
                                                            chunks, ready, lane);
    } else {
      produce<Shared::output_stages, Record<K>::output_bytes>(
          s.output, s.output_full, s.output_empty, last_record + Record<K>::state_bytes, back, chunks, ready, lane);
    }
    return;
  }
  // A helper and the chain's warp of the same half pair up: full and empty, by half.
  const int full = half.index == 0 ? barriers.full : barriers.empty;
  float4(*handed)[32] = s.handed[chain][half.index];
  const int empty = 9 + 2 * chain + half.index;
  if (warp >= 2 * chains) {  // helper: what d_o contributes
    const std::size_t row = static_cast<std::size_t>(p.heads) * K;
    const std::uint16_t* d_o =
        io.d_o + (static_cast<std::size_t>(head / p.heads) * p.length * p.heads + head % p.heads) * K + first;
    const auto fetch = [&](int stage, int c) {  // this half's tokens, for both
      if (c < chunks) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          fetch_block(s.values[chain][stage] + half.own[m] * 512, d_o, row, chunks - 1 - c, 16 * half.own[m], p.length,
                      lane);
        }
      }
      copy_async_commit();
    };
    for (int c = 0; c < values_ahead - 1; ++c) fetch(c, c);
    Ring<Shared::output_stages> at;
    Ring<values_ahead> now;
    for (int c = 0; c < chunks; ++c) {
      copy_async_wait<values_ahead - 2>();
      group_sync<64>(barriers.helpers);  // the other's tokens have arrived, and it has read the stage that is next
      if (c > 0 && half.index == 0) release(&s.output_empty[at.previous()], lane);
      fetch((c + values_ahead - 1) % values_ahead, c + values_ahead - 1);
      std::uint32_t own[2][4], other[2][4];
      const std::uint32_t from =
          shared_address(s.values[chain][now.stage]) + ((lane & 7) + (lane >> 4) * 8) * 32 + ((lane >> 3) & 1) * 16;
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        load_matrices_transposed(own[m], from + half.own[m] * 512);
        load_matrices_transposed(other[m], from + half.other[m] * 512);
      }
      now.next();
      float by_pair[2][2][4], by_state[K / 16][4];
      clear_blocks(by_pair);
      clear(by_state);
      barrier_wait(&s.output_full[at.stage], at.phase);
      const std::uint32_t tile = shared_address(s.output[at.stage]);
      multiply_upper(by_pair, own, other, tile + Record<K>::aqk, half, lane);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        update_state<K>(by_state, own[m], tile + Record<K>::qg, 16 * half.own[m], from_channel, lane);
        update_state<K>(by_state, other[m], tile + Record<K>::qg, 16 * half.other[m], from_channel, lane);
      }
      at.next();
      if (c > 0) group_sync<64>(empty);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int g = 0; g < 2; ++g) {
          const float(&y)[4] = by_pair[m][g];
          handed[2 * m + g][lane] = {y[0], y[1], y[2], y[3]};
        }
      }
#pragma unroll
      for (int n = 0; n < K / 16; ++n) {
        handed[4 + n][lane] = {by_state[n][0], by_state[n][1], by_state[n][2], by_state[n][3]};
      }
      group_arrive<64>(full);
    }
    copy_async_wait<0>();
    return;
  }

  // chain
  Exchange<K>& x = s.exchange[chain];
  const std::size_t state_at = static_cast<std::size_t>(head) * K * K + static_cast<std::size_t>(from_channel) * K;
  float state[K / 16][4];
  if (io.dstate_out != nullptr) {
    load_state<K / 2>(state, io.dstate_out + state_at, K, first, lane);
  } else {
    clear(state);
  }
  Ring<Shared::state_stages> at;
  for (int c = 0; c < chunks; ++c) {
    const std::size_t slot = static_cast<std::size_t>(head) * chunks + chunks - 1 - c;
    std::uint32_t operand[frags][4];
#pragma unroll
    for (int n = 0; n < frags; ++n) {
      as_operand(operand[n], state[2 * n], state[2 * n + 1]);
      put(x.state, half.index * frags + n, operand[n], lane);
    }
    barrier_wait(&s.state_full[at.stage], at.phase);
    const std::uint8_t* record = s.state[at.stage];
    const std::uint32_t tile = shared_address(record);
    // dv_new = Aqk^T d_o + kg dS, transposed: own tokens
    float dv[2][2][4];
    clear_blocks(dv);
    const int again = anew(lane);
    const auto multiply_keys = [&](const std::uint32_t(&a)[4], int channel) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        multiply_block_transposed<K>(dv[m], a, tile + Record<K>::kg, 16 * half.own[m], channel, again);
      }
    };
#pragma unroll
    for (int n = 0; n < frags; ++n) multiply_keys(operand[n], from_channel + 16 * n);
    scale_columns<K / 2>(state, reinterpret_cast<const float*>(record + Record<K>::decay) + from_channel, lane);
    group_sync<64>(barriers.chain);
    if (c > 0 && half.index == 0) release(&s.state_empty[at.previous()], lane);
#pragma unroll
    for (int n = 0; n < frags; ++n) {
      std::uint32_t a[4];
      get(a, x.state, (1 - half.index) * frags + n, lane);
      multiply_keys(a, K / 2 - from_channel + 16 * n);
    }
    group_sync<64>(full);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        const float4 y = handed[2 * m + g][lane];
        dv[m][g][0] += y.x;
        dv[m][g][1] += y.y;
        dv[m][g][2] += y.z;
        dv[m][g][3] += y.w;
      }
    }
#pragma unroll
    for (int n = 0; n < K / 16; ++n) {
      const float4 y = handed[4 + n][lane];
      state[n][0] += y.x;
      state[n][1] += y.y;
      state[n][2] += y.z;
      state[n][3] += y.w;
    }
    // Y = A^T dv_new
    std::uint32_t own[2][4], other[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      as_operand(own[m], dv[m][0], dv[m][1]);
      put(x.middle, half.own[m], own[m], lane);
    }
    group_sync<64>(barriers.chain);
    if (c + 1 < chunks) group_arrive<64>(empty);
    if (io.dstates != nullptr) {
#pragma unroll
      for (int n = 0; n < frags; ++n) {
        store_tiles(io.dstates + slot * K * K, operand[n], first, K / 8, half.index * frags + n, anew(lane));
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) get(other[m], x.middle, half.other[m], lane);
    float y[2][2][4];
    clear_blocks(y);
    multiply_upper(y, own, other, tile + Record<K>::a, half, anew(lane));
    // dS = exp(G_end) dS + qg^T d_o - (beta k exp(G))^T Y
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      as_operand(own[m], y[m][0], y[m][1]);
      put(x.last, half.own[m], own[m], lane);
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      update_state<K>(state, own[m], tile + Record<K>::nbg, 16 * half.own[m], from_channel, lane);
    }
    group_sync<64>(barriers.chain);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      get(other[m], x.last, half.other[m], lane);
      update_state<K>(state, other[m], tile + Record<K>::nbg, 16 * half.other[m], from_channel, lane);
    }
    at.next();
    if (io.minus_y != nullptr) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) own[m][e] ^= 0x80008000u;
        store_tiles(io.minus_y + slot * K * chunk_tokens, own[m], first, 8, half.own[m], lane);
      }
    }
  }
  if (io.dstate_in != nullptr) store_state<K / 2>(state, io.dstate_in + state_at, K, first, lane);
  wait_for_previous_kernel();
}

template <int K, Mode mode>
cudaError_t forward_of(const Problem& p, const ForwardScan& s, cudaStream_t stream) {
  return launch(forward_split_kernel<K, mode>, p.segments * p.heads * slices<K>, threads,
                sizeof(ForwardShared<K, mode == Mode::outputs>), s.ready != nullptr, stream, p, s);
}

template <int K>
cudaError_t reverse_of(const Problem& p, const ReverseScan& s, cudaStream_t stream) {
  return launch(reverse_split_kernel<K>, p.segments * p.heads * slices<K>, threads, sizeof(ReverseShared<K>),
                s.ready != nullptr, stream, p, s);
}

}  // namespace

cudaError_t scan_forward_split(const Problem& p, const ForwardScan& s, cudaStream_t stream) {
  if (p.head_dim == 128) {
    return s.states != nullptr ? forward_of<128, Mode::states>(p, s, stream)
                               : forward_of<128, Mode::outputs>(p, s, stream);
  }
  return s.states != nullptr ? forward_of<64, Mode::states>(p, s, stream) : forward_of<64, Mode::outputs>(p, s, stream);
}

cudaError_t scan_reverse_split(const Problem& p, const ReverseScan& s, cudaStream_t stream) {
  return p.head_dim == 128 ? reverse_of<128>(p, s, stream) : reverse_of<64>(p, s, stream);
}

}  // namespace deltapipe::kernels::cuda::kda
