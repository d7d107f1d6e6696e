// Every gradient of a chunk, after both scans; one block of threads a chunk and head.
//
// Rows of by_q, by_b and by_k, the gradients of (scale q), (beta k) and (k) through the decays, are built in tensor
// core accumulators that always hold values relative to one anchor token and are rescaled channel by channel when the
// anchor moves: by_q and by_b walk from the chunk's start through the blocks up to their own, by_k from the chunk's end
// down.
#include "kernels/cuda/kda_gradients.cuh"

namespace deltapipe::kernels::cuda::kda {
namespace {

template <int K>
__global__ void __launch_bounds__(4 * K, 1)
    gradients_kernel(const Problem p, const ChunkGradients io, int chunks, int ahead) {
  extern __shared__ __align__(1024) std::uint8_t memory[];
  auto& s = *reinterpret_cast<Shared<K>*>(memory);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const Place at(p, chunks, blockIdx.x);
  const std::size_t slot = at.slot(p, chunks);
  Tokens& t = s.tokens;
  if (thread == 0) {
    barrier_init(&s.values_full, 1);
    barrier_init(&s.states_full, 1);
    barrier_fence_init();
    constexpr int values = K * chunk_tokens * 2, states = K * K * 2;
    barrier_expect(&s.values_full, 2 * values);
    bulk_copy(s.v_new, io.v_new + slot * K * chunk_tokens, values, &s.values_full);
    bulk_copy(s.minus_y, io.minus_y + slot * K * chunk_tokens, values, &s.values_full);
    barrier_expect(&s.states_full, 2 * states);
    bulk_copy(s.state, io.states + slot * K * K, states, &s.states_full);
    bulk_copy(s.dstate, io.dstates + slot * K * K, states, &s.states_full);
  }
  // What the block after the next wave's start reads, into the second-level cache.
  if (const int next = blockIdx.x + ahead; next < static_cast<int>(gridDim.x)) {
    const Place to(p, chunks, next);
    const std::size_t there = to.slot(p, chunks);
    if (thread == 32) {
      prefetch(io.v_new + there * K * chunk_tokens, K * chunk_tokens * 2);
      prefetch(io.minus_y + there * K * chunk_tokens, K * chunk_tokens * 2);
      prefetch(io.states + there * K * K, K * K * 2);
      prefetch(io.dstates + there * K * K, K * K * 2);
    }
    if (thread >= 2 * K && thread < 2 * K + to.tokens) {
      const std::size_t from = (to.first + static_cast<std::size_t>(thread - 2 * K) * p.heads) * K;
      prefetch(p.q + from, 2 * K);
      prefetch(p.k + from, 2 * K);
      prefetch(p.f + from, 2 * K);
      prefetch(p.v + from, 2 * K);
      prefetch(io.d_o + from, 2 * K);
    }
  }
  __syncthreads();
  if (thread < 2 * K) {
    build_operands<K>(p, at, s, thread);
  } else {
    build_products<K>(p, at, io.d_o, s, thread - 2 * K);
  }
  __syncthreads();

  const int block = warp % 4, part = warp / 4, channel = 32 * part + lane % 4 * 2;
  const int rows[2] = {16 * block + lane / 4, 16 * block + lane / 4 + 8};
  float by_q[4][4], by_b[4][4], by_k[4][4];
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) by_q[n][e] = by_b[n][e] = by_k[n][e] = 0.0f;
  }
  barrier_wait(&s.states_full, 0);
  {  // channels 8 warp to 8 warp + 7
    float dot0 = 0.0f, dot1 = 0.0f;
#pragma unroll 4
    for (int n = 0; n < K / 8; ++n) {
      const int from = (n * (K / 8) + warp) * 128 + lane * 4;
      const auto x = *reinterpret_cast<const std::uint32_t*>(s.state + from);
      const auto y = *reinterpret_cast<const std::uint32_t*>(s.dstate + from);
      dot0 += low(x) * low(y);
      dot1 += high(x) * high(y);
    }
#pragma unroll
    for (int step = 4; step <= 16; step *= 2) {
      dot0 += __shfl_xor_sync(0xffffffffu, dot0, step);
      dot1 += __shfl_xor_sync(0xffffffffu, dot1, step);
    }
    if (lane < 4) *reinterpret_cast<float2*>(s.state_dot + 8 * warp + 2 * lane) = {dot0, dot1};
  }
#pragma unroll 2
  for (int n = 0; n < K / 16; ++n) {
    std::uint32_t d_o[4], y[4], v_new[4];
    load_matrices(d_o, shared_address(s.d_o) + block_offset<K>(16 * block, 16 * n, lane));
    load_matrices_transposed(y, tiles_address<false>(s.minus_y, 8, 2 * n, 2 * block, lane));
    load_matrices_transposed(v_new, tiles_address<false>(s.v_new, 8, 2 * n, 2 * block, lane));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      std::uint32_t b[4];
      load_matrices_transposed(b, tiles_address<true>(s.state, K / 8, 2 * n, 4 * part + 2 * h, lane));
      mma(by_q[2 * h], d_o, b[0], b[1]);
      mma(by_q[2 * h + 1], d_o, b[2], b[3]);
      mma(by_b[2 * h], y, b[0], b[1]);
      mma(by_b[2 * h + 1], y, b[2], b[3]);
      load_matrices_transposed(b, tiles_address<true>(s.dstate, K / 8, 2 * n, 4 * part + 2 * h, lane));
      mma(by_k[2 * h], v_new, b[0], b[1]);
      mma(by_k[2 * h + 1], v_new, b[2], b[3]);
    }
  }
  // What the chunk's end takes of dG: sum over tokens of k exp(G_end - G) dkg.
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    float2 rear = {0.0f, 0.0f};
    for (int b = block + 1; b < 4; ++b) {
      const float2 x = *reinterpret_cast<const float2*>(s.g_first + b * K + channel + 8 * n);
      const float2 y = *reinterpret_cast<const float2*>(s.total + b * K + channel + 8 * n);
      rear.x += x.x + y.x;
      rear.y += x.y + y.y;
    }
    const std::uint8_t* kt = s.kt + lane % 4 * 4;
    const auto k0 = *reinterpret_cast<const std::uint32_t*>(kt + piece_offset<K>(rows[0], 4 * part + n));
    const auto k1 = *reinterpret_cast<const std::uint32_t*>(kt + piece_offset<K>(rows[1], 4 * part + n));
    float sum0 = (low(k0) * by_k[n][0] + low(k1) * by_k[n][2]) * exp2_fast(rear.x);
    float sum1 = (high(k0) * by_k[n][1] + high(k1) * by_k[n][3]) * exp2_fast(rear.y);
