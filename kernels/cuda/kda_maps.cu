// Maps (M, E) of segments, and their products.
//
// The scan of maps: the state's columns, with values as in the forward scan, end as E; columns that begin as the
// identity, without values, end as M. A block of threads owns all columns of one of the two, of one head and one piece
// of the segment, a group of four warps 64 of them, as in kda_scan.cu; the groups of a block fill each other's waits,
// and a record is read twice a piece, not once every 64 columns. Pieces are runs of chunks whose maps are joined in
// fp32: the more heads, the fewer.
#include "kernels/cuda/kda_scan.cuh"

namespace deltapipe::kernels::cuda::kda {
namespace {

template <int K>
struct Shared {
  static constexpr int warps = K / slice, stages = 3;
  std::uint8_t state[stages][Record<K>::state_room];
  std::uint8_t values[value_stages][K / 64 * panel_bytes];
  std::uint64_t full[stages], empty[stages];
  std::uint64_t values_full[value_stages], values_empty[value_stages];
};

struct MapScan {
  const void* records;
  float *m, *e;
  int pieces;
};

/// A warp's 16 columns over a piece's chunks: of M, or of E.
template <int K, bool is_m>
__device__ __forceinline__ void walk(Shared<K>& s, int chunks, int warp, int lane, float* out) {
  const int first = warp * slice;
  float state[K / 8][4], sum[8][4], weighed_values[8][4];
  clear(state);
  if constexpr (is_m) {
#pragma unroll
    for (int n = 0; n < K / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (8 * n + lane % 4 * 2 + (e & 1) == first + lane / 4 + (e & 2) * 4) state[n][e] = 1.0f;
      }
    }
  }
  constexpr int operands = K / 16, panels = K / 64;
  Ring<Shared<K>::stages> at;
  Ring<value_stages> values_at;
  for (int c = 0; c < chunks; ++c) {
    barrier_wait(&s.full[at.stage], at.phase);
    const std::uint8_t* record = s.state[at.stage];
    const std::uint32_t tile = shared_address(record);
    std::uint32_t from[operands][4];
    as_operands<operands>(from, state);
    scale_columns<K>(state, reinterpret_cast<const float*>(record + Record<K>::decay), lane);
    // rhs = beta v - (beta k exp(G)) S, transposed
    begin_products();
    multiply_channels<K, 0, operands>(sum, from, tile + Record<K>::nbg, false);
    end_group();
    if constexpr (!is_m) {
      barrier_wait(&s.values_full[values_at.stage], values_at.phase);
      weigh_values(weighed_values, reinterpret_cast<const float*>(record + Record<K>::beta),
                   values_address(shared_address(s.values[values_at.stage]) + warp / 4 * panel_bytes, warp % 4, lane),
                   lane);
    }
    wait_for_groups<0>();
    settle<8>(sum);
    // v_new = A rhs
    std::uint32_t rhs[4][4], v_new[4][4];
    if constexpr (is_m) {
      as_operands<4>(rhs, sum);
    } else {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) weighed_values[n][e] += sum[n][e];
      }
      as_operands<4>(rhs, weighed_values);
    }
    begin_products();
    multiply_square(sum, rhs, tile + Record<K>::a, false);
    end_group();
    wait_for_groups<0>();
    settle<8>(sum);
    if constexpr (!is_m) release(&s.values_empty[values_at.stage], lane);
    values_at.next();
    // S = exp(G_end) S + kg^T v_new
    as_operands<4>(v_new, sum);
    begin_products();
#pragma unroll
    for (int n = 0; n < panels; ++n) {
      multiply_tokens(state + 8 * n, v_new, tile + Record<K>::kg + n * Record<K>::panel, true);
    }
    end_group();
    wait_for_groups<0>();
    settle<K / 8>(state);
    release(&s.empty[at.stage], lane);
    at.next();
  }
  store_state<K>(state, out, K, first, lane);
}

/// The last four warps are there for two producers: registers go by groups of four.
template <int K>
constexpr int map_threads = 2 * K + 128;

