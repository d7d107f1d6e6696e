// The scans over chunks. The V columns of a state are independent given a chunk's record: four warps hold 64 columns of
// the state, transposed, as accumulators of wgmma; every product's sums are, rounded, the left operand of the next, and
// right operands are the records' tiles as they arrive. A block of threads owns a head, or half of one where heads are
// few, and walks the chunks of a segment or of a piece of one; where it has two such groups of warps they fill each
// other's waits. Further warps keep records and values coming and store outputs.
//
// A chunk's time is that of its chain of three products, each of which waits for the one before. What is not on the
// chain (outputs; in reverse what d_o contributes) is queued behind the chain's products, in halves where that fits the
// waits: the tensor cores work on it while sums are rounded. Few multiprocessors are busy with it, so that the others
// can prepare records (Pace).
#include "kernels/cuda/kda_scan.cuh"

namespace deltapipe::kernels::cuda::kda {
namespace {

/// Maps of pieces of segments, or of whole segments.
enum class Mode { outputs, states, piece_maps, maps };
template <Mode mode>
constexpr bool is_map = mode == Mode::piece_maps || mode == Mode::maps;
/// Blocks of a cluster: M's and E's of a piece, which read the same records.
template <Mode mode>
constexpr int cluster_of = mode == Mode::piece_maps ? 2 : 1;

/// Behind the warps that hold the state: producers of a record's two parts and of values, and who stores outputs.
enum Role { state_producer, output_producer, value_producer, output_storer, roles };
template <int groups>
constexpr int threads = (groups * group_warps + roles) * 32;

template <int K, int groups, bool with_outputs, int cluster>
struct Shared {
  static constexpr int blocks = cluster;
  static constexpr int readers = groups * group_warps;
  static constexpr int state_stages = 3, output_stages = !with_outputs ? 1 : groups == 1 ? 3 : 2;
  std::uint8_t state[state_stages][Record<K>::state_room];
  std::uint8_t output[output_stages][with_outputs ? Record<K>::output_bytes : 1024];
  std::uint8_t values[value_stages][groups * panel_bytes];
  std::uint8_t o[with_outputs ? groups : 1][panel_bytes];
  std::uint64_t state_full[state_stages], state_empty[state_stages];
  std::uint64_t output_full[output_stages], output_empty[output_stages];
  std::uint64_t values_full[value_stages], values_empty[value_stages];
  std::uint64_t o_full, o_empty, in_step[2];
};
static_assert(Record<128>::output_bytes % 1024 == 0 && sizeof(Shared<128, 1, true, 1>) <= 232448 &&
              sizeof(Shared<128, 2, true, 1>) <= 232448);

/// Which of a head's blocks a block is: of `groups` times 64 columns each.
template <int K, int groups>
struct Part {
  int head, column;
  __device__ __forceinline__ explicit Part(int index)
      : head(index / (K / 64 / groups)), column(index % (K / 64 / groups) * (groups * 64)) {}
};

/// Groups of four warps share the registers: where they are three, unevenly.
template <int groups, bool more>
__device__ __forceinline__ void share_registers() {
  if constexpr (groups == 2) set_registers<more, more ? 232 : 40>();
}

template <int K, int groups, Mode mode>
__global__ void __launch_bounds__(threads<groups>, 1)
    forward_kernel(const __grid_constant__ Problem p, const __grid_constant__ ForwardScan io,
                   const __grid_constant__ Tensors tensors, int all_chunks) {
  extern __shared__ __align__(1024) std::uint8_t memory[];
  constexpr bool outputs = mode == Mode::outputs, maps = is_map<mode>;
  using S = Shared<K, groups, outputs, cluster_of<mode>>;
  auto& s = *reinterpret_cast<S*>(memory);
  constexpr int operands = K / 16, panels = K / 64;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // Blocks of all heads, of all pieces; of maps, M's and E's by turns.
  const int heads = p.segments * p.heads, parts = heads * (panels / groups);
  const int index = maps ? blockIdx.x / 2 : blockIdx.x, piece = index / parts;
  const Part<K, groups> part(index % parts);
  const int head = part.head;
  const bool valueless = maps && blockIdx.x % 2 == 0;
  const int begin = all_chunks * piece / io.pieces, chunks = all_chunks * (piece + 1) / io.pieces - begin;
  const std::size_t first_slot = static_cast<std::size_t>(head) * all_chunks + begin;
  init_barriers(s);
  // The kernel before a scan of pieces makes their states alone, and starts this one after all before it has ended.
  const bool states_awaited = outputs && io.pieces > 1;
  if (io.ready == nullptr && !states_awaited) wait_for_previous_kernel();

  if (warp >= groups * group_warps) {
    share_registers<groups, false>();
    const int role = warp - groups * group_warps, segment = head / p.heads, of_segment = head % p.heads;
    const int* ready = io.ready == nullptr ? nullptr : io.ready + first_slot;
    const std::uint8_t* records = static_cast<const std::uint8_t*>(io.records) + first_slot * Record<K>::bytes;
    if (role == state_producer) {
      produce<S::blocks, S::state_stages, Record<K>::state_bytes>(s.state, s.state_full, s.state_empty, records,
                                                                  Record<K>::bytes, chunks, ready, lane, s.in_step);
    } else if (role == value_producer) {
      if (lane == 0 && !valueless) {
        produce_values<groups>(s.values, s.values_full, s.values_empty, tensors.values, part.column, of_segment,
                               segment, begin, 1, chunks);
      }
    } else if constexpr (outputs) {
      if (role == output_producer) {
        produce<1, S::output_stages, Record<K>::output_bytes>(s.output, s.output_full, s.output_empty,
                                                              records + Record<K>::state_bytes, Record<K>::bytes,
                                                              chunks, ready, lane);
      } else if (lane == 0) {
        for (int c = 0; c < chunks; ++c) {
          barrier_wait(&s.o_full, c & 1);
          fence_async();
#pragma unroll
          for (int n = 0; n < groups; ++n) {
            store_box(tensors.o, part.column + 64 * n, (begin + c) * chunk_tokens, of_segment, segment, s.o[n]);
          }
          store_commit();
          store_wait_read();
          barrier_arrive(&s.o_empty);
        }
        store_wait();
      }
    }
    return;
  }

  share_registers<groups, true>();
  const int group = warp / group_warps, first = part.column + warp * slice;
  float state[K / 8][4], sum[8][4], o[8][4] = {};
  std::uint32_t from[operands][4], values[4][4] = {};
  if (states_awaited) wait_for_previous_kernel();
  if (!maps && io.state_in != nullptr) {
    load_state<K>(state, io.state_in + (static_cast<std::size_t>(piece) * heads + head) * K * K, K, first, lane);
  } else {
    clear(state);
  }
  if (valueless) {
#pragma unroll
    for (int n = 0; n < K / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (8 * n + lane % 4 * 2 + (e & 1) == first + lane / 4 + (e & 2) * 4) state[n][e] = 1.0f;
      }
    }
  }
  as_operands<operands>(from, state);
  // Beyond the last chunk values are what is there: products stand outside of all branches, or the compiler would not
  // let them overlap.
  const auto begin_chunk = [&](int c, const Ring<S::state_stages>& at, const Ring<value_stages>& values_at) {
    if (c < chunks) {
      if (!valueless) barrier_wait(&s.values_full[values_at.stage], values_at.phase);
      barrier_wait(&s.state_full[at.stage], at.phase);
    }
    if (!valueless) {
      const std::uint32_t from_values =
          values_address(shared_address(s.values[values_at.stage]) + group * panel_bytes, warp % group_warps, lane);
#pragma unroll
      for (int n = 0; n < 4; ++n) load_matrices_transposed(values[n], from_values + n * 2048);
    }
  };
  // a chunk's outputs to who stores them
  const auto hand_over = [&](int c, const std::uint32_t(&a)[4][4]) {
    if (c > 0) barrier_wait(&s.o_empty, (c - 1) & 1);
    const std::uint32_t to = values_address(shared_address(s.o[group]), warp % group_warps, lane);
#pragma unroll
    for (int n = 0; n < 4; ++n) store_matrices_transposed(to + n * 2048, a[n]);
    release(&s.o_full, lane);
  };
  Ring<S::state_stages> at;
  Ring<S::output_stages> out_at;
  Ring<value_stages> values_at;
  [[maybe_unused]] int mark = 0, next_mark = io.marks > 1 ? all_chunks / io.marks : -1;
  begin_chunk(0, at, values_at);
  for (int c = 0; c < chunks; ++c) {
    const std::uint8_t* record = s.state[at.stage];
    const std::uint32_t tile = shared_address(record), output = shared_address(s.output[out_at.stage]);
    const std::size_t slot = first_slot + c;
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
    } else if constexpr (mode == Mode::states) {
      store_tiles<operands>(io.states + slot * K * K, from, first, lane);
    }
    wait_for_groups<outputs ? 1 : 0>();
    settle<8>(sum);
    // v_new = A rhs
    std::uint32_t rhs[4][4], v_new[4][4];
    add_values(sum, reinterpret_cast<const float*>(record + Record<K>::beta), values, lane);
    as_operands<4>(rhs, sum);
    begin_products();
    multiply_square(sum, rhs, tile + Record<K>::a, false);
    end_group();
    if constexpr (outputs) {
      multiply_channels<K, operands / 2, operands>(o, from, output + Record<K>::qg, true);
      end_group();
    }
    wait_for_groups<outputs ? 1 : 0>();
    settle<8>(sum);
    if (!valueless) release(&s.values_empty[values_at.stage], lane);
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
    } else if constexpr (mode == Mode::states) {
      store_tiles<4>(io.v_new + slot * K * chunk_tokens, v_new, first, lane);
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
    if constexpr (mode == Mode::maps) {
      if (c + 1 == next_mark) {
        store_state<K>(state,
                       (valueless ? io.mark_m : io.mark_e) + (static_cast<std::size_t>(mark) * heads + head) * K * K, K,
                       first, lane);
        next_mark = ++mark + 1 < io.marks ? all_chunks * (mark + 1) / io.marks : -1;
      }
    }
  }
  if constexpr (outputs) {
    std::uint32_t packed[4][4];
    as_operands<4>(packed, o);
    hand_over(chunks - 1, packed);
  }
  if constexpr (maps) {
    store_state<K>(state, (valueless ? io.m : io.state_out) + static_cast<std::size_t>(index) * K * K, K, first, lane);
  } else if (io.state_out != nullptr && piece == io.pieces - 1) {
    store_state<K>(state, io.state_out + static_cast<std::size_t>(head) * K * K, K, first, lane);
  }
  wait_for_previous_kernel();
  if constexpr (S::blocks > 1) cluster_sync();  // the other block may still arrive at this one's barriers
}

