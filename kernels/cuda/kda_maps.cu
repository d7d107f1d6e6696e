// Maps (M, E) of segments, and their products. The scan of a map's pieces is in kda_scan.cu: the state's columns, with
// values as in the forward scan, end as E; columns that begin as the identity, without values, end as M. Pieces are
// runs of chunks whose maps are joined here, in fp32: the more heads, the fewer.
#include "kernels/cuda/kda_common.cuh"

#include <algorithm>

namespace deltapipe::kernels::cuda::kda {
namespace {

constexpr int join_columns = 32;  // a block's
template <int K>
constexpr int join_threads = 2 * K;  // a warp has 16 rows

template <int K>
struct JoinShared {
  // Rows are as far apart as lets the lanes of a left and a right operand fall into different banks.
  float m[K][K + 4];
  float x[K][join_columns + 8];
};

/// x = high + low, both fit for the tensor cores' tf32: what is lost is 2^-21 of x.
struct Halves {
  std::uint32_t high, low;
  __device__ __forceinline__ explicit Halves(float x) {
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(high) : "f"(x));
    low = __float_as_uint(x - __uint_as_float(high));
  }
};
/// sum [16, 8] += a [16, 8] b [8, 8] (mma.m16n8k8's lanes).
__device__ __forceinline__ void multiply_tf32(float (&sum)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2,
                                              std::uint32_t a3, std::uint32_t b0, std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/// A block owns 32 columns of a head's [M | E] and takes them through one piece after another; or 32 columns of its
/// state, and writes what comes into each piece; where maps are from the start, into one.
template <int K, bool states>
__global__ void __launch_bounds__(join_threads<K>)
    join_kernel(int heads, int pieces, const float* piece_m, const float* piece_e, const float* state_in, float* m,
                float* e, bool from_start) {
  extern __shared__ __align__(1024) std::uint8_t memory[];
  auto& s = *reinterpret_cast<JoinShared<K>*>(memory);
  constexpr int parts = K / join_columns, all = states ? parts : 2 * parts, tiles = join_columns / 8;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, column = lane % 4 * 2;
  const int head = blockIdx.x / all % heads, part = blockIdx.x % all;
  const int first_piece = from_start ? 1 + blockIdx.x / (all * heads) : 1, end = from_start ? first_piece + 1 : pieces;
  const bool is_m = !states && part < parts;
  const std::size_t at = static_cast<std::size_t>(head) * K * K, piece_size = static_cast<std::size_t>(heads) * K * K;
  const std::size_t own = at + part % parts * join_columns + column;
  // The lane's sums: two of row `row`, then of row + 8, of every eight columns.
  const auto place = [&](int n, int half) { return own + (row + 8 * half) * K + 8 * n; };
  float x[tiles][4];
  const auto load = [&](const float* from) {
#pragma unroll
    for (int n = 0; n < tiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 two = from != nullptr ? *reinterpret_cast<const float2*>(from + place(n, half)) : float2{};
        x[n][2 * half] = two.x, x[n][2 * half + 1] = two.y;
      }
    }
  };
  const auto store = [&](float* to) {
#pragma unroll
    for (int n = 0; n < tiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        *reinterpret_cast<float2*>(to + place(n, half)) = {x[n][2 * half], x[n][2 * half + 1]};
      }
    }
  };
  wait_for_previous_kernel();
  if constexpr (states) start_next_kernel();  // it waits for this one where it needs the states
  load(states ? state_in : is_m ? piece_m : piece_e);
  for (int i = first_piece; i < end; ++i) {
    const int piece = states ? i - 1 : i;
    __syncthreads();
    const float* from = piece_m + piece * piece_size + at;
#pragma unroll
    for (int k = threadIdx.x; k < K * K / 4; k += join_threads<K>) {
      copy_async_16(shared_address(&s.m[k / (K / 4)][k % (K / 4) * 4]), from + 4 * k, true);
    }
    copy_async_commit();
    if (states && (!from_start || piece == 0)) store(e + piece * piece_size);
#pragma unroll
    for (int n = 0; n < tiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        *reinterpret_cast<float2*>(&s.x[row + 8 * half][8 * n + column]) = {x[n][2 * half], x[n][2 * half + 1]};
      }
    }
    load(is_m ? nullptr : piece_e + piece * piece_size);
    copy_async_wait<0>();
    __syncthreads();
#pragma unroll 2
    for (int k = lane % 4; k < K; k += 8) {
      const Halves a0(s.m[row][k]), a1(s.m[row + 8][k]), a2(s.m[row][k + 4]), a3(s.m[row + 8][k + 4]);
#pragma unroll
      for (int n = 0; n < tiles; ++n) {
        const Halves b0(s.x[k][8 * n + lane / 4]), b1(s.x[k + 4][8 * n + lane / 4]);
        multiply_tf32(x[n], a0.low, a1.low, a2.low, a3.low, b0.high, b1.high);
        multiply_tf32(x[n], a0.high, a1.high, a2.high, a3.high, b0.low, b1.low);
        multiply_tf32(x[n], a0.high, a1.high, a2.high, a3.high, b0.high, b1.high);
      }
    }
  }
  store(states ? e + (end - 1) * piece_size : is_m ? m : e);
}

template <int K, bool states>
cudaError_t join_of(const Problem& p, const PieceMaps& maps, const float* state_in, float* m, float* e,
                    cudaStream_t stream) {
  const auto kernel = join_kernel<K, states>;
  const cudaError_t set = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                               static_cast<int>(sizeof(JoinShared<K>)));
  if (set != cudaSuccess) return set;
  // Two blocks on a multiprocessor; without this word the driver leaves room for one.
  const cudaError_t preferred =
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (preferred != cudaSuccess) return preferred;
  const int heads = p.segments * p.heads, parts = (states ? 1 : 2) * K / join_columns;
  cudaLaunchAttribute attribute = {};  // its start meets the end of the kernel before
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(heads * parts * (maps.from_start ? maps.pieces - 1 : 1)));
  config.blockDim = dim3(join_threads<K>);
  config.dynamicSmemBytes = sizeof(JoinShared<K>);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, heads, maps.pieces, static_cast<const float*>(maps.m),
                            static_cast<const float*>(maps.e), state_in, m, e, maps.from_start);
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
// multiprocessors with one block each. With many heads a whole segment is scanned beside its preparation, which takes
// longer, and only long segments are worth cutting; the forward scan after the map has pieces all the same.
PieceMaps map_pieces(const Problem& p) {
  const int blocks = 2 * p.segments * p.heads, fill = 132 / blocks;
  const bool from_start = blocks > 32 && p.chunks() < 64 * fill;
  const int least = blocks > 32 && !from_start ? 64 : 8;
  const int pieces = std::clamp(std::min(fill, p.chunks() / least), 1, 8);
  return {.pieces = pieces, .from_start = from_start && pieces > 1, .m = nullptr, .e = nullptr};
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