#pragma unroll
    for (int step = 4; step <= 16; step *= 2) {
      sum0 += __shfl_xor_sync(0xffffffffu, sum0, step);
      sum1 += __shfl_xor_sync(0xffffffffu, sum1, step);
    }
    if (lane < 4) *reinterpret_cast<float2*>(&s.end_sum[block][channel + 8 * n]) = {sum0, sum1};
  }
  const bool exact = t.exact[block];
  // by_q, by_b: from the chunk's start to the block's last token (exact: to its first).
#pragma unroll 1
  for (int j = 0; j <= block; ++j) {
    if (j == block && exact) {
      rescale(by_q, by_b, s.g_first + block * K + channel, nullptr);
      break;
    }
    rescale(by_q, by_b, s.g_first + j * K + channel, s.total + j * K + channel);
    std::uint32_t da[4], dm[4];
    load_matrices(da, shared_address(s.da) + block_offset<chunk_tokens>(16 * block, 16 * j, lane));
    load_matrices(dm, shared_address(s.dm) + block_offset<chunk_tokens>(16 * block, 16 * j, lane));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      std::uint32_t b[4];
      load_matrices_transposed(b, shared_address(s.kt) + block_offset<K>(16 * j, 32 * part + 16 * h, lane));
      mma(by_q[2 * h], da, b[0], b[1]);
      mma(by_q[2 * h + 1], da, b[2], b[3]);
      mma(by_b[2 * h], dm, b[0], b[1]);
      mma(by_b[2 * h + 1], dm, b[2], b[3]);
    }
  }
  // by_k: from the chunk's end to the block's first token (exact: to its last).
