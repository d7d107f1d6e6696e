// Every gradient of a chunk, after both scans. A block of threads takes one chunk and head after another; what the next
// one reads is on its way while this one's last products are made.
//
// Rows of by_q, by_b and by_k, the gradients of (scale q), (beta k) and (k) through the decays, are built in tensor
// core accumulators that always hold values relative to one anchor token and are rescaled channel by channel when the
// anchor moves: by_q and by_b walk from the chunk's start through the blocks up to their own, by_k from the chunk's end
// down.
#include "kernels/cuda/kda_gradients_rows.cuh"

namespace deltapipe::kernels::cuda::kda {
namespace {

/// What the next chunk's products with the states will read, into the second-level cache.
template <int K>
__device__ __forceinline__ void prefetch_late(const Problem& p, const ChunkGradients& io, const Place& to,
                                              std::size_t slot, int thread) {
  if (thread == 0) {
    prefetch(io.dstates + slot * K * K, K * K * 2);
    prefetch(io.v_new + slot * K * chunk_tokens, K * chunk_tokens * 2);
    prefetch(io.minus_y + slot * K * chunk_tokens, K * chunk_tokens * 2);
  }
  if (thread < to.tokens) {
    const std::size_t from = (to.first + static_cast<std::size_t>(thread) * p.heads) * K;
    prefetch(io.d_o + from, 2 * K);
    prefetch(p.v + from, 2 * K);
  }
}

/// What the next chunk begins with: its state, and q, k and f as tiles of its side.
template <int K>
__device__ __forceinline__ void fetch_early(const Problem& p, const ChunkGradients& io, const Place& at,
                                            std::size_t slot, Shared<K>& s, int side, int thread, Ahead& ahead) {
  if (thread == 0) {
    fence_async();
    barrier_expect(&s.state_full, K * K * 2);
    bulk_copy(s.state(), io.states + slot * K * K, K * K * 2, &s.state_full);
  }
  fetch_tile<K, 4 * K>(s.qp(side), p.q, p, at, thread);
  fetch_tile<K, 4 * K>(s.bp(side), p.k, p, at, thread);
  fetch_tile<K, 4 * K>(s.kt(side), p.f, p, at, thread);
  copy_async_commit();
  load_ahead<K>(p, at, thread, ahead);
}

/// The rest, once the chunk before is done.
template <int K>
__device__ __forceinline__ void fetch_late(const Problem& p, const ChunkGradients& io, const Place& at,
                                           std::size_t slot, Shared<K>& s, int side, int thread) {
  if (thread == 0) {
    constexpr int values = K * chunk_tokens * 2, matrix = K * K * 2;
    fence_async();
    barrier_expect(&s.values_full, 2 * values);
    bulk_copy(s.v_new(side), io.v_new + slot * K * chunk_tokens, values, &s.values_full);
    bulk_copy(s.minus_y, io.minus_y + slot * K * chunk_tokens, values, &s.values_full);
    barrier_expect(&s.dstate_full, matrix);
    bulk_copy(s.dstate(side), io.dstates + slot * K * K, matrix, &s.dstate_full);
  }
  fetch_tile<K, 4 * K>(s.d_o, io.d_o, p, at, thread);
  copy_async_commit();
}

template <int K>
__global__ void __launch_bounds__(4 * K, 1)
    gradients_kernel(const __grid_constant__ Problem p, const __grid_constant__ ChunkGradients io, int chunks,
                     int count) {
  extern __shared__ __align__(1024) std::uint8_t memory[];
  auto& s = *reinterpret_cast<Shared<K>*>(memory);
  Tokens& t = s.tokens;
  if (threadIdx.x == 0) {
    barrier_init(&s.values_full, 1);
    barrier_init(&s.state_full, 1);
    barrier_init(&s.dstate_full, 1);
    barrier_fence_init();
  }
  __syncthreads();
  int index = blockIdx.x;
  Ahead ahead;
  {
    const Place at(p, index);
    fetch_early<K>(p, io, at, at.slot(p, chunks), s, 0, threadIdx.x, ahead);
  }
  for (int side = 0;; side ^= 1) {  // also the parity of the barriers
    const int thread = anew(threadIdx.x);
    const Place at(p, index);
    const std::size_t slot = at.slot(p, chunks);
    store_tokens(t, at, thread, ahead);
    copy_async_wait<0>();
    __syncthreads();
    fetch_late<K>(p, io, at, slot, s, side, thread);
    {
      const Eighth<K> own(thread);
      float c[8][2];
      sum_gates<K>(p, at, s, own, ahead, s.kt(side), c);
      find_norms<K, Shared<K>::warps>(t, s.qp(side), s.bp(side), p.scale, thread / 32, thread % 32);
      copy_async_wait<0>();
      __syncthreads();
      if (t.starts(own.block) <= 1u) {
        build_operands<K, true>(s, own, side, c);
      } else {
        build_operands<K, false>(s, own, side, c);
      }
    }
    barrier_wait(&s.values_full, side);
    build_products<K>(s, side, thread / 32, thread % 32);

    Rows r;
    barrier_wait(&s.state_full, side);
    barrier_wait(&s.dstate_full, side);
    multiply_states<K>(s, side, Part(anew(threadIdx.x)), r);
    fence_async();  // the next copies overwrite what was read
    __syncthreads();

    const int next = index + static_cast<int>(gridDim.x);
    if (next < count) {
      const Place to(p, next);
      const std::size_t there = to.slot(p, chunks);
      fetch_early<K>(p, io, to, there, s, 1 - side, thread, ahead);
      prefetch_late<K>(p, io, to, there, thread);
    }
    std::uint32_t q[4][2], k[4][2];
    {
      const Part own(anew(threadIdx.x));
      const bool exact = t.exact[own.block] != 0;
      walk_blocks<K>(s, side, own, exact, r);
      move_to_tokens<K>(s, side, own, exact, r);
      if (exact) {
        Rows pairs = r;  // through memory, so that on other paths everything stays in registers
        add_exact_pairs<K>(p, at, s, own.block, own.channel, pairs);
        r = pairs;
      }
      load_rows<K>(q, p.q, p, at, own);
      load_rows<K>(k, p.k, p, at, own);
    }
    __syncthreads();  // nobody reads the operands, c, da or dm any more
    const Part part(anew(threadIdx.x));
    finish_rows<K>(s, part, q, k, r);
    std::uint32_t v[4][2];
    load_rows<K>(v, p.v, p, at, part);
    __syncthreads();
    const Eighth<K> own(anew(threadIdx.x));
    sum_dg<K>(s, own);
    project_rows<K>(s, side, part, q, k, r);
    value_gradients<K>(s, part, v);
    std::uint32_t f[8];
    load_eighth<K>(f, p.f, p, at, own);
    const float log_rate = p.a_log[at.head];
    const float2 bias = reinterpret_cast<const float2*>(p.dt_bias)[at.head * (K / 2) + own.pair];
    __syncthreads();
#pragma unroll
    for (int task = thread; task < chunk_tokens * K / 8; task += 4 * K) {
      const int r = task / (K / 8), piece = task % (K / 8), from = piece_offset<K>(r, piece);
      if (r >= at.tokens) continue;
      const std::size_t to = (at.first + static_cast<std::size_t>(r) * p.heads) * K + piece * 8;
      *reinterpret_cast<uint4*>(io.out.dq + to) = *reinterpret_cast<const uint4*>(s.qp(side) + from);
      *reinterpret_cast<uint4*>(io.out.dk + to) = *reinterpret_cast<const uint4*>(s.bp(side) + from);
      *reinterpret_cast<uint4*>(io.out.dv + to) = *reinterpret_cast<const uint4*>(s.d_o + from);
    }
    if (thread < at.tokens) {
      float dbeta = 0.0f;
#pragma unroll
      for (int m = 0; m < Shared<K>::parts; ++m) dbeta += s.row_sums[m][thread][0] + s.y_dot_v[m][thread];
      const float beta = t.beta[thread];
      reinterpret_cast<__nv_bfloat16*>(io.out.db)[at.first + static_cast<std::size_t>(thread) * p.heads] =
          __float2bfloat16(dbeta * beta * (1.0f - beta));
    }
    gate_gradients<K>(p, at, s, own, expf(log_rate), bias, io.out.df, f, part.warp, part.lane);
    __syncthreads();
    float* to = io.sums + slot * (K + 1);
    if (thread < K) {
      float sum = 0.0f;
#pragma unroll
      for (int e = 0; e < 8; ++e) sum += s.c[8 * e * Shared<K>::row + thread];
      to[thread] = sum;
    } else if (thread == K) {
      float all = 0.0f;
#pragma unroll
      for (int n = 0; n < Shared<K>::warps; ++n) all += s.da_log[n];
      to[K] = all;
    }
    if (next >= count) break;
    index = next;
  }
}

constexpr int sum_groups = 6;

/// One block a head: adds the chunks' sums in one order.
__global__ void reduce_kernel(int segments, int heads, int chunks, int k, const float* sums, float* da_log,
                              float* ddt_bias) {
  __shared__ float parts[sum_groups][160];
  const int head = blockIdx.x, x = threadIdx.x, size = k + 1, all = segments * chunks;
  float sum = 0.0f;
  if (x < size) {
    const int begin = static_cast<int>(static_cast<long long>(all) * threadIdx.y / sum_groups);
    const int end = static_cast<int>(static_cast<long long>(all) * (threadIdx.y + 1) / sum_groups);
#pragma unroll 8
    for (int i = begin; i < end; ++i) {
      const std::size_t slot = (static_cast<std::size_t>(i / chunks) * heads + head) * chunks + i % chunks;
      sum += sums[slot * size + x];
    }
  }
  parts[threadIdx.y][x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || x >= size) return;
  for (int g = 1; g < sum_groups; ++g) sum += parts[g][x];
  if (x < k) {
    if (ddt_bias != nullptr) ddt_bias[head * k + x] += sum;
  } else if (da_log != nullptr) {
    da_log[head] += sum;
  }
}

template <int K>
cudaError_t launch(const Problem& p, const ChunkGradients& g, cudaStream_t stream) {
  static_assert(sizeof(Shared<K>) <= 232448);
  const cudaError_t set = cudaFuncSetAttribute(gradients_kernel<K>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                               static_cast<int>(sizeof(Shared<K>)));
  if (set != cudaSuccess) return set;
  const int count = static_cast<int>(p.head_chunks()), most = processors();
  gradients_kernel<K><<<static_cast<unsigned>(count < most ? count : most), 4 * K, sizeof(Shared<K>), stream>>>(
      p, g, p.chunks(), count);
  return cudaGetLastError();
}

}  // namespace

cudaError_t chunk_gradients(const Problem& p, const ChunkGradients& g, cudaStream_t stream) {
  return p.head_dim == 128 ? launch<128>(p, g, stream) : launch<64>(p, g, stream);
}

cudaError_t reduce_sums(const Problem& p, const float* sums, float* da_log, float* ddt_bias, cudaStream_t stream) {
  reduce_kernel<<<static_cast<unsigned>(p.heads), dim3(160, sum_groups), 0, stream>>>(
      p.segments, p.heads, p.chunks(), p.head_dim, sums, da_log, ddt_bias);
  return cudaGetLastError();
}

}  // namespace deltapipe::kernels::cuda::kda