template <int K>
__global__ void __launch_bounds__(map_threads<K>, 1)
    map_kernel(const __grid_constant__ Problem p, const __grid_constant__ MapScan io, int chunks) {
  extern __shared__ __align__(1024) std::uint8_t memory[];
  auto& s = *reinterpret_cast<Shared<K>*>(memory);
  constexpr int warps = Shared<K>::warps;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool is_m = blockIdx.x % 2 == 0;
  const int index = blockIdx.x / 2, heads = p.segments * p.heads, head = index % heads, piece = index / heads;
  const int begin = chunks * piece / io.pieces, count = chunks * (piece + 1) / io.pieces - begin;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shared<K>::stages; ++i) {
      barrier_init(&s.full[i], 1);
      barrier_init(&s.empty[i], warps);
    }
    for (int i = 0; i < value_stages; ++i) {
      barrier_init(&s.values_full[i], 32);
      barrier_init(&s.values_empty[i], warps);
    }
    barrier_fence_init();
  }
  __syncthreads();
  if (warp >= warps) {
    if constexpr (K == 128) set_registers<false, 40>();
    if (warp == warps + 1 && !is_m) {
      const std::size_t tokens = (static_cast<std::size_t>(head / p.heads) * p.length * p.heads + head % p.heads) *
                                 static_cast<std::size_t>(K);
      produce_values<K / 64>(s.values, s.values_full, s.values_empty, p.v + tokens,
                             static_cast<std::size_t>(p.heads) * K, p.length, begin, 1, count, lane);
    }
    if (warp > warps) return;
    const std::size_t slot = static_cast<std::size_t>(head) * chunks + begin;
    produce<Shared<K>::stages, Record<K>::state_bytes>(
        s.state, s.full, s.empty, static_cast<const std::uint8_t*>(io.records) + slot * Record<K>::bytes,
        Record<K>::bytes, count, nullptr, lane);
    return;
  }
  if constexpr (K == 128) set_registers<true, 232>();
  const std::size_t out = static_cast<std::size_t>(index) * K * K;
  if (is_m) {
    walk<K, true>(s, count, warp, lane, io.m + out);
  } else {
    walk<K, false>(s, count, warp, lane, io.e + out);
  }
}

constexpr int join_columns = 32, join_threads = 512;

template <int K>
struct JoinShared {
  float m[K][K];
  float x[K][join_columns];
};

/// A block owns 32 columns of a head's [M | E] and takes them through one piece after another.
template <int K>
__global__ void __launch_bounds__(join_threads)
    join_kernel(int heads, int pieces, const float* piece_m, const float* piece_e, float* m, float* e) {
  extern __shared__ __align__(1024) std::uint8_t memory[];
  auto& s = *reinterpret_cast<JoinShared<K>*>(memory);
  constexpr int parts = K / join_columns, rows = K * join_columns / join_threads;
  const int column = threadIdx.x % join_columns, first = threadIdx.x / join_columns * rows;
  const int head = blockIdx.x / (2 * parts), part = blockIdx.x % (2 * parts);
  const bool is_m = part < parts;
  const std::size_t at = static_cast<std::size_t>(head) * K * K, piece_size = static_cast<std::size_t>(heads) * K * K;
  const std::size_t own = at + part % parts * join_columns + column;
  const float* begin = is_m ? piece_m : piece_e;
  float x[rows];
#pragma unroll
  for (int r = 0; r < rows; ++r) x[r] = begin[own + (first + r) * K];
  for (int piece = 1; piece < pieces; ++piece) {
    __syncthreads();
    const auto* from = reinterpret_cast<const float4*>(piece_m + piece * piece_size + at);
    auto* to = reinterpret_cast<float4*>(s.m);
#pragma unroll
    for (int i = threadIdx.x; i < K * K / 4; i += join_threads) to[i] = from[i];
#pragma unroll
    for (int r = 0; r < rows; ++r) s.x[first + r][column] = x[r];
    __syncthreads();
#pragma unroll
    for (int r = 0; r < rows; ++r) x[r] = is_m ? 0.0f : piece_e[piece * piece_size + own + (first + r) * K];
    for (int k = 0; k < K; k += 4) {
      const float y0 = s.x[k][column], y1 = s.x[k + 1][column], y2 = s.x[k + 2][column], y3 = s.x[k + 3][column];
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        const float4 a = *reinterpret_cast<const float4*>(&s.m[first + r][k]);
        x[r] += a.x * y0 + a.y * y1 + a.z * y2 + a.w * y3;
      }
    }
  }
  float* out = is_m ? m : e;
#pragma unroll
  for (int r = 0; r < rows; ++r) out[own + (first + r) * K] = x[r];
}