#pragma unroll 1
  for (int i = 3; i >= block; --i) {
    if (i == block && exact) {
      if (block < 3) rescale(by_k, s.g_first + (block + 1) * K + channel, nullptr);
      break;
    }
    rescale(by_k, s.total + i * K + channel, i < 3 ? s.g_first + (i + 1) * K + channel : nullptr);
    std::uint32_t da[4], dm[4];
    load_matrices_transposed(da, shared_address(s.da) + block_offset_right<chunk_tokens>(16 * i, 16 * block, lane));
    load_matrices_transposed(dm, shared_address(s.dm) + block_offset_right<chunk_tokens>(16 * i, 16 * block, lane));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      std::uint32_t b[4];
      load_matrices_transposed(b, shared_address(s.qp) + block_offset<K>(16 * i, 32 * part + 16 * h, lane));
      mma(by_k[2 * h], da, b[0], b[1]);
      mma(by_k[2 * h + 1], da, b[2], b[3]);
      load_matrices_transposed(b, shared_address(s.bp) + block_offset<K>(16 * i, 32 * part + 16 * h, lane));
      mma(by_k[2 * h], dm, b[0], b[1]);
      mma(by_k[2 * h + 1], dm, b[2], b[3]);
    }
  }
  const std::size_t stride = static_cast<std::size_t>(p.heads) * (K / 2);
  std::uint32_t q[4][2], k[4][2];
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool live = rows[h] < at.tokens;
      const std::size_t word = at.first * (K / 2) + rows[h] * stride + channel / 2 + 4 * n;
      q[n][h] = live ? reinterpret_cast<const std::uint32_t*>(p.q)[word] : 0u;
      k[n][h] = live ? reinterpret_cast<const std::uint32_t*>(p.k)[word] : 0u;
    }
  }
  // dG, then the rows, from the anchors to the tokens. What a pair of tokens adds to dG at the later one it takes away
  // at the earlier one, exactly, since both products use the same rounded operands: dg, a sum over the tokens after
  // both, would otherwise keep the difference.
  float2 dg[4][2];
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int x = channel + 8 * n;
    const float2 total = *reinterpret_cast<const float2*>(s.total + block * K + x);
    const float2 back = {exact ? 1.0f : exp2_fast(-total.x), exact ? 1.0f : exp2_fast(-total.y)};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int from = piece_offset<K>(rows[h], 4 * part + n) + lane % 4 * 4;
      const auto qw = *reinterpret_cast<const std::uint32_t*>(s.qp + from);
      const auto bw = *reinterpret_cast<const std::uint32_t*>(s.bp + from);
      const auto kw = *reinterpret_cast<const std::uint32_t*>(s.kt + from);
      dg[n][h].x =
          back.x * low(qw) * by_q[n][2 * h] + back.x * low(bw) * by_b[n][2 * h] - back.x * low(kw) * by_k[n][2 * h];
      dg[n][h].y = back.y * high(qw) * by_q[n][2 * h + 1] + back.y * high(bw) * by_b[n][2 * h + 1] -
                   back.y * high(kw) * by_k[n][2 * h + 1];
    }
    const float2 end = *reinterpret_cast<const float2*>(s.c + (16 * block + 15) * Shared<K>::row + x);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 c = *reinterpret_cast<const float2*>(s.c + rows[h] * Shared<K>::row + x);
      float2 in, out;
      if (!exact) {
        in = {exp2_fast(c.x - total.x), exp2_fast(c.y - total.y)};
        out = {exp2_fast(-c.x), exp2_fast(-c.y)};
      } else {
        const bool before = t.origin[rows[h]] == 16 * block, after = rows[h] >= t.origin[16 * block + 15];
        in = {before ? exp2_fast(c.x) : 0.0f, before ? exp2_fast(c.y) : 0.0f};
        out = {after ? exp2_fast(end.x - c.x) : 0.0f, after ? exp2_fast(end.y - c.y) : 0.0f};
      }
      by_q[n][2 * h] *= in.x;
      by_q[n][2 * h + 1] *= in.y;
      by_b[n][2 * h] *= in.x;
      by_b[n][2 * h + 1] *= in.y;
      by_k[n][2 * h] *= out.x;
      by_k[n][2 * h + 1] *= out.y;
    }
  }
  if (exact) {
    float pairs[3][4][4] = {};  // of their own, so that the accumulators above stay in registers
    add_exact_pairs<K>(p, at, s, block, channel, pairs[0], pairs[1], pairs[2]);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        by_q[n][e] += pairs[0][n][e];
        by_b[n][e] += pairs[1][n][e];
        by_k[n][e] += pairs[2][n][e];
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (rows[h] >= at.tokens) continue;
        const std::uint32_t qw = q[n][h], kw = k[n][h];
        const float rq = p.scale * t.rq[rows[h]], rk = t.rk[rows[h]], beta = t.beta[rows[h]];
        const float(&x)[3][4][4] = pairs;
        dg[n][h].x += low(qw) * rq * x[0][n][2 * h] + low(kw) * rk * (beta * x[1][n][2 * h] - x[2][n][2 * h]);
        dg[n][h].y +=
            high(qw) * rq * x[0][n][2 * h + 1] + high(kw) * rk * (beta * x[1][n][2 * h + 1] - x[2][n][2 * h + 1]);
      }
    }
  }
  __syncthreads();         // nobody reads the states, qp or bp any more
  std::uint32_t late[16];  // f or v, for the last part
  if (thread < 2 * K) {
    load_share<K>(late, p.f, p, at, Share<K>(thread));
  } else {
    load_values<K>(late, p, at, thread - 2 * K);
  }

  // dq, dk of the normalised vectors into by_q, by_k; sums over channels.
  float sums[2][3] = {};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float rq = p.scale * t.rq[rows[h]], rk = t.rk[rows[h]], beta = t.beta[rows[h]],
                diagonal = s.diagonal[rows[h]];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float qx = (e ? high(q[n][h]) : low(q[n][h])) * rq, kx = (e ? high(k[n][h]) : low(k[n][h])) * rk;
        float &bq = by_q[n][2 * h + e], &bk = by_k[n][2 * h + e];
        const float bb = by_b[n][2 * h + e];
        bq += diagonal * kx;
        bk += beta * bb + diagonal * qx;
        sums[h][0] += kx * bb;
        sums[h][1] += qx * bq;
        sums[h][2] += kx * bk;
      }
      *reinterpret_cast<float2*>(s.dg + rows[h] * Shared<K>::row + channel + 8 * n) = dg[n][h];
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int m = 0; m < 3; ++m) {
      float x = sums[h][m];
      x += __shfl_xor_sync(0xffffffffu, x, 1);
      x += __shfl_xor_sync(0xffffffffu, x, 2);
      if (lane % 4 == 0) s.row_sums[part][rows[h]][m] = x;
    }
  }
  __syncthreads();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float along_q = 0.0f, along_k = 0.0f;
