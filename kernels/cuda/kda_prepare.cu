// The state-free part of every chunk, one block of threads a chunk and head: norms, decays, Aqk, (I + M)^-1 and the
// scaled operands, written as the records that the scans read.
#include "kernels/cuda/kda_common.cuh"

namespace deltapipe::kernels::cuda::kda {
namespace {

constexpr int square_row = chunk_tokens + 4;  // fp32 [64, 64] with rows 16 bytes apart in banks

template <int K>
struct Shared {
  static constexpr int row = K + 4;  // rows of 8-row matrices then start 4 banks apart
  static constexpr int exact_row = K + 1;
  union {
    struct {
      float qp[chunk_tokens * row];  // scale q, times the decay from the block's first token to the token
      float kp[chunk_tokens * row];  // k, likewise
      float kt[chunk_tokens * row];  // k times the decay from the token to the block's last token
    };
    struct {
      float l[chunk_tokens * square_row];        // M
      float inverse[chunk_tokens * square_row];  // (I + M)^-1
      float product[32 * square_row];
      float exact_q[block_tokens * exact_row], exact_k[block_tokens * exact_row], exact_c[block_tokens * exact_row];
    };
  };
  float gap[10 * K];  // exp2 of: block J's last token to block I's first at I (I + 1) / 2 + J; J == I: backwards
  float g_first[4 * K];
  float total[4 * K];  // log2 of the decay from a block's first token (exclusive) to its last
  Tokens tokens;
};

/// Aqk and M of a block that needs the exact path.
template <int K>
__device__ void exact_block(const Problem& p, const Place& at, Shared<K>& s, int block, const Share<K>& own,
                            std::uint8_t* aqk) {
  const Tokens& t = s.tokens;
  const int row = Shared<K>::exact_row;
  __syncthreads();
  if (own.block == block) {
    std::uint32_t q[16], k[16], f[16];
    float c[16][2], g_first[2];
    load_share<K>(q, p.q, p, at, own);
    load_share<K>(k, p.k, p, at, own);
    load_share<K>(f, p.f, p, at, own);
    cumulate<K>(p, at, t, own, f, c, g_first);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float rq = p.scale * t.rq[block * 16 + i], rk = t.rk[block * 16 + i];
      const int x = i * row + 2 * own.pair;
      s.exact_q[x] = low(q[i]) * rq;
      s.exact_q[x + 1] = high(q[i]) * rq;
      s.exact_k[x] = low(k[i]) * rk;
      s.exact_k[x + 1] = high(k[i]) * rk;
      s.exact_c[x] = c[i][0];
      s.exact_c[x + 1] = c[i][1];
    }
  }
  __syncthreads();
  for (int task = threadIdx.x; task < 256; task += 2 * K) {
    const int i = task / 16, j = task % 16, row_i = block * 16 + i, column = block * 16 + j;
    float by_q = 0.0f, by_k = 0.0f;
    if (j <= i && column >= t.origin[row_i]) {
#pragma unroll 4
      for (int x = 0; x < K; ++x) {
        const float d = s.exact_k[j * row + x] * exp2_fast(s.exact_c[i * row + x] - s.exact_c[j * row + x]);
        by_q += s.exact_q[i * row + x] * d;
        by_k += s.exact_k[i * row + x] * d;
      }
    }
    s.l[row_i * square_row + column] = j < i ? t.beta[row_i] * by_k : 0.0f;
    *reinterpret_cast<__nv_bfloat16*>(aqk + piece_offset<chunk_tokens>(row_i, column / 8) + column % 8 * 2) =
        __float2bfloat16(by_q);
  }
}

/// s.inverse = (I + s.l)^-1. Forward substitution in blocks of 16, merged to 32 and to 64. Begins after a barrier.
template <int K>
__device__ void invert(Shared<K>& s) {
  constexpr int threads = 2 * K;
  const int thread = threadIdx.x;
  if (thread < 64) {
    const int first = thread / 16 * 16, column = thread % 16;
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float* l = s.l + (first + i) * square_row + first;
      float sum = i == column ? 1.0f : 0.0f;
#pragma unroll
      for (int j = 0; j < i; ++j) sum -= l[j] * x[j];
      x[i] = sum;
      s.inverse[(first + i) * square_row + first + column] = sum;
    }
  }
  __syncthreads();
  for (int task = thread; task < 512; task += threads) {
    const int low_block = task / 256 * 32, r = task / 16 % 16, c = task % 16;
    float sum = 0.0f;
#pragma unroll
    for (int m = 0; m < 16; ++m) {
      sum += s.l[(low_block + 16 + r) * square_row + low_block + m] *
             s.inverse[(low_block + m) * square_row + low_block + c];
    }
    s.product[r * square_row + low_block + c] = sum;
  }
  __syncthreads();
  for (int task = thread; task < 512; task += threads) {
    const int low_block = task / 256 * 32, r = task / 16 % 16, c = task % 16;
    float sum = 0.0f;
#pragma unroll
    for (int m = 0; m < 16; ++m) {
      sum +=
          s.inverse[(low_block + 16 + r) * square_row + low_block + 16 + m] * s.product[m * square_row + low_block + c];
    }
    s.inverse[(low_block + 16 + r) * square_row + low_block + c] = -sum;
  }
  __syncthreads();
  for (int task = thread; task < 256; task += threads) {
    const int r = task / 8, c = task % 8 * 4;
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 8
    for (int m = 0; m < 32; ++m) {
      const float l = s.l[(32 + r) * square_row + m];
      const float4 x = *reinterpret_cast<const float4*>(s.inverse + m * square_row + c);
      sum.x += l * x.x;
      sum.y += l * x.y;
      sum.z += l * x.z;
      sum.w += l * x.w;
    }
    *reinterpret_cast<float4*>(s.product + r * square_row + c) = sum;
  }
  __syncthreads();
  for (int task = thread; task < 256; task += threads) {
    const int r = task / 8, c = task % 8 * 4;
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 8
    for (int m = 0; m < 32; ++m) {
      const float l = s.inverse[(32 + r) * square_row + 32 + m];
      const float4 x = *reinterpret_cast<const float4*>(s.product + m * square_row + c);
      sum.x -= l * x.x;
      sum.y -= l * x.y;
      sum.z -= l * x.z;
      sum.w -= l * x.w;
    }
    *reinterpret_cast<float4*>(s.inverse + (32 + r) * square_row + c) = sum;
  }
  __syncthreads();
}

