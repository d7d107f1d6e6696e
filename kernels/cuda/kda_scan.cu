// The scans over chunks. The V columns of a state are independent given a chunk's record, so a block of threads owns 64
// columns of one head and walks all its chunks: four warps hold the state, transposed, as accumulators of wgmma; every
// product's sums are, rounded, the left operand of the next, and right operands are the records' tiles as they arrive.
// Two producer warps keep the records coming by bulk copies.
//
// A chunk's time is that of its chain of three products, each of which waits for the one before. What is not on the
// chain (outputs; in reverse what d_o contributes) is queued behind the chain's products, in halves where that fits the
// waits: the tensor cores work on it while sums are rounded.
#include "kernels/cuda/kda_scan.cuh"

namespace deltapipe::kernels::cuda::kda {
namespace {

enum class Mode { outputs, states };

constexpr int threads = (group_warps + 2) * 32;  // the last two warps are producers

template <int K, bool outputs>
struct Shared {
  static constexpr int readers = group_warps, state_stages = 3, output_stages = outputs ? 3 : 1;
  std::uint8_t state[state_stages][Record<K>::state_room];
  std::uint8_t output[output_stages][outputs ? Record<K>::output_bytes : 1024];
  std::uint8_t values[group_warps][values_ahead][slice_bytes];
  std::uint64_t state_full[state_stages], state_empty[state_stages];
  std::uint64_t output_full[output_stages], output_empty[output_stages];
};
static_assert(Record<128>::output_bytes % 1024 == 0 && sizeof(Shared<128, true>) <= 232448);

/// A warp's 16 columns of a chunk's outputs, from [16, 64 tokens]; nothing for a chunk before the first.
__device__ __forceinline__ void store_outputs(std::uint16_t* o, std::size_t row, const float (&sum)[8][4], int chunk,
                                              int length, int lane) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const std::uint32_t x = transpose_matrix(pack(sum[n][0], sum[n][1])),
                        y = transpose_matrix(pack(sum[n][2], sum[n][3]));
    const int token = chunk * chunk_tokens + 8 * n + lane / 4;
    if (token >= 0 && token < length) {
      auto* to = reinterpret_cast<std::uint32_t*>(o + token * row) + lane % 4;
      to[0] = x;
      to[4] = y;
    }
  }
}