#pragma unroll
    for (int m = 0; m < K / 32; ++m) {
      along_q += s.row_sums[m][rows[h]][1];
      along_k += s.row_sums[m][rows[h]][2];
    }
    const float rq = t.rq[rows[h]], rk = t.rk[rows[h]], minus_q = -rq * rq * along_q, minus_k = -rk * rk * along_k;
    const float scale = p.scale * rq;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int to = piece_offset<K>(rows[h], 4 * part + n) + lane % 4 * 4;
      *reinterpret_cast<std::uint32_t*>(s.qp + to) =
          pack(scale * by_q[n][2 * h] + minus_q * low(q[n][h]), scale * by_q[n][2 * h + 1] + minus_q * high(q[n][h]));
      *reinterpret_cast<std::uint32_t*>(s.bp + to) =
          pack(rk * by_k[n][2 * h] + minus_k * low(k[n][h]), rk * by_k[n][2 * h + 1] + minus_k * high(k[n][h]));
    }
  }
  if (thread < 2 * K) {
    gate_gradients<K>(p, at, s, io.out, io.sums + slot * (K + 1), thread, late);
  } else {
    value_gradients<K>(at, s, thread - 2 * K, late);
  }
  __syncthreads();
  if (thread < at.tokens) {
    float dbeta = 0.0f;
#pragma unroll
    for (int m = 0; m < K / 32; ++m) dbeta += s.row_sums[m][thread][0];
#pragma unroll
    for (int m = 0; m < K / 64; ++m) dbeta += s.y_dot_v[m][thread];
    const float beta = t.beta[thread];
    reinterpret_cast<__nv_bfloat16*>(io.out.db)[at.first + static_cast<std::size_t>(thread) * p.heads] =
        __float2bfloat16(dbeta * beta * (1.0f - beta));
  }
#pragma unroll
  for (int task = thread; task < chunk_tokens * K / 8; task += 4 * K) {
    const int r = task / (K / 8), piece = task % (K / 8), from = piece_offset<K>(r, piece);
    if (r >= at.tokens) continue;
    const std::size_t to = (at.first + static_cast<std::size_t>(r) * p.heads) * K + piece * 8;
    *reinterpret_cast<uint4*>(io.out.dq + to) = *reinterpret_cast<const uint4*>(s.qp + from);
    *reinterpret_cast<uint4*>(io.out.dk + to) = *reinterpret_cast<const uint4*>(s.bp + from);
    *reinterpret_cast<uint4*>(io.out.dv + to) = *reinterpret_cast<const uint4*>(s.d_o + from);
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
  int device = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  gradients_kernel<K>
      <<<static_cast<unsigned>(p.head_chunks()), 4 * K, sizeof(Shared<K>), stream>>>(p, g, p.chunks(), processors);
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
