// The scans over chunks. The V columns of a state are independent given a chunk's record, so a block of threads owns 64
// columns of one head and walks all its chunks: four warps hold the state, transposed, as accumulators of wgmma; every
// product's sums are, rounded, the left operand of the next, and right operands are the records' tiles as they arrive.
// Two producer warps keep the records coming by bulk copies.
//
// A chunk's time is that of its chain of three products, each of which waits for the one before. What is not on the
// chain (outputs; in reverse what d_o contributes) is queued behind the chain's products, in halves where that fits the
// waits: the tensor cores work on it while sums are rounded.
#include "kernels/cuda/kda_scan.cuh"

#include <type_traits>

namespace deltapipe::kernels::cuda::kda {
namespace {

enum class Mode { outputs, states };

/// Behind the warps that hold the state: producers of a record's two parts and of values, and who stores outputs.
enum Role { state_producer = group_warps, output_producer, value_producer, output_storer, warps };
constexpr int threads = warps * 32;

/// What a chunk's scan keeps for another kernel, on its way to global memory: 16 columns of the state, and of values.
template <int K>
struct Kept {
  std::uint8_t state[slice * K * 2], values[slice * chunk_tokens * 2];
};

template <int K, bool outputs, bool keeps>
struct Shared {
  static constexpr int readers = group_warps, state_stages = 3, output_stages = !outputs ? 1 : keeps ? 2 : 3;
  std::uint8_t state[state_stages][Record<K>::state_room];
  std::uint8_t output[output_stages][outputs ? Record<K>::output_bytes : 1024];
  std::uint8_t values[value_stages][panel_bytes];
  union {
    std::uint8_t o[panel_bytes];
    Kept<K> kept[keeps ? group_warps : 1];
  };
  std::uint64_t state_full[state_stages], state_empty[state_stages];
  std::uint64_t output_full[output_stages], output_empty[output_stages];
  std::uint64_t values_full[value_stages], values_empty[value_stages];
  std::uint64_t o_full, o_empty;
};
template <int K>
using Outputs = Shared<K, true, false>;
template <int K>
using States = Shared<K, false, true>;
template <int K>
using Reverse = Shared<K, true, true>;
static_assert(Record<128>::output_bytes % 1024 == 0 && sizeof(Outputs<128>) <= 232448 &&
              sizeof(Reverse<128>) <= 232448);

/// The output storer: chunks' [64 tokens, 64 columns] to o, from column `first`'s address on.
template <class S>
__device__ void store_outputs(S& s, std::uint16_t* o, std::size_t row, int length, int chunks, int lane) {
  const int piece = lane % 8;
  for (int c = 0; c < chunks; ++c) {
    barrier_wait(&s.o_full, c & 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 x[8];
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int r = half * 32 + n * 4 + lane / 8;
        x[n] = *reinterpret_cast<const uint4*>(s.o + r * 128 + ((piece ^ r) & 7) * 16);
      }
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int token = c * chunk_tokens + half * 32 + n * 4 + lane / 8;
        if (token < length) *reinterpret_cast<uint4*>(o + token * row + piece * 8) = x[n];
      }
    }
    release(&s.o_empty, lane);
  }
}

/// A warp's part of a state, or of values, to its tiles in global memory by way of `staged`; `first`: of its columns.
template <int n>
__device__ __forceinline__ void keep_tiles(std::uint16_t* to, std::uint8_t* staged, const std::uint32_t (&a)[n][4],
                                           int first, int lane) {
  put_tiles<n>(shared_address(staged), a, lane);
  fence_async();
  __syncwarp();
  if (lane == 0) {
    bulk_store(to + first * 16 * n, shared_address(staged), slice * 16 * n * 2);
    bulk_store_commit();
  }
}
/// Before a warp's next keep_tiles into the same memory.
__device__ __forceinline__ void wait_for_kept(int lane) {
  if (lane == 0) bulk_store_wait_read();
  __syncwarp();
}