template <int K>
cudaError_t scan_of(const Problem& p, const MapScan& s, cudaStream_t stream) {
  return launch(map_kernel<K>, 2 * p.segments * p.heads * s.pieces, map_threads<K>, sizeof(Shared<K>), false, stream, p,
                s);
}

template <int K>
cudaError_t join_of(const Problem& p, int pieces, const float* piece_m, const float* piece_e, float* m, float* e,
                    cudaStream_t stream) {
  const cudaError_t set = cudaFuncSetAttribute(join_kernel<K>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                               static_cast<int>(sizeof(JoinShared<K>)));
  if (set != cudaSuccess) return set;
  const int heads = p.segments * p.heads;
  join_kernel<K><<<static_cast<unsigned>(heads * 2 * K / join_columns), join_threads, sizeof(JoinShared<K>), stream>>>(
      heads, pieces, piece_m, piece_e, m, e);
  return cudaGetLastError();
}

constexpr int product_tile = 32;

/// A block of threads [8, 32] makes a [32, 32] tile; a thread four of its rows.
__global__ void multiply_add_kernel(int rows, int columns, const float* a, bool transpose, const float* b,
                                    const float* c, float* out) {
  __shared__ float left[product_tile][product_tile + 1], right[product_tile][product_tile + 1];
  const int x = threadIdx.x, y = threadIdx.y, column = blockIdx.x * product_tile + x, first = blockIdx.y * product_tile;
  a += static_cast<std::size_t>(blockIdx.z) * rows * rows;
  b += static_cast<std::size_t>(blockIdx.z) * rows * columns;
  const std::size_t at = static_cast<std::size_t>(blockIdx.z) * rows * columns;
  float sum[4] = {};
  for (int m = 0; m < rows; m += product_tile) {
    for (int i = y; i < product_tile; i += 8) {
      if (transpose) {
        left[x][i] = first + x < rows && m + i < rows ? a[(m + i) * rows + first + x] : 0.0f;
      } else {
        left[i][x] = first + i < rows && m + x < rows ? a[(first + i) * rows + m + x] : 0.0f;
      }
      right[i][x] = m + i < rows && column < columns ? b[(m + i) * columns + column] : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < product_tile; ++k) {
#pragma unroll
      for (int n = 0; n < 4; ++n) sum[n] += left[y + 8 * n][k] * right[k][x];
    }
    __syncthreads();
  }
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int row = first + y + 8 * n;
    if (row < rows && column < columns) {
      const std::size_t to = at + static_cast<std::size_t>(row) * columns + column;
      out[to] = sum[n] + (c != nullptr ? c[to] : 0.0f);
    }
  }
}

}  // namespace

// From the shapes alone, so that workspace and results do not depend on the device: as many as fill an H100's 132
// multiprocessors with one block each, of eight chunks at least.
int map_pieces(const Problem& p) {
  const int fill = 132 / (2 * p.segments * p.heads), most = p.chunks() / 8;
  const int pieces = fill < most ? fill : most;
  return pieces < 1 ? 1 : pieces > 8 ? 8 : pieces;
}

cudaError_t scan_maps(const Problem& p, const void* records, int pieces, float* piece_m, float* piece_e,
                      cudaStream_t stream) {
  const MapScan scan{records, piece_m, piece_e, pieces};
  return p.head_dim == 128 ? scan_of<128>(p, scan, stream) : scan_of<64>(p, scan, stream);
}

cudaError_t join_maps(const Problem& p, int pieces, const float* piece_m, const float* piece_e, float* m, float* e,
                      cudaStream_t stream) {
  return p.head_dim == 128 ? join_of<128>(p, pieces, piece_m, piece_e, m, e, stream)
                           : join_of<64>(p, pieces, piece_m, piece_e, m, e, stream);
}

cudaError_t multiply_add(int n, int rows, int columns, const float* a, bool transpose, const float* b, const float* c,
                         float* out, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((columns + product_tile - 1) / product_tile),
                  static_cast<unsigned>((rows + product_tile - 1) / product_tile), static_cast<unsigned>(n));
  multiply_add_kernel<<<grid, dim3(product_tile, 8), 0, stream>>>(rows, columns, a, transpose, b, c, out);
  return cudaGetLastError();
}

}  // namespace deltapipe::kernels::cuda::kda