template <int K, Mode mode>
__global__ void __launch_bounds__(threads, 1)
    forward_kernel(const __grid_constant__ Problem p, const __grid_constant__ ForwardScan io, int chunks) {
  extern __shared__ __align__(1024) std::uint8_t memory[];
  constexpr bool outputs = mode == Mode::outputs;
  using S = Shared<K, outputs>;
  auto& s = *reinterpret_cast<S*>(memory);
  constexpr int operands = K / 16, panels = K / 64;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int head = blockIdx.x / panels, first = blockIdx.x % panels * group_columns + warp % group_warps * slice;
  init_barriers(s);

  if (warp >= group_warps) {
    const int* ready = io.ready == nullptr ? nullptr : io.ready + static_cast<std::size_t>(head) * chunks;
    const std::uint8_t* records =
        static_cast<const std::uint8_t*>(io.records) + static_cast<std::size_t>(head) * chunks * Record<K>::bytes;
    if (warp == group_warps) {
      produce<S::state_stages, Record<K>::state_bytes>(s.state, s.state_full, s.state_empty, records, Record<K>::bytes,
                                                       chunks, ready, lane);
    } else if constexpr (outputs) {
      produce<S::output_stages, Record<K>::output_bytes>(s.output, s.output_full, s.output_empty,
                                                         records + Record<K>::state_bytes, Record<K>::bytes, chunks,
                                                         ready, lane);
    }
    return;
  }

  const std::size_t row = static_cast<std::size_t>(p.heads) * K;
  const std::size_t tokens =
      (static_cast<std::size_t>(head / p.heads) * p.length * p.heads + head % p.heads) * K + first;
  float state[K / 8][4], sum[8][4], weighed_values[8][4], o[8][4] = {};
  std::uint32_t from[operands][4];
  if (io.state_in != nullptr) {
    load_state<K>(state, io.state_in + static_cast<std::size_t>(head) * K * K, K, first, lane);
  } else {
    clear(state);
  }
  as_operands<operands>(from, state);
  const auto fetch = [&](int c) {
    fetch_slice(s.values[warp][c % values_ahead], p.v + tokens, row, c, p.length, c < chunks, lane);
  };
  // A chunk's values have arrived when as many others are on their way as can be. Beyond the last chunk it weighs what
  // is there.
  const auto begin_chunk = [&](int c, const Ring<S::state_stages>& at) {
    fetch(c + values_ahead - 1);
    copy_async_wait<values_ahead - 1>();
    __syncwarp();
    if (c < chunks) barrier_wait(&s.state_full[at.stage], at.phase);
    weigh_values(weighed_values, reinterpret_cast<const float*>(s.state[at.stage] + Record<K>::beta),
                 s.values[warp][c % values_ahead], lane);
  };
  for (int c = 0; c < values_ahead - 1; ++c) fetch(c);
  Ring<S::state_stages> at;
  Ring<S::output_stages> out_at;
  begin_chunk(0, at);
  for (int c = 0; c < chunks; ++c) {
    const std::uint8_t* record = s.state[at.stage];
    const std::uint32_t tile = shared_address(record), output = shared_address(s.output[out_at.stage]);
    const std::size_t slot = static_cast<std::size_t>(head) * chunks + c;
    scale_columns<K>(state, reinterpret_cast<const float*>(record + Record<K>::decay), lane);
    // rhs = beta v - (beta k exp(G)) S
    begin_products();
    multiply_channels<K, 0, operands>(sum, from, tile + Record<K>::nbg, false);
    end_group();
    if constexpr (outputs) {
      wait_for_groups<1>();  // done long since, but the compiler does not know
      settle<8>(o);
      store_outputs(io.o + tokens, row, o, c - 1, p.length, lane);
      barrier_wait(&s.output_full[out_at.stage], out_at.phase);
      begin_products();
      multiply_channels<K, 0, operands / 2>(o, from, output + Record<K>::qg, false);
      end_group();
    } else {
#pragma unroll
      for (int n = 0; n < operands; ++n) store_tiles(io.states + slot * K * K, from[n], first, K / 8, n, lane);
    }
    wait_for_groups<outputs ? 1 : 0>();
    settle<8>(sum);
    // v_new = A rhs
    std::uint32_t rhs[4][4], v_new[4][4];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) weighed_values[n][e] += sum[n][e];
    }
    as_operands<4>(rhs, weighed_values);
    begin_products();
    multiply_square(sum, rhs, tile + Record<K>::a, false);
    end_group();
    if constexpr (outputs) {
      multiply_channels<K, operands / 2, operands>(o, from, output + Record<K>::qg, true);
      end_group();
    }
    wait_for_groups<outputs ? 1 : 0>();
    settle<8>(sum);
    // S = exp(G_end) S + kg^T v_new
    as_operands<4>(v_new, sum);
    begin_products();
#pragma unroll
    for (int n = 0; n < panels; ++n) {
      multiply_tokens(state + 8 * n, v_new, tile + Record<K>::kg + n * Record<K>::panel, true);
      end_group();
    }
    if constexpr (outputs) {
      multiply_square(o, v_new, output + Record<K>::aqk, true);
      end_group();
    } else {
#pragma unroll
      for (int n = 0; n < 4; ++n) store_tiles(io.v_new + slot * K * chunk_tokens, v_new[n], first, 8, n, lane);
    }
    const int stage = at.stage;
    at.next();
    begin_chunk(c + 1, at);
    if constexpr (panels == 2) {
      wait_for_groups<outputs ? 2 : 1>();
      settle<8>(state);
#pragma unroll
      for (int n = 0; n < 4; ++n) as_operand(from[n], state[2 * n], state[2 * n + 1]);
    }
    wait_for_groups<outputs ? 1 : 0>();
    release(&s.state_empty[stage], lane);
    settle<8>(state + 8 * (panels - 1));