template <int K, Mode mode>
__global__ void __launch_bounds__(threads, 1)
    forward_kernel(const __grid_constant__ Problem p, const __grid_constant__ ForwardScan io, int chunks) {
  extern __shared__ __align__(1024) std::uint8_t memory[];
  constexpr bool outputs = mode == Mode::outputs;
  using S = std::conditional_t<outputs, Outputs<K>, States<K>>;
  auto& s = *reinterpret_cast<S*>(memory);
  constexpr int operands = K / 16, panels = K / 64;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int head = blockIdx.x / panels, first = blockIdx.x % panels * group_columns + warp % group_warps * slice;
  init_barriers(s);

  const std::size_t row = static_cast<std::size_t>(p.heads) * K;
  const std::size_t tokens = (static_cast<std::size_t>(head / p.heads) * p.length * p.heads + head % p.heads) * K +
                             blockIdx.x % panels * group_columns;
  if (warp >= group_warps) {
    const int* ready = io.ready == nullptr ? nullptr : io.ready + static_cast<std::size_t>(head) * chunks;
    const std::uint8_t* records =
        static_cast<const std::uint8_t*>(io.records) + static_cast<std::size_t>(head) * chunks * Record<K>::bytes;
    if (warp == state_producer) {
      produce<S::state_stages, Record<K>::state_bytes>(s.state, s.state_full, s.state_empty, records, Record<K>::bytes,
                                                       chunks, ready, lane);
    } else if (warp == value_producer) {
      produce_values<1>(s.values, s.values_full, s.values_empty, p.v + tokens, row, p.length, 0, 1, chunks, lane);
    } else if constexpr (outputs) {
      if (warp == output_producer) {
        produce<S::output_stages, Record<K>::output_bytes>(s.output, s.output_full, s.output_empty,
                                                           records + Record<K>::state_bytes, Record<K>::bytes, chunks,
                                                           ready, lane);
      } else {
        store_outputs(s, io.o + tokens, row, p.length, chunks, lane);
      }
    }
    return;
  }

  float state[K / 8][4], sum[8][4], weighed_values[8][4], o[8][4] = {};
  std::uint32_t from[operands][4];
  if (io.state_in != nullptr) {
    load_state<K>(state, io.state_in + static_cast<std::size_t>(head) * K * K, K, first, lane);
  } else {
    clear(state);
  }
  as_operands<operands>(from, state);
  // beta v; beyond the last chunk of what is there: products stand outside of all branches, or the compiler would not
  // let them overlap
  const auto begin_chunk = [&](int c, const Ring<S::state_stages>& at, const Ring<value_stages>& values_at) {
    if (c < chunks) {
      barrier_wait(&s.values_full[values_at.stage], values_at.phase);
      barrier_wait(&s.state_full[at.stage], at.phase);
    }
    weigh_values(weighed_values, reinterpret_cast<const float*>(s.state[at.stage] + Record<K>::beta),
                 values_address(shared_address(s.values[values_at.stage]), warp, lane), lane);
  };
  // a chunk's outputs to who stores them
  const auto hand_over = [&](int c, const std::uint32_t(&a)[4][4]) {
    if (c > 0) barrier_wait(&s.o_empty, (c - 1) & 1);
    const std::uint32_t to = values_address(shared_address(s.o), warp, lane);
#pragma unroll
    for (int n = 0; n < 4; ++n) store_matrices_transposed(to + n * 2048, a[n]);
    release(&s.o_full, lane);
  };
  Ring<S::state_stages> at;
  Ring<S::output_stages> out_at;
  Ring<value_stages> values_at;
  begin_chunk(0, at, values_at);
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
      std::uint32_t packed[4][4];
      as_operands<4>(packed, o);
      if (c > 0) hand_over(c - 1, packed);
      barrier_wait(&s.output_full[out_at.stage], out_at.phase);
      begin_products();
      multiply_channels<K, 0, operands / 2>(o, from, output + Record<K>::qg, false);
      end_group();
    } else {
      wait_for_kept(lane);
      keep_tiles<operands>(io.states + slot * K * K, s.kept[warp].state, from, first, lane);
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
    release(&s.values_empty[values_at.stage], lane);
    values_at.next();
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
      keep_tiles<4>(io.v_new + slot * K * chunk_tokens, s.kept[warp].values, v_new, first, lane);
    }
    const int stage = at.stage;
    at.next();
    begin_chunk(c + 1, at, values_at);
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
  if constexpr (outputs) {
    std::uint32_t packed[4][4];
    as_operands<4>(packed, o);
    hand_over(chunks - 1, packed);
  } else {
    bulk_store_wait();
  }
  if (io.state_out != nullptr) {
    store_state<K>(state, io.state_out + static_cast<std::size_t>(head) * K * K, K, first, lane);
  }
  wait_for_previous_kernel();
}