template <int K>
__global__ void __launch_bounds__(2 * K, K == 128 ? 2 : 4)
    prepare_kernel(const Problem p, int chunks, std::uint8_t* records) {
  constexpr int threads = 2 * K, warps = threads / 32;
  extern __shared__ __align__(128) std::uint8_t memory[];
  auto& s = *reinterpret_cast<Shared<K>*>(memory);
  Tokens& t = s.tokens;
  constexpr int row = Shared<K>::row;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const Place at(p, chunks, blockIdx.x);
  const Share<K> own(thread);
  std::uint8_t* record = records + at.slot(p, chunks) * Record<K>::bytes;
  std::uint8_t* outputs = record + Record<K>::state_bytes;

  float total[2], g_first[2];
  {
    std::uint32_t q[16], k[16], f[16];
    load_share<K>(q, p.q, p, at, own);
    load_share<K>(k, p.k, p, at, own);
    load_share<K>(f, p.f, p, at, own);
    sum_squares<K>(t, q, k, own, lane);
    if (thread < 64) load_tokens(t, p, at, thread);
    __syncthreads();
    if (thread < 64) finish_tokens<K>(t, thread);
    __syncthreads();
    float c[16][2];
    cumulate<K>(p, at, t, own, f, c, g_first);
    const unsigned starts = t.starts(own.block);
    const bool whole = reached(starts, 15);
    total[0] = whole ? c[15][0] : -INFINITY;
    total[1] = whole ? c[15][1] : -INFINITY;
    if (total[0] < -range_limit || total[1] < -range_limit) t.exact[own.block] = 1;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int token = own.block * 16 + i, x = token * row + 2 * own.pair;
      const bool before = reached(starts, i), after = reaches(starts, i);
      const float rq = p.scale * t.rq[token], rk = t.rk[token];
      const float k0 = low(k[i]) * rk, k1 = high(k[i]) * rk;
      const float d0 = before ? exp2_fast(c[i][0]) : 0.0f, d1 = before ? exp2_fast(c[i][1]) : 0.0f;
      const float e0 = after ? exp2_fast(c[15][0] - c[i][0]) : 0.0f;
      const float e1 = after ? exp2_fast(c[15][1] - c[i][1]) : 0.0f;
      *reinterpret_cast<float2*>(s.qp + x) = {to_tf32(low(q[i]) * rq * d0), to_tf32(high(q[i]) * rq * d1)};
      *reinterpret_cast<float2*>(s.kp + x) = {to_tf32(k0 * d0), to_tf32(k1 * d1)};
      *reinterpret_cast<float2*>(s.kt + x) = {k0 * e0, k1 * e1};
    }
    const int x = own.block * K + 2 * own.pair;
    *reinterpret_cast<float2*>(s.g_first + x) = {g_first[0], g_first[1]};
    *reinterpret_cast<float2*>(s.total + x) = {total[0], total[1]};
  }
  __syncthreads();

  // Decays between blocks; the chunk's own.
  {
    const int x = thread % K;
    if (thread < K) {
      float sum = s.g_first[x] + s.total[x];
#pragma unroll
      for (int j = 1; j < 4; ++j) sum += s.g_first[j * K + x] + s.total[j * K + x];
      reinterpret_cast<float*>(record + Record<K>::decay)[x] = exp2_fast(sum);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        s.gap[(j * (j + 1) / 2 + j) * K + x] = t.exact[j] ? 0.0f : exp2_fast(-s.total[j * K + x]);
    } else {
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        float sum = s.g_first[(j + 1) * K + x];
#pragma unroll
        for (int i = j + 1; i < 4; ++i) {
          s.gap[(i * (i + 1) / 2 + j) * K + x] = exp2_fast(sum);
          if (i < 3) sum += s.total[i * K + x] + s.g_first[(i + 1) * K + x];
        }
      }
    }
    if (thread < 64) reinterpret_cast<float*>(record + Record<K>::beta)[thread] = t.beta[thread];
  }
  // Operands of the scans.
  {
    float2 head = {g_first[0], g_first[1]}, rear = {0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 f = *reinterpret_cast<const float2*>(s.g_first + j * K + 2 * own.pair);
      const float2 w = *reinterpret_cast<const float2*>(s.total + j * K + 2 * own.pair);
      if (j < own.block) {
        head.x += f.x + w.x;
        head.y += f.y + w.y;
      } else if (j > own.block) {
        rear.x += f.x + w.x;
        rear.y += f.y + w.y;
      }
    }
    head = {exp2_fast(head.x), exp2_fast(head.y)};
    rear = {exp2_fast(rear.x), exp2_fast(rear.y)};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int token = own.block * 16 + i, x = token * row + 2 * own.pair;
      const float2 q = *reinterpret_cast<const float2*>(s.qp + x);
      const float2 k = *reinterpret_cast<const float2*>(s.kp + x);
      const float2 kt = *reinterpret_cast<const float2*>(s.kt + x);
      const float beta = -t.beta[token];
      const int to = piece_offset<K>(token, own.pair / 4) + own.pair % 4 * 4;
      *reinterpret_cast<std::uint32_t*>(outputs + Record<K>::qg + to) = pack(q.x * head.x, q.y * head.y);
      *reinterpret_cast<std::uint32_t*>(record + Record<K>::nbg + to) = pack(beta * k.x * head.x, beta * k.y * head.y);
      *reinterpret_cast<std::uint32_t*>(record + Record<K>::kg + to) = pack(kt.x * rear.x, kt.y * rear.y);
    }
  }
  __syncthreads();

  // Products of block rows I with blocks J <= I. Task: (I, q or k).
  constexpr int tasks = 8 / warps > 0 ? 8 / warps : 1;
  float acc[tasks][4][2][4];
