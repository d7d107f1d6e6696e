// What the scans share: the rings their records come through, their products, and where a state's columns lie.
#pragma once

#include "kernels/cuda/kda_wgmma.cuh"

namespace deltapipe::kernels::cuda::kda {
namespace {

constexpr int slice = 16;  // columns a warp
constexpr int group_warps = 4;
constexpr int panel_bytes = chunk_tokens * 128;  // 64 tokens of 64 columns, swizzled
constexpr int value_stages = 2;                  // buffers of a chunk's v or d_o

/// A scan's tensors by boxes: v or d_o, and o if it is written.
struct Tensors {
  CUtensorMap values, o;
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
      barrier_init(&s.state_empty[i], Shared::readers);
    }
    for (int i = 0; i < Shared::output_stages; ++i) {
      barrier_init(&s.output_full[i], 1);
      barrier_init(&s.output_empty[i], Shared::readers);
    }
    for (int i = 0; i < value_stages; ++i) {
      barrier_init(&s.values_full[i], 1);
      barrier_init(&s.values_empty[i], Shared::readers);
    }
    for (std::uint64_t& barrier : s.in_step) barrier_init(&barrier, 1);
    barrier_init(&s.o_full, Shared::readers);
    barrier_init(&s.o_empty, 1);
    barrier_fence_init();
  }
  if constexpr (Shared::blocks > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
}

/// A warp: waits until the record of chunk c is ready; how many are, from there on. ready: of the first chunk.
__device__ __forceinline__ int wait_until_ready(const int* ready, int step, int c, int chunks, int lane) {
  for (;;) {
    const int i = c + lane;
    const unsigned set = __ballot_sync(0xffffffffu, i >= chunks || flag_is_set(ready + i * step));
    if ((set & 1u) != 0) {
      __syncwarp();
      asm volatile("fence.proxy.async;" ::: "memory");  // what others wrote, before copies of it
      return c + (set == 0xffffffffu ? 32 : __ffs(static_cast<int>(~set)) - 1);
    }
    __nanosleep(100);
  }
}

/// A warp: copies part of every record of a head into a ring, chunk by chunk, `step` bytes further each time; waits for
/// records if ready is not null. Two blocks of a cluster, which read the same records, do so in step by their barriers
/// in_step: the second finds them in the second-level cache.
template <int blocks, int stages, int bytes, int room>
__device__ void produce(std::uint8_t (*ring)[room], std::uint64_t* full, std::uint64_t* empty,
                        const std::uint8_t* record, std::ptrdiff_t step, int chunks, const int* ready, int lane,
                        std::uint64_t* in_step = nullptr) {
  const int other = blocks > 1 ? cluster_rank() ^ 1 : 0;
  Ring<stages> at;
  int known = 0;
  for (int c = 0; c < chunks; ++c) {
    if (ready != nullptr && c >= known) known = wait_until_ready(ready, step < 0 ? -1 : 1, c, chunks, lane);
    if (lane == 0) {
      if (c >= stages) barrier_wait(&empty[at.stage], at.phase ^ 1);
      if constexpr (blocks > 1) {
        barrier_arrive_at(in_step + c % 2, other);  // two by turns: the other may be a chunk ahead
        barrier_wait(in_step + c % 2, c / 2 & 1);
      }
      barrier_expect(&full[at.stage], bytes);
      bulk_copy(ring[at.stage], record + c * step, bytes, &full[at.stage]);
    }
    __syncwarp();
    at.next();
  }
}

/// A warp is done with a stage of a ring: after the end of the products that read it, and of those that read what was
/// made of all that it loaded there.
__device__ __forceinline__ void release(std::uint64_t* empty, int lane) {
  __syncwarp();
  if (lane == 0) barrier_arrive(empty);
}
/// A thread: `panels` times 64 columns of v or d_o, from `column` on, into a ring of swizzled panels, zeros beyond the
/// segment's end. Chunks are first, first + step, ...
template <int panels>
__device__ void produce_values(std::uint8_t (*ring)[panels * panel_bytes], std::uint64_t* full, std::uint64_t* empty,
                               const CUtensorMap& from, int column, int head, int segment, int first, int step,
                               int chunks) {
  Ring<value_stages> at;
  for (int c = 0; c < chunks; ++c) {
    if (c >= value_stages) barrier_wait(&empty[at.stage], at.phase ^ 1);
    barrier_expect(&full[at.stage], panels * panel_bytes);
#pragma unroll
    for (int n = 0; n < panels; ++n) {
      load_box(ring[at.stage] + n * panel_bytes, from, column + 64 * n, (first + c * step) * chunk_tokens, head,
               segment, &full[at.stage]);
    }
    at.next();
  }
}
/// The lane's ldmatrix address, transposed, of a warp's 16 columns of 16 tokens: (tokens 0-7, columns 0-7), (0-7,
/// 8-15), (8-15, 0-7), (8-15, 8-15). warp: of a panel's four. The next 16 tokens are 2,048 bytes on.
__device__ __forceinline__ std::uint32_t values_address(std::uint32_t panel, int warp, int lane) {
  const int token = (lane & 7) + (lane >> 4) * 8, piece = 2 * warp + ((lane >> 3) & 1);
  return panel + token * 128 + ((piece ^ (lane & 7)) << 4);
}

// Products with tiles of a record in shared memory, at `tile`. Sums and left operands are transposed: rows are columns
// of the state, 64 a group of warps.

/// sum [64, 64 tokens] += a [64, K] tile[token, channel]^T, for operands [from, to) of 16 channels each.
template <int K, int from, int to>
__device__ __forceinline__ void multiply_channels(float (&sum)[8][4], const std::uint32_t (&a)[K / 16][4],
                                                  std::uint32_t tile, bool accumulate) {
  const std::uint64_t b = operand_at(tile);
#pragma unroll
  for (int n = from; n < to; ++n) {
    multiply<64, false>(sum, a[n], b + (n / 4 * Record<K>::panel + n % 4 * 32) / 16, accumulate || n > from);
  }
}
/// sum [64, 64] += a [64, 64] square^T.
__device__ __forceinline__ void multiply_square(float (&sum)[8][4], const std::uint32_t (&a)[4][4],
                                                std::uint32_t square, bool accumulate) {
  const std::uint64_t b = operand_at(square);
#pragma unroll
  for (int n = 0; n < 4; ++n) multiply<64, false>(sum, a[n], b + n * 2, accumulate || n > 0);
}
/// sum [64, 64] += a [64, 64 tokens] panel[token, column]: 64 columns of a tile or all of a square.
__device__ __forceinline__ void multiply_tokens(float (*sum)[4], const std::uint32_t (&a)[4][4], std::uint32_t panel,
                                                bool accumulate) {
  const std::uint64_t b = operand_at(panel);
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    multiply<64, true>(sum, a[n], b + n * (block_tokens * 128 / 16), accumulate || n > 0);
  }
}
/// The sums of 16 n columns as n left operands.
template <int n>
__device__ __forceinline__ void as_operands(std::uint32_t (&a)[n][4], const float (&sum)[2 * n][4]) {
#pragma unroll
  for (int i = 0; i < n; ++i) as_operand(a[i], sum[2 * i], sum[2 * i + 1]);
}