template <int K, int groups>
__global__ void __launch_bounds__(threads<groups>, 1)
    reverse_kernel(const __grid_constant__ Problem p, const __grid_constant__ ReverseScan io,
                   const __grid_constant__ Tensors tensors, int chunks) {
  extern __shared__ __align__(1024) std::uint8_t memory[];
  using S = Shared<K, groups, true, 1>;
  auto& s = *reinterpret_cast<S*>(memory);
  constexpr int operands = K / 16, panels = K / 64;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Part<K, groups> part(blockIdx.x);
  const int head = part.head;
  init_barriers(s);

  if (warp >= groups * group_warps) {
    share_registers<groups, false>();
    const int role = warp - groups * group_warps;
    constexpr std::ptrdiff_t back = -static_cast<std::ptrdiff_t>(Record<K>::bytes);
    const int* ready = io.ready == nullptr ? nullptr : io.ready + static_cast<std::size_t>(head) * chunks + chunks - 1;
    const std::uint8_t* last_record = static_cast<const std::uint8_t*>(io.records) +
                                      (static_cast<std::size_t>(head) * chunks + chunks - 1) * Record<K>::bytes;
    if (role == state_producer) {
      produce<1, S::state_stages, Record<K>::state_bytes>(s.state, s.state_full, s.state_empty, last_record, back,
                                                          chunks, ready, lane);
    } else if (role == output_producer) {
      produce<1, S::output_stages, Record<K>::output_bytes>(
          s.output, s.output_full, s.output_empty, last_record + Record<K>::state_bytes, back, chunks, ready, lane);
    } else if (role == value_producer && lane == 0) {
      produce_values<groups>(s.values, s.values_full, s.values_empty, tensors.values, part.column, head % p.heads,
                             head / p.heads, chunks - 1, -1, chunks);
    }
    return;
  }

  share_registers<groups, true>();
  const int group = warp / group_warps, first = part.column + warp * slice;
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
    const std::uint32_t values =
        values_address(shared_address(s.values[values_at.stage]) + group * panel_bytes, warp % group_warps, lane);
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
      store_tiles<operands>(io.dstates + slot * K * K, from, first, lane);
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
      store_tiles<4>(io.minus_y + slot * K * chunk_tokens, minus_y, first, lane);
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
  if (io.dstate_in != nullptr) {
    store_state<K>(state, io.dstate_in + static_cast<std::size_t>(head) * K * K, K, first, lane);
  }
  wait_for_previous_kernel();
}