#pragma unroll
  for (int n = 0; n < tasks; ++n) {
    const int task = warp + n * warps, i = task < 4 ? task : 7 - task;
    const float* left = task < 4 ? s.qp : s.kp;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[n][j][h][e] = 0.0f;
      }
    }
    const std::uint32_t a_at = shared_address(left + (16 * i + (lane & 15)) * row + ((lane >> 4) << 2));
    const std::uint32_t b_at =
        shared_address(s.kt + ((lane & 7) + ((lane >> 4) << 3)) * row + (((lane >> 3) & 1) << 2));
    const float* gap = s.gap + i * (i + 1) / 2 * K + lane % 4;
#pragma unroll 2
    for (int x = 0; x < K; x += 8) {
      std::uint32_t a[4];
      load_matrices(a, a_at + 4 * x);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j > i) break;
        std::uint32_t b[4];
        load_matrices(b, b_at + 4 * (16 * j * row + x));
        const float g0 = gap[j * K + x], g1 = gap[j * K + x + 4];
        mma_tf32(acc[n][j][0], a, to_tf32(__uint_as_float(b[0]) * g0), to_tf32(__uint_as_float(b[1]) * g1));
        mma_tf32(acc[n][j][1], a, to_tf32(__uint_as_float(b[2]) * g0), to_tf32(__uint_as_float(b[3]) * g1));
      }
    }
  }
  __syncthreads();
  for (int x = thread; x < chunk_tokens * square_row; x += threads) s.inverse[x] = 0.0f;
