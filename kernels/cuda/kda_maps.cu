// Maps (M, E) of segments, and their products. The scan of a map's pieces is in kda_scan.cu: the state's columns, with
// values as in the forward scan, end as E; columns that begin as the identity, without values, end as M. Pieces are
// runs of chunks whose maps are joined here, in fp32: the more heads, the fewer.
#include "kernels/cuda/kda_common.cuh"

namespace deltapipe::kernels::cuda::kda {
namespace {

constexpr int join_columns = 32, join_threads = 512;

template <int K>
struct JoinShared {
  float m[K][K];
  float x[K][join_columns];
};

/// A block owns 32 columns of a head's [M | E] and takes them through one piece after another; or 32 columns of its
/// state, and writes what comes into each piece.
template <int K, bool states>
__global__ void __launch_bounds__(join_threads)
    join_kernel(int heads, int pieces, const float* piece_m, const float* piece_e, const float* state_in, float* m,
                float* e) {
  extern __shared__ __align__(1024) std::uint8_t memory[];
  auto& s = *reinterpret_cast<JoinShared<K>*>(memory);
  constexpr int parts = K / join_columns, rows = K * join_columns / join_threads, all = states ? parts : 2 * parts;
  const int column = threadIdx.x % join_columns, first = threadIdx.x / join_columns * rows;
  const int head = blockIdx.x / all, part = blockIdx.x % all;
  const bool is_m = !states && part < parts;
  const std::size_t at = static_cast<std::size_t>(head) * K * K, piece_size = static_cast<std::size_t>(heads) * K * K;
  const std::size_t own = at + part % parts * join_columns + column;
  const float* begin = states ? state_in : is_m ? piece_m : piece_e;
  wait_for_previous_kernel();
  float x[rows];
#pragma unroll
  for (int r = 0; r < rows; ++r) x[r] = begin != nullptr ? begin[own + (first + r) * K] : 0.0f;
  for (int i = 1; i < pieces; ++i) {
    const int piece = states ? i - 1 : i;
    if constexpr (states) {
#pragma unroll
      for (int r = 0; r < rows; ++r) e[piece * piece_size + own + (first + r) * K] = x[r];
    }
    __syncthreads();
    const auto* from = reinterpret_cast<const float4*>(piece_m + piece * piece_size + at);
    auto* to = reinterpret_cast<float4*>(s.m);
#pragma unroll
    for (int k = threadIdx.x; k < K * K / 4; k += join_threads) to[k] = from[k];
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
  float* out = states ? e + (pieces - 1) * piece_size : is_m ? m : e;
#pragma unroll
  for (int r = 0; r < rows; ++r) out[own + (first + r) * K] = x[r];
}

template <int K, bool states>
cudaError_t join_of(const Problem& p, const PieceMaps& maps, const float* state_in, float* m, float* e,
                    cudaStream_t stream) {
  const auto kernel = join_kernel<K, states>;
  const cudaError_t set = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                               static_cast<int>(sizeof(JoinShared<K>)));
  if (set != cudaSuccess) return set;
  const int heads = p.segments * p.heads, parts = (states ? 1 : 2) * K / join_columns;
  cudaLaunchAttribute attribute = {};  // its start meets the end of the kernel before
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(heads * parts));
  config.blockDim = dim3(join_threads);
  config.dynamicSmemBytes = sizeof(JoinShared<K>);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, heads, maps.pieces, static_cast<const float*>(maps.m),
                            static_cast<const float*>(maps.e), state_in, m, e);
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

cudaError_t join_maps(const Problem& p, const PieceMaps& maps, float* m, float* e, cudaStream_t stream) {
  return p.head_dim == 128 ? join_of<128, false>(p, maps, nullptr, m, e, stream)
                           : join_of<64, false>(p, maps, nullptr, m, e, stream);
}

cudaError_t piece_states(const Problem& p, const PieceMaps& maps, const float* state_in, float* states,
                         cudaStream_t stream) {
  return p.head_dim == 128 ? join_of<128, true>(p, maps, state_in, nullptr, states, stream)
                           : join_of<64, true>(p, maps, state_in, nullptr, states, stream);
}

cudaError_t multiply_add(int n, int rows, int columns, const float* a, bool transpose, const float* b, const float* c,
                         float* out, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((columns + product_tile - 1) / product_tile),
                  static_cast<unsigned>((rows + product_tile - 1) / product_tile), static_cast<unsigned>(n));
  multiply_add_kernel<<<grid, dim3(product_tile, 8), 0, stream>>>(rows, columns, a, transpose, b, c, out);
  return cudaGetLastError();
}

}  // namespace deltapipe::kernels::cuda::kda