/// Few heads leave multiprocessors idle and wait for each chunk in turn: then a block takes half of a head's columns.
int groups_of(const Problem& p) {
  const int panels = p.head_dim / 64;
  return p.segments * p.heads * panels <= processors() ? 1 : panels;
}
int blocks(const Problem& p, int groups) { return p.segments * p.heads * p.head_dim / 64 / groups; }

/// f<K, groups>().
template <class F>
cudaError_t by_shape(const Problem& p, int groups, const F& f) {
  if (p.head_dim == 64) return f.template operator()<64, 1>();
  return groups == 1 ? f.template operator()<128, 1>() : f.template operator()<128, 2>();
}

template <Mode mode>
cudaError_t forward_of(const Problem& p, const ForwardScan& s, int groups, cudaStream_t stream) {
  Tensors tensors = {};
  cudaError_t error = box_map(&tensors.values, p, p.v);
  if (error == cudaSuccess && mode == Mode::outputs) error = box_map(&tensors.o, p, s.o);
  if (error != cudaSuccess) return error;
  return by_shape(p, groups, [&]<int K, int n>() {
    constexpr int cluster = cluster_of<mode>;
    return launch(forward_kernel<K, n, mode>, (is_map<mode> ? 2 : 1) * s.pieces * blocks(p, n), cluster, threads<n>,
                  sizeof(Shared<K, n, mode == Mode::outputs, cluster>), stream, p, s, tensors);
  });
}

}  // namespace

