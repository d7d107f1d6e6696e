// The scans over chunks, for many heads. The V columns of a state are independent given a chunk's record, so a block of
// threads owns 64 columns of one head and walks all its chunks. A "chain" warp holds 16 columns of the state,
// transposed, as tensor core accumulators: every product's result is, repacked, the left operand of the next, and
// nothing but the records passes through shared memory. A second warp a chain does what is not on the chain: outputs or
// stores forward, the products of d_o in reverse. Two producer threads keep the records coming by bulk copies.
#include "kernels/cuda/kda_scan.cuh"

namespace deltapipe::kernels::cuda::kda {
namespace {

constexpr int chains = 4;

template <int K, Mode mode>
struct ForwardShared {
  static constexpr int readers = chains;
  static constexpr bool outputs = mode == Mode::outputs;
  static constexpr int state_stages = 3, output_stages = !outputs ? 1 : K == 64 ? 4 : 2;
  std::uint8_t state[state_stages][Record<K>::state_bytes];
  std::uint8_t output[output_stages][outputs ? Record<K>::output_bytes : 16];
  std::uint8_t values[chains][values_ahead][slice_bytes];
  uint4 handed[chains][K / 16 + 4][32];  // operands of the state and of v_new
  std::uint64_t state_full[state_stages], state_empty[state_stages];
  std::uint64_t output_full[output_stages], output_empty[output_stages];
};

template <int K>
struct ReverseShared {
  static constexpr int readers = chains;
  static constexpr int state_stages = K == 64 ? 3 : 2, output_stages = 2;
  std::uint8_t state[state_stages][Record<K>::state_bytes];
  std::uint8_t output[output_stages][Record<K>::output_bytes];
  std::uint8_t values[chains][values_ahead][slice_bytes];
  float4 handed[chains][8 + K / 8][32];  // d_o^T Aqk and d_o^T qg
  std::uint64_t state_full[state_stages], state_empty[state_stages];
  std::uint64_t output_full[output_stages], output_empty[output_stages];
};

constexpr int forward_threads = (2 * chains + 2) * 32;  // the last two warps are producers

template <int K, Mode mode>
__global__ void __launch_bounds__(forward_threads, 1)
    forward_kernel(const __grid_constant__ Problem p, const __grid_constant__ ForwardScan io, int chunks) {
  extern __shared__ __align__(1024) std::uint8_t memory[];
  using Shared = ForwardShared<K, mode>;
  auto& s = *reinterpret_cast<Shared*>(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  constexpr int slices = K / (slice * chains);
  const int head = blockIdx.x / slices;
  const int pair = warp % chains, first = (blockIdx.x % slices * chains + pair) * slice;
  const std::uint8_t* records =
      static_cast<const std::uint8_t*>(io.records) + static_cast<std::size_t>(head) * chunks * Record<K>::bytes;
  const std::size_t row = static_cast<std::size_t>(p.heads) * K;
  const std::size_t tokens = (static_cast<std::size_t>(head / p.heads) * p.length * p.heads + head % p.heads) * K;
  const int full = 1 + 2 * pair, empty = full + 1;  // named barriers between a chain and its helper
  init_barriers(s);

  if (warp >= 2 * chains) {
    if (warp == 2 * chains) {
      produce<Shared::state_stages, Record<K>::state_bytes>(s.state, s.state_full, s.state_empty, records,
                                                            Record<K>::bytes, chunks, nullptr, lane);
    } else if constexpr (mode == Mode::outputs) {
      produce<Shared::output_stages, Record<K>::output_bytes>(s.output, s.output_full, s.output_empty,
                                                              records + Record<K>::state_bytes, Record<K>::bytes,
                                                              chunks, nullptr, lane);
    }
    return;
  }
  if (warp >= chains) {  // helper
    Ring<Shared::output_stages> at;
    for (int c = 0; c < chunks; ++c) {
      std::uint32_t state[K / 16][4], v_new[4][4];
      group_sync<64>(full);
#pragma unroll
      for (int n = 0; n < K / 16 + 4; ++n) {
        const uint4 x = s.handed[pair][n][lane];
        std::uint32_t(&to)[4] = n < K / 16 ? state[n < K / 16 ? n : 0] : v_new[n < K / 16 ? 0 : n - K / 16];
        to[0] = x.x;
        to[1] = x.y;
        to[2] = x.z;
        to[3] = x.w;
      }
      if (c + 1 < chunks) group_arrive<64>(empty);
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
        release(&s.output_empty[at.stage], lane);
        at.next();
      }
    }
    return;
  }

  // chain
  float state[K / 8][4];
  if (io.state_in != nullptr) {
    load_state<K>(state, io.state_in + static_cast<std::size_t>(head) * K * K, K, first, lane);
  } else {
    clear(state);
  }
  const std::uint16_t* values = p.v + tokens + first;
  for (int c = 0; c < values_ahead - 1; ++c) {
    fetch_slice(s.values[pair][c], values, row, c, p.length, c < chunks, lane);
  }
  Ring<Shared::state_stages> at;
  Ring<values_ahead> now;
  for (int c = 0; c < chunks; ++c) {
    {
      const int ahead = c + values_ahead - 1;
      fetch_slice(s.values[pair][ahead % values_ahead], values, row, ahead, p.length, ahead < chunks, lane);
    }
    std::uint32_t operand[K / 16][4];
#pragma unroll
    for (int n = 0; n < K / 16; ++n) as_operand(operand[n], state[2 * n], state[2 * n + 1]);
    if (c > 0) group_sync<64>(empty);
#pragma unroll
    for (int n = 0; n < K / 16; ++n) {
      s.handed[pair][n][lane] = {operand[n][0], operand[n][1], operand[n][2], operand[n][3]};
    }
    if (c > 0) release(&s.state_empty[at.previous()], lane);
    copy_async_wait<values_ahead - 1>();
    __syncwarp();
    barrier_wait(&s.state_full[at.stage], at.phase);
    const std::uint8_t* record = s.state[at.stage];
    const std::uint32_t tile = shared_address(record);

    // rhs = beta v - (beta k exp(G)) S, transposed
    float rhs[8][4];
    weigh_values(rhs, reinterpret_cast<const float*>(record + Record<K>::beta), s.values[pair][now.stage], lane);
    now.next();
    const int again = anew(lane);
#pragma unroll
    for (int n = 0; n < K / 16; ++n) {
      multiply_transposed<K>(rhs, operand[n], tile + Record<K>::nbg, 16 * n, 0, again);
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
      s.handed[pair][K / 16 + n][lane] = {a[0], a[1], a[2], a[3]};
      multiply_rows<K>(state, a, tile + Record<K>::kg, 16 * n, K / 16, lane);
    }
    group_arrive<64>(full);
    at.next();
  }
  copy_async_wait<0>();
  if (io.state_out != nullptr) {
    store_state<K>(state, io.state_out + static_cast<std::size_t>(head) * K * K, K, first, lane);
  }
}

constexpr int reverse_threads =
    (2 * chains + 4) * 32;  // three groups of four warps, which share the registers unevenly

template <int K>
__global__ void __launch_bounds__(reverse_threads, 1)
    reverse_kernel(const __grid_constant__ Problem p, const __grid_constant__ ReverseScan io, int chunks) {
  extern __shared__ __align__(1024) std::uint8_t memory[];
  using Shared = ReverseShared<K>;
  auto& s = *reinterpret_cast<Shared*>(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  constexpr int slices = K / (slice * chains);
  const int head = blockIdx.x / slices, pair = warp % chains, first = (blockIdx.x % slices * chains + pair) * slice;
  const std::uint8_t* last_record = static_cast<const std::uint8_t*>(io.records) +
                                    (static_cast<std::size_t>(head) * chunks + chunks - 1) * Record<K>::bytes;
  const int full = 1 + 2 * pair, empty = full + 1;
  constexpr std::ptrdiff_t back = -static_cast<std::ptrdiff_t>(Record<K>::bytes);
  init_barriers(s);

  if (warp >= 2 * chains) {
    set_registers<false, 40>();
    if (warp > 2 * chains + 1) return;
    if (warp == 2 * chains) {
      produce<Shared::state_stages, Record<K>::state_bytes>(s.state, s.state_full, s.state_empty, last_record, back,
                                                            chunks, nullptr, lane);
    } else {
      produce<Shared::output_stages, Record<K>::output_bytes>(
          s.output, s.output_full, s.output_empty, last_record + Record<K>::state_bytes, back, chunks, nullptr, lane);
    }
    return;
  }
  if (warp >= chains) {  // helper: what d_o contributes
    set_registers<true, 208>();
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
      if (c > 0) group_sync<64>(empty);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        s.handed[pair][n][lane] = {by_pair[n][0], by_pair[n][1], by_pair[n][2], by_pair[n][3]};
      }
#pragma unroll
      for (int n = 0; n < K / 8; ++n) {
        s.handed[pair][8 + n][lane] = {by_state[n][0], by_state[n][1], by_state[n][2], by_state[n][3]};
      }
      group_arrive<64>(full);
      release(&s.output_empty[at.stage], lane);
      at.next();
    }
    copy_async_wait<0>();
    return;
  }