template <int K>
__global__ void __launch_bounds__(threads, 1)
    reverse_kernel(const __grid_constant__ Problem p, const __grid_constant__ ReverseScan io, int chunks) {
  extern __shared__ __align__(1024) std::uint8_t memory[];
  using S = Reverse<K>;
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
    if (warp == state_producer) {
      produce<S::state_stages, Record<K>::state_bytes>(s.state, s.state_full, s.state_empty, last_record, back, chunks,
                                                       ready, lane);
    } else if (warp == output_producer) {
      produce<S::output_stages, Record<K>::output_bytes>(
          s.output, s.output_full, s.output_empty, last_record + Record<K>::state_bytes, back, chunks, ready, lane);
    } else if (warp == value_producer) {
      const std::uint16_t* d_o = io.d_o +
                                 (static_cast<std::size_t>(head / p.heads) * p.length * p.heads + head % p.heads) * K +
                                 blockIdx.x % panels * group_columns;
      produce_values<1>(s.values, s.values_full, s.values_empty, d_o, static_cast<std::size_t>(p.heads) * K, p.length,
                        chunks - 1, -1, chunks, lane);
    }
    return;
  }

  float state[K / 8][4], sum[8][4];
  std::uint32_t from[operands][4], of_outputs[4][4];
  if (io.dstate_out != nullptr) {
    load_state<K>(state, io.dstate_out + static_cast<std::size_t>(head) * K * K, K, first, lane);
  } else {
    clear(state);
  }
  as_operands<operands>(from, state);
  const auto begin_chunk = [&](int c, const Ring<value_stages>& values_at) {
    if (c < chunks) barrier_wait(&s.values_full[values_at.stage], values_at.phase);
    const std::uint32_t values = values_address(shared_address(s.values[values_at.stage]), warp, lane);
#pragma unroll
    for (int n = 0; n < 4; ++n) load_matrices_transposed(of_outputs[n], values + n * 2048);
  };
  Ring<S::state_stages> at;
  Ring<S::output_stages> out_at;
  Ring<value_stages> values_at;
  begin_chunk(0, values_at);
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
      wait_for_kept(lane);
      keep_tiles<operands>(io.dstates + slot * K * K, s.kept[warp].state, from, first, lane);
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
      std::uint32_t minus_y[4][4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) minus_y[n][e] = y[n][e] ^ 0x80008000u;
      }
      keep_tiles<4>(io.minus_y + slot * K * chunk_tokens, s.kept[warp].values, minus_y, first, lane);
    }
    wait_for_groups<panels>();
    release(&s.output_empty[out_at.stage], lane);
    release(&s.values_empty[values_at.stage], lane);
    out_at.next();
    values_at.next();
    begin_chunk(c + 1, values_at);
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
  bulk_store_wait();
  if (io.dstate_in != nullptr) {
    store_state<K>(state, io.dstate_in + static_cast<std::size_t>(head) * K * K, K, first, lane);
  }
  wait_for_previous_kernel();
}

int blocks(const Problem& p) { return p.segments * p.heads * p.head_dim / group_columns; }

template <int K>
cudaError_t forward_of(const Problem& p, const ForwardScan& s, cudaStream_t stream) {
  return s.states != nullptr ? launch(forward_kernel<K, Mode::states>, blocks(p), threads, sizeof(States<K>),
                                      s.ready != nullptr, stream, p, s)
                             : launch(forward_kernel<K, Mode::outputs>, blocks(p), threads, sizeof(Outputs<K>),
                                      s.ready != nullptr, stream, p, s);
}

template <int K>
cudaError_t reverse_of(const Problem& p, const ReverseScan& s, cudaStream_t stream) {
  return launch(reverse_kernel<K>, blocks(p), threads, sizeof(Reverse<K>), s.ready != nullptr, stream, p, s);
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