#pragma unroll
    for (int n = operands - 4; n < operands; ++n) as_operand(from[n], state[2 * n], state[2 * n + 1]);
    if constexpr (outputs) {
      wait_for_groups<0>();
      settle<8>(o);
      release(&s.output_empty[out_at.stage], lane);
      out_at.next();
    }
  }
  copy_async_wait<0>();
  if constexpr (outputs) store_outputs(io.o + tokens, row, o, chunks - 1, p.length, lane);
  if (io.state_out != nullptr) {
    store_state<K>(state, io.state_out + static_cast<std::size_t>(head) * K * K, K, first, lane);
  }
  wait_for_previous_kernel();
}

template <int K>
__global__ void __launch_bounds__(threads, 1)
    reverse_kernel(const __grid_constant__ Problem p, const __grid_constant__ ReverseScan io, int chunks) {
  extern __shared__ __align__(1024) std::uint8_t memory[];
  using S = Shared<K, true>;
  auto& s = *reinterpret_cast<S*>(memory);
  constexpr int operands = K / 16, panels = K / 64;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int head = blockIdx.x / panels, first = blockIdx.x % panels * group_columns + warp % group_warps * slice;
  init_barriers(s);

  if (warp >= group_warps) {
    constexpr std::ptrdiff_t back = -static_cast<std::ptrdiff_t>(Record<K>::bytes);
    const int* ready = io.ready == nullptr ? nullptr : io.ready + static_cast<std::size_t>(head) * chunks + chunks - 1;
    const std::uint8_t* last_record = static_cast<const std::uint8_t*>(io.records) +
                                      (static_cast<std::size_t>(head) * chunks + chunks - 1) * Record<K>::bytes;
    if (warp == group_warps) {
      produce<S::state_stages, Record<K>::state_bytes>(s.state, s.state_full, s.state_empty, last_record, back, chunks,
                                                       ready, lane);
    } else {
      produce<S::output_stages, Record<K>::output_bytes>(
          s.output, s.output_full, s.output_empty, last_record + Record<K>::state_bytes, back, chunks, ready, lane);
    }
    return;
  }

  const std::size_t row = static_cast<std::size_t>(p.heads) * K;
  const std::uint16_t* d_o =
      io.d_o + (static_cast<std::size_t>(head / p.heads) * p.length * p.heads + head % p.heads) * K + first;
  float state[K / 8][4], sum[8][4];
  std::uint32_t from[operands][4], of_outputs[4][4];
  if (io.dstate_out != nullptr) {
    load_state<K>(state, io.dstate_out + static_cast<std::size_t>(head) * K * K, K, first, lane);
  } else {
    clear(state);
  }
  as_operands<operands>(from, state);
  const auto fetch = [&](int c) {
    fetch_slice(s.values[warp][c % values_ahead], d_o, row, chunks - 1 - c, p.length, c < chunks, lane);
  };
  const auto begin_chunk = [&](int c) {
    fetch(c + values_ahead - 1);
    copy_async_wait<values_ahead - 1>();
    __syncwarp();
    const std::uint32_t values =
        shared_address(s.values[warp][c % values_ahead]) + ((lane & 7) + (lane >> 4) * 8) * 32 + ((lane >> 3) & 1) * 16;
#pragma unroll
    for (int n = 0; n < 4; ++n) load_matrices_transposed(of_outputs[n], values + n * 16 * 32);
  };
  for (int c = 0; c < values_ahead - 1; ++c) fetch(c);
  Ring<S::state_stages> at;
  Ring<S::output_stages> out_at;
  begin_chunk(0);
  for (int c = 0; c < chunks; ++c) {
    const std::size_t slot = static_cast<std::size_t>(head) * chunks + chunks - 1 - c;
    const std::uint8_t* record = s.state[at.stage];
    const std::uint32_t tile = shared_address(record), output = shared_address(s.output[out_at.stage]);
    barrier_wait(&s.state_full[at.stage], at.phase);
    barrier_wait(&s.output_full[out_at.stage], out_at.phase);
    scale_columns<K>(state, reinterpret_cast<const float*>(record + Record<K>::decay), lane);
    // dv_new = Aqk^T d_o + kg dS
    begin_products();
    multiply_channels<K, 0, operands>(sum, from, tile + Record<K>::kg, false);
    multiply_tokens(sum, of_outputs, output + Record<K>::aqk, true);
    end_group();
    // dS = exp(G_end) dS + qg^T d_o
    begin_products();
    multiply_tokens(state, of_outputs, output + Record<K>::qg, true);
    end_group();
    if (io.dstates != nullptr) {
#pragma unroll
      for (int n = 0; n < operands; ++n) store_tiles(io.dstates + slot * K * K, from[n], first, K / 8, n, lane);
    }
    wait_for_groups<1>();
    settle<8>(sum);
    // Y = A^T dv_new
    std::uint32_t dv_new[4][4], y[4][4];
    as_operands<4>(dv_new, sum);
    begin_products();
    multiply_tokens(sum, dv_new, tile + Record<K>::a, false);
    end_group();
    if constexpr (panels == 2) {
      multiply_tokens(state + 8, of_outputs, output + Record<K>::qg + Record<K>::panel, true);
      end_group();
    }
    wait_for_groups<panels - 1>();
    settle<8>(sum);
    // dS -= (beta k exp(G))^T Y
    as_operands<4>(y, sum);
    begin_products();
#pragma unroll
    for (int n = 0; n < panels; ++n) {
      multiply_tokens(state + 8 * n, y, tile + Record<K>::nbg + n * Record<K>::panel, true);
      end_group();
    }
    if (io.minus_y != nullptr) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        std::uint32_t a[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) a[e] = y[n][e] ^ 0x80008000u;
        store_tiles(io.minus_y + slot * K * chunk_tokens, a, first, 8, n, lane);
      }
    }
    wait_for_groups<panels>();
    release(&s.output_empty[out_at.stage], lane);
    out_at.next();
    begin_chunk(c + 1);
    if constexpr (panels == 2) {
      wait_for_groups<1>();
      settle<8>(state);
#pragma unroll
      for (int n = 0; n < 4; ++n) as_operand(from[n], state[2 * n], state[2 * n + 1]);
    }
    wait_for_groups<0>();
    release(&s.state_empty[at.stage], lane);
    at.next();
    settle<8>(state + 8 * (panels - 1));