  // chain
  set_registers<true, 240>();
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
    } else {
      fence_async();
    }
    if (c > 0) release(&s.state_empty[at.previous()], lane);
    barrier_wait(&s.state_full[at.stage], at.phase);
    const std::uint8_t* record = s.state[at.stage];
    const std::uint32_t tile = shared_address(record);
    scale_columns<K>(state, reinterpret_cast<const float*>(record + Record<K>::decay), lane);
    // dv_new = Aqk^T d_o + kg dS, transposed
    float dv[8][4];
    clear(dv);
#pragma unroll
    for (int n = 0; n < K / 16; ++n)
      multiply_transposed<K>(dv, operand[n], tile + Record<K>::kg, 16 * n, 0, anew(lane));
    group_sync<64>(full);
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
    if (c + 1 < chunks) group_arrive<64>(empty);
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
    at.next();
  }
  if (io.dstate_in != nullptr) {
    const int block = anew(blockIdx.x);
    store_state<K>(state, io.dstate_in + static_cast<std::size_t>(block / slices) * K * K, K,
                   (block % slices * chains + pair) * slice, lane);
  }
}

template <int K>
cudaError_t forward_of(const Problem& p, const ForwardScan& s, cudaStream_t stream) {
  const int blocks = p.segments * p.heads * K / (slice * chains);
  return s.states != nullptr ? launch(forward_kernel<K, Mode::states>, blocks, forward_threads,
                                      sizeof(ForwardShared<K, Mode::states>), false, stream, p, s)
                             : launch(forward_kernel<K, Mode::outputs>, blocks, forward_threads,
                                      sizeof(ForwardShared<K, Mode::outputs>), false, stream, p, s);
}