int spare_processors(const Problem& p, bool maps) {
  const int taken = maps ? 2 * blocks(p, p.head_dim / 64) : blocks(p, groups_of(p)), spare = processors() - taken;
  return spare < 0 ? 0 : spare;
}

// Pieces fill the device, and then its memory is what limits: whole heads a block read every record once.
cudaError_t scan_forward(const Problem& p, const ForwardScan& s, cudaStream_t stream) {
  const int groups = s.pieces > 1 ? p.head_dim / 64 : groups_of(p);
  return s.states != nullptr ? forward_of<Mode::states>(p, s, groups, stream)
                             : forward_of<Mode::outputs>(p, s, groups, stream);
}

cudaError_t scan_maps(const Problem& p, const void* records, const int* ready, const PieceMaps& maps, float* m,
                      float* e, cudaStream_t stream) {
  const int groups = p.head_dim / 64;
  if (!maps.whole()) {
    const ForwardScan s{.records = records, .state_out = maps.e, .ready = ready, .pieces = maps.pieces, .m = maps.m};
    return forward_of<Mode::piece_maps>(p, s, groups, stream);
  }
  const ForwardScan s{.records = records,
                      .state_out = e,
                      .ready = ready,
                      .m = m,
                      .marks = maps.pieces,
                      .mark_m = maps.m,
                      .mark_e = maps.e};
  return forward_of<Mode::maps>(p, s, groups, stream);
}

cudaError_t scan_reverse(const Problem& p, const ReverseScan& s, cudaStream_t stream) {
  Tensors tensors = {};
  const cudaError_t error = box_map(&tensors.values, p, s.d_o);
  if (error != cudaSuccess) return error;
  return by_shape(p, groups_of(p), [&]<int K, int n>() {
    return launch(reverse_kernel<K, n>, blocks(p, n), 1, threads<n>, sizeof(Shared<K, n, true, 1>), stream, p, s,
                  tensors);
  });
}

}  // namespace deltapipe::kernels::cuda::kda