#pragma unroll
    for (int n = operands - 4; n < operands; ++n) as_operand(from[n], state[2 * n], state[2 * n + 1]);
  }
  copy_async_wait<0>();
  if (io.dstate_in != nullptr) {
    store_state<K>(state, io.dstate_in + static_cast<std::size_t>(head) * K * K, K, first, lane);
  }
  wait_for_previous_kernel();
}

int blocks(const Problem& p) { return p.segments * p.heads * p.head_dim / group_columns; }

template <int K>
cudaError_t forward_of(const Problem& p, const ForwardScan& s, cudaStream_t stream) {
  return s.states != nullptr ? launch(forward_kernel<K, Mode::states>, blocks(p), threads, sizeof(Shared<K, false>),
                                      s.ready != nullptr, stream, p, s)
                             : launch(forward_kernel<K, Mode::outputs>, blocks(p), threads, sizeof(Shared<K, true>),
                                      s.ready != nullptr, stream, p, s);
}

template <int K>
cudaError_t reverse_of(const Problem& p, const ReverseScan& s, cudaStream_t stream) {
  return launch(reverse_kernel<K>, blocks(p), threads, sizeof(Shared<K, true>), s.ready != nullptr, stream, p, s);
}

}  // namespace

int spare_processors(const Problem& p) {
  const int spare = processors() - blocks(p);
  return spare < 0 ? 0 : spare;
}

cudaError_t scan_forward(const Problem& p, const ForwardScan& s, cudaStream_t stream) {
  return p.head_dim == 128 ? forward_of<128>(p, s, stream) : forward_of<64>(p, s, stream);
}

cudaError_t scan_reverse(const Problem& p, const ReverseScan& s, cudaStream_t stream) {
  return p.head_dim == 128 ? reverse_of<128>(p, s, stream) : reverse_of<64>(p, s, stream);
}

}  // namespace deltapipe::kernels::cuda::kda