template <int K>
cudaError_t reverse_of(const Problem& p, const ReverseScan& s, cudaStream_t stream) {
  return launch(reverse_kernel<K>, p.segments * p.heads * K / (slice * chains), reverse_threads,
                sizeof(ReverseShared<K>), false, stream, p, s);
}

/// Few heads leave multiprocessors idle and wait for each chunk in turn: then two warps share a chain, and a block of
/// threads takes half as many columns.
bool few_heads(const Problem& p) { return p.segments * p.heads * p.head_dim / (2 * slice) <= processors(); }

}  // namespace

int spare_processors(const Problem& p) {
  return few_heads(p) ? processors() - p.segments * p.heads * p.head_dim / (2 * slice) : 0;
}

cudaError_t scan_forward(const Problem& p, const ForwardScan& s, cudaStream_t stream) {
  if (few_heads(p)) return scan_forward_split(p, s, stream);
  return p.head_dim == 128 ? forward_of<128>(p, s, stream) : forward_of<64>(p, s, stream);
}

cudaError_t scan_reverse(const Problem& p, const ReverseScan& s, cudaStream_t stream) {
  if (few_heads(p)) return scan_reverse_split(p, s, stream);
  return p.head_dim == 128 ? reverse_of<128>(p, s, stream) : reverse_of<64>(p, s, stream);
}

}  // namespace deltapipe::kernels::cuda::kda