#pragma unroll
  for (int n = 0; n < tasks; ++n) {
    const int task = warp + n * warps, i = task < 4 ? task : 7 - task;
    const bool is_q = task < 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j > i || (j == i && t.exact[i])) break;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          const int r = 16 * i + lane / 4 + 4 * e, c = 16 * j + 8 * h + lane % 4 * 2;
          float x = acc[n][j][h][e], y = acc[n][j][h][e + 1];
          if (is_q) {
            x = c <= r ? x : 0.0f;
            y = c + 1 <= r ? y : 0.0f;
            *reinterpret_cast<std::uint32_t*>(outputs + Record<K>::aqk + piece_offset<chunk_tokens>(r, c / 8) +
                                              lane % 4 * 4) = pack(x, y);
          } else {
            const float beta = t.beta[r];
            *reinterpret_cast<float2*>(s.l + r * square_row + c) = {c < r ? beta * x : 0.0f,
                                                                    c + 1 < r ? beta * y : 0.0f};
          }
        }
      }
    }
  }
  for (int block = 0; block < 4; ++block) {
    if (t.exact[block]) exact_block<K>(p, at, s, block, own, outputs + Record<K>::aqk);
  }
  __syncthreads();
  invert<K>(s);
  for (int task = thread; task < 512; task += threads) {
    const int r = task / 8, piece = task % 8;
    if (piece / 2 > r / 16) continue;
    const float4 x = *reinterpret_cast<const float4*>(s.inverse + r * square_row + piece * 8);
    const float4 y = *reinterpret_cast<const float4*>(s.inverse + r * square_row + piece * 8 + 4);
    *reinterpret_cast<uint4*>(record + Record<K>::a + piece_offset<chunk_tokens>(r, piece)) = {
        pack(x.x, x.y), pack(x.z, x.w), pack(y.x, y.y), pack(y.z, y.w)};
  }
}

template <int K>
cudaError_t launch(const Problem& p, void* records, cudaStream_t stream) {
  const cudaError_t set = cudaFuncSetAttribute(prepare_kernel<K>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                               static_cast<int>(sizeof(Shared<K>)));
  if (set != cudaSuccess) return set;
  prepare_kernel<K><<<static_cast<unsigned>(p.head_chunks()), 2 * K, sizeof(Shared<K>), stream>>>(
      p, p.chunks(), static_cast<std::uint8_t*>(records));
  return cudaGetLastError();
}

}  // namespace

cudaError_t prepare(const Problem& p, void* records, cudaStream_t stream) {
  return p.head_dim == 128 ? launch<128>(p, records, stream) : launch<64>(p, records, stream);
}

}  // namespace deltapipe::kernels::cuda::kda