template <int groups>
__device__ __forceinline__ void clear(float (&x)[groups][4]) {
#pragma unroll
  for (int n = 0; n < groups; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) x[n][e] = 0.0f;
  }
}

/// sum += beta v, transposed; values as values_address has them.
__device__ __forceinline__ void add_values(float (&sum)[8][4], const float* beta, const std::uint32_t (&values)[4][4],
                                           int lane) {
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 b = *reinterpret_cast<const float2*>(beta + 16 * n + 8 * h + lane % 4 * 2);
      float(&to)[4] = sum[2 * n + h];
      to[0] += b.x * low(values[n][2 * h]);
      to[1] += b.y * high(values[n][2 * h]);
      to[2] += b.x * low(values[n][2 * h + 1]);
      to[3] += b.y * high(values[n][2 * h + 1]);
    }
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

/// A warp's [16, 16 n] matrix, as n left operands, to rows [first, first + 16) of 8x8 tiles, 2 n to a row.
template <int n>
__device__ __forceinline__ void store_tiles(std::uint16_t* to, const std::uint32_t (&a)[n][4], int first, int lane) {
  auto* words = reinterpret_cast<std::uint32_t*>(to) + first / 8 * (2 * n * 32) + lane;
#pragma unroll
  for (int m = 0; m < n; ++m) {
    words[(2 * m) * 32] = a[m][0];
    words[(2 * m + 2 * n) * 32] = a[m][1];
    words[(2 * m + 1) * 32] = a[m][2];
    words[(2 * m + 1 + 2 * n) * 32] = a[m][3];
  }
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

/// cluster: blocks of a cluster. The kernel may start while the one before it in the stream still runs, and waits for
/// its end, or for its flags.
template <class Kernel, class Io>
cudaError_t launch(Kernel kernel, int blocks, int cluster, int threads, std::size_t shared, cudaStream_t stream,
                   const Problem& p, const Io& io, const Tensors& tensors) {
  const cudaError_t set =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (set != cudaSuccess) return set;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, p, io, tensors, p.chunks());
}

}  // namespace
}  // namespace deltapipe::kernels::cuda::kda
