// The state-free part of every chunk: norms, decays, Aqk, (I + M)^-1 and the scaled operands, written as the records
// that the scans read. A block of threads takes one chunk and head after another and fetches the next one's inputs
// while it inverts.
//
// Products of two blocks use keys that carry the decay to the first token of a later block and queries that carry the
// decay from there: no exponent is positive. Neighbouring blocks meet at the later one's start, the chunk's two halves
// at its middle ("far" operands move on from the neighbours' meeting points); a block meets itself at its own start,
// where a key's decay is undone (see "plain" in kda_common.cuh).
#include "kernels/cuda/kda_common.cuh"

namespace deltapipe::kernels::cuda::kda {
namespace {

constexpr int square_row = chunk_tokens + 4;  // fp32 [64, 64] with rows 16 bytes apart in banks
constexpr int product_row = 32 + 4;

template <int K>
struct alignas(128) Shared {
  static constexpr int exact_row = K + 1, tile = Record<K>::tile, block = tile / 4;
  union {
    struct {                 // swizzled; inputs, then operands
      std::uint8_t q[tile];  // scale q, times the decay from the block's first token to the token
      std::uint8_t k[tile];  // -beta k, likewise
      std::uint8_t f[tile];  // k times the decay from the token to the next block's first token
    };
    struct {
      float exact_q[block_tokens * exact_row], exact_k[block_tokens * exact_row], exact_c[block_tokens * exact_row];
    };
  };
  union {
    struct {
      std::uint8_t own_key[tile];               // k over the decay from the block's first token to the token
      std::uint8_t far_q[block], far_k[block];  // of the last block, from the chunk's middle
      std::uint8_t far_key[block];              // of the first block, to the chunk's middle
    };
    struct {
      float l[chunk_tokens * square_row];  // M, then (I + M)^-1
      float product[32 * product_row];
    };
  };
  float g_first[4 * K];
  float total[4 * K];  // log2 of the decay from a block's first token (exclusive) to its last
  Tokens tokens;
};

template <int K>
__device__ __forceinline__ void fetch(const Problem& p, const Place& at, Shared<K>& s, int thread, Ahead& x) {
  fetch_tile<K, 2 * K>(s.q, p.q, p, at, thread);
  fetch_tile<K, 2 * K>(s.k, p.k, p, at, thread);
  fetch_tile<K, 2 * K>(s.f, p.f, p, at, thread);
  copy_async_commit();
  load_ahead<K>(p, at, thread, x);
}

/// Operands of the products and of the scans. whole: as in cumulate_as.
template <int K, bool whole>
__device__ __forceinline__ void build(Shared<K>& s, const Share<K>& own, const float (&c)[16][2], unsigned starts,
                                      std::uint8_t* record) {
  std::uint8_t* outputs = record + Record<K>::state_bytes;
  const int x = 2 * own.pair;
  // Decays from the chunk's start to the block's first token, and from the next block's first token to the chunk's end;
  // far: between the meeting points of neighbours and of halves, for the first and the last block.
  float2 head = *reinterpret_cast<const float2*>(s.g_first + own.block * K + x), rear = {0.0f, 0.0f}, far = rear,
         next = rear;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 g = *reinterpret_cast<const float2*>(s.g_first + j * K + x);
    const float2 w = *reinterpret_cast<const float2*>(s.total + j * K + x);
    if (j < own.block) {
      head.x += g.x + w.x;
      head.y += g.y + w.y;
    } else if (j == own.block + 1) {
      next = g;
      rear = w;
    } else if (j > own.block) {
      rear.x += g.x + w.x;
      rear.y += g.y + w.y;
    }
    if (j == (own.block == 0 ? 1 : 2)) far = w;
    if (j == (own.block == 0 ? 2 : 3)) {
      far.x += g.x;
      far.y += g.y;
    }
  }
  head = {exp2_fast(head.x), exp2_fast(head.y)};
  rear = {exp2_fast(rear.x), exp2_fast(rear.y)};
  far = {exp2_fast(far.x), exp2_fast(far.y)};
  const float2 end = {c[15][0] + next.x, c[15][1] + next.y};
  const bool exact = s.tokens.exact[own.block] != 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int in_block = piece_offset<K>(i, own.pair / 4) + own.pair % 4 * 4, to = in_block + own.block * 32 * K;
    // in a panel, rows are 128 bytes apart
    const int out_to = in_block + own.block * 2048 - i * (2 * K - 128) + own.pair / 32 * (Record<K>::panel - 128);
    const std::uint32_t qw = *reinterpret_cast<const std::uint32_t*>(s.q + to);
    const std::uint32_t kw = *reinterpret_cast<const std::uint32_t*>(s.k + to);
    const float4 row = s.tokens.row[own.block * 16 + i];
    float2 in = {exp2_fast(c[i][0]), exp2_fast(c[i][1])};
    float2 out = {exp2_fast(end.x - c[i][0]), exp2_fast(end.y - c[i][1])};
    float2 back = {exp2_fast(-c[i][0]), exp2_fast(-c[i][1])};
    if (!whole) {
      if (!reached(starts, i)) in = {0.0f, 0.0f};
      if (!reaches(starts, i)) out = {0.0f, 0.0f};
    }
    if (exact) back = {0.0f, 0.0f};
    const float2 q = {low(qw) * (row.x * in.x), high(qw) * (row.x * in.y)};
    const float2 b = {low(kw) * (row.y * in.x), high(kw) * (row.y * in.y)};
    const float2 k = {low(kw) * row.z, high(kw) * row.z}, t = {k.x * out.x, k.y * out.y};
    *reinterpret_cast<std::uint32_t*>(s.q + to) = pack(q.x, q.y);
    *reinterpret_cast<std::uint32_t*>(s.k + to) = pack(b.x, b.y);
    *reinterpret_cast<std::uint32_t*>(s.f + to) = pack(t.x, t.y);
    *reinterpret_cast<std::uint32_t*>(s.own_key + to) = pack(k.x * back.x, k.y * back.y);
    *reinterpret_cast<std::uint32_t*>(outputs + Record<K>::qg + out_to) = pack(q.x * head.x, q.y * head.y);
    *reinterpret_cast<std::uint32_t*>(record + Record<K>::nbg + out_to) = pack(b.x * head.x, b.y * head.y);
    *reinterpret_cast<std::uint32_t*>(record + Record<K>::kg + out_to) = pack(t.x * rear.x, t.y * rear.y);
    if (own.block == 3) {
      *reinterpret_cast<std::uint32_t*>(s.far_q + in_block) = pack(q.x * far.x, q.y * far.y);
      *reinterpret_cast<std::uint32_t*>(s.far_k + in_block) = pack(b.x * far.x, b.y * far.y);
    } else if (own.block == 0) {
      *reinterpret_cast<std::uint32_t*>(s.far_key + in_block) = pack(t.x * far.x, t.y * far.y);
    }
  }
}

/// Aqk and M of a block that needs the exact path.
template <int K>
__device__ __noinline__ void exact_block(const Problem& p, const Place at, Shared<K>& s, int block, const Share<K> own,
                                         const Ahead ahead, std::uint8_t* aqk, int thread, int barrier) {
  const int row = Shared<K>::exact_row;
  const unsigned starts = s.tokens.starts(block);
  group_sync<2 * K>(barrier);
  if (own.block == block) {
    std::uint32_t q[16], k[16], f[16];
    float c[16][2], g_first[2];
    load_share<K>(q, p.q, p, at, own);
    load_share<K>(k, p.k, p, at, own);
    load_share<K>(f, p.f, p, at, own);
    cumulate(f, p.gate_lower_bound, ahead.rate, ahead.bias, starts, true, at.tokens - 16 * block, c, g_first);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float4 of_token = s.tokens.row[block * 16 + i];
      const int x = i * row + 2 * own.pair;
      s.exact_q[x] = low(q[i]) * of_token.x;
      s.exact_q[x + 1] = high(q[i]) * of_token.x;
      s.exact_k[x] = low(k[i]) * of_token.z;
      s.exact_k[x + 1] = high(k[i]) * of_token.z;
      s.exact_c[x] = c[i][0];
      s.exact_c[x + 1] = c[i][1];
    }
  }
  group_sync<2 * K>(barrier);
  for (int task = thread; task < 256; task += 2 * K) {
    const int i = task / 16, j = task % 16, row_i = block * 16 + i, column = block * 16 + j;
    float by_q = 0.0f, by_k = 0.0f;
    if (j <= i && reached(starts >> j, i - j)) {
#pragma unroll 4
      for (int x = 0; x < K; ++x) {
        const float d = s.exact_k[j * row + x] * exp2_fast(s.exact_c[i * row + x] - s.exact_c[j * row + x]);
        by_q += s.exact_q[i * row + x] * d;
        by_k += s.exact_k[i * row + x] * d;
      }
    }
    s.l[row_i * square_row + column] = j < i ? s.tokens.beta[row_i] * by_k : 0.0f;
    *reinterpret_cast<__nv_bfloat16*>(aqk + piece_offset<chunk_tokens>(row_i, column / 8) + column % 8 * 2) =
        __float2bfloat16(by_q);
  }
}

__device__ __forceinline__ void add(float4& sum, float a, const float4& x) {
  sum.x += a * x.x;
  sum.y += a * x.y;
  sum.z += a * x.z;
  sum.w += a * x.w;
}

/// s.l = (I + s.l)^-1 in fp32, blocks above the diagonal left alone. Forward substitution in blocks of 16, merged to 32
/// and to 64: an inverse's lower left part is -X22 (L21 X11). Begins after a barrier and ends with one.
template <int K>
__device__ __forceinline__ void invert(Shared<K>& s, int thread, int barrier) {
  constexpr int threads = 2 * K, warps = threads / 32;
  const int warp = thread / 32, lane = thread % 32;
  if (warp < 4) {  // a lane a column, the upper half of the warp like the lower
    const int column = lane % 16;
    float* l = s.l + 16 * warp * (square_row + 1);
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float sum = i == column ? 1.0f : 0.0f;
#pragma unroll
      for (int j = 0; j < i; j += 4) {
        const float4 y = quad(l + i * square_row + j);
        sum -= y.x * x[j];
        if (j + 1 < i) sum -= y.y * x[j + 1];
        if (j + 2 < i) sum -= y.z * x[j + 2];
        if (j + 3 < i) sum -= y.w * x[j + 3];
      }
      x[i] = sum;
    }
    __syncwarp();
    if (lane < 16) {
#pragma unroll
      for (int i = 0; i < 16; ++i) l[i * square_row + column] = x[i];
    }
  }
  group_sync<threads>(barrier);
  // Two pairs of blocks; a thread two columns of a row.
#pragma unroll
  for (int task = thread; task < 256; task += threads) {
    const int first = task / 128 * 32, r = task % 128 / 8, c = task % 8 * 2;
    float2 sum = {0.0f, 0.0f};
#pragma unroll
    for (int m = 0; m < 16; m += 4) {
      const float4 y = quad(s.l + (first + 16 + r) * square_row + first + m);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float a = n == 0 ? y.x : n == 1 ? y.y : n == 2 ? y.z : y.w;
        const float2 x = *reinterpret_cast<const float2*>(s.l + (first + m + n) * square_row + first + c);
        sum.x += a * x.x;
        sum.y += a * x.y;
      }
    }
    *reinterpret_cast<float2*>(s.product + r * product_row + first / 2 + c) = sum;
  }
  group_sync<threads>(barrier);
#pragma unroll
  for (int task = thread; task < 256; task += threads) {
    const int first = task / 128 * 32, r = task % 128 / 8, c = task % 8 * 2;
    float2 sum = {0.0f, 0.0f};
#pragma unroll
    for (int m = 0; m < 16; m += 4) {
      const float4 y = quad(s.l + (first + 16 + r) * square_row + first + 16 + m);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float a = n == 0 ? y.x : n == 1 ? y.y : n == 2 ? y.z : y.w;
        const float2 x = *reinterpret_cast<const float2*>(s.product + (m + n) * product_row + first / 2 + c);
        sum.x -= a * x.x;
        sum.y -= a * x.y;
      }
    }
    *reinterpret_cast<float2*>(s.l + (first + 16 + r) * square_row + first + c) = sum;
  }
  group_sync<threads>(barrier);
  for (int four = warp; four < 8; four += warps) {  // columns [4 four, 4 four + 4), a lane a row
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int m = 4 * four; m < 32; m += 4) {
      const float4 y = quad(s.l + (32 + lane) * square_row + m);
      const float* x = s.l + m * square_row + 4 * four;
      add(sum, y.x, quad(x));
      add(sum, y.y, quad(x + square_row));
      add(sum, y.z, quad(x + 2 * square_row));
      add(sum, y.w, quad(x + 3 * square_row));
    }
    *reinterpret_cast<float4*>(s.product + lane * product_row + 4 * four) = sum;
  }
  group_sync<threads>(barrier);
  for (int four = warp; four < 8; four += warps) {  // rows [4 four, 4 four + 4), a lane a column
    float sum[4] = {};
    for (int m = 0; m <= 4 * four; m += 4) {
      float x[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) x[n] = s.product[(m + n) * product_row + lane];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float4 y = quad(s.l + (32 + 4 * four + r) * square_row + 32 + m);
        sum[r] -= y.x * x[0] + y.y * x[1] + y.z * x[2] + y.w * x[3];
      }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) s.l[(32 + 4 * four + r) * square_row + lane] = sum[r];
  }
  group_sync<threads>(barrier);
}

/// Groups of threads a block, and so a multiprocessor: each takes chunks of its own.
template <int K>
constexpr int groups = K == 128 ? 2 : 3;

/// Which chunks and heads a group takes, as positions in the order of Place or its reverse: every `workers`-th before
/// `late`; from there on only the first `late_workers` groups go on.
struct Turns {
  int worker, workers, late, late_workers, count;
  __device__ __forceinline__ int first() const { return worker < late ? worker : join(); }
  __device__ __forceinline__ int after(int i) const {
    if (i >= late) return i + late_workers;
    return i + workers < late ? i + workers : join();
  }

 private:
  __device__ __forceinline__ int join() const { return worker < late_workers ? late + worker : count; }
};

template <int K>
__global__ void __launch_bounds__(2 * K * groups<K>, 1)
    prepare_kernel(const __grid_constant__ Problem p, const __grid_constant__ Pace pace, int chunks, int count,
                   std::uint8_t* records) {
  constexpr int threads = 2 * K, warps = threads / 32;
  extern __shared__ __align__(128) std::uint8_t memory[];
  const int group = threadIdx.x / threads, barrier = 1 + group;
  auto& s = reinterpret_cast<Shared<K>*>(memory)[group];
  const Turns work{static_cast<int>(blockIdx.x) * groups<K> + group, static_cast<int>(gridDim.x) * groups<K>,
                   count - pace.late, min(pace.late_blocks, static_cast<int>(gridDim.x)) * groups<K>, count};
  const auto place = [&](int i) { return Place(p, pace.backwards ? count - 1 - i : i); };
  int index = work.first();
  if (pace.ready != nullptr) {
    if (threadIdx.x % threads == 0) {
      for (int i = index; i < count; i = work.after(i)) pace.ready[place(i).slot(p, chunks)] = 0;
      __threadfence();
    }
    __syncthreads();
    start_next_kernel();
  }
  if (index >= count) return;
  Ahead ahead;
  fetch<K>(p, place(index), s, threadIdx.x % threads, ahead);
  int* written = nullptr;  // the flag of the record before
  for (;;) {
    const int thread = anew(threadIdx.x % threads), warp = thread / 32, lane = thread % 32;
    const Share<K> own(thread);
    const Place at = place(index);
    std::uint8_t* record = records + at.slot(p, chunks) * Record<K>::bytes;
    std::uint8_t* aqk = record + Record<K>::state_bytes + Record<K>::aqk;
    store_tokens(s.tokens, at, thread, ahead);
    const Ahead now = ahead;
    copy_async_wait<0>();
    group_sync<threads>(barrier);
    if (written != nullptr && thread == 0) set_flag(written);
    if (pace.ready != nullptr) written = pace.ready + at.slot(p, chunks);

    float c[16][2];
    const unsigned starts = s.tokens.starts(own.block);
    {
      std::uint32_t f[16];
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const int from = piece_offset<K>(own.block * 16 + i, own.pair / 4) + own.pair % 4 * 4;
        f[i] = *reinterpret_cast<const std::uint32_t*>(s.f + from);
      }
      float g_first[2];
      cumulate(f, p.gate_lower_bound, now.rate, now.bias, starts, true, at.tokens - 16 * own.block, c, g_first);
      const float2 total = starts <= 1u ? float2{c[15][0], c[15][1]} : float2{-INFINITY, -INFINITY};
      if (total.x < -range_limit || total.y < -range_limit) s.tokens.exact[own.block] = 1;
      const int x = own.block * K + 2 * own.pair;
      *reinterpret_cast<float2*>(s.g_first + x) = {g_first[0], g_first[1]};
      *reinterpret_cast<float2*>(s.total + x) = total;
    }
    find_norms<K, warps>(s.tokens, s.q, s.k, p.scale, warp, lane);
    group_sync<threads>(barrier);
    if (starts <= 1u) {
      build<K, true>(s, own, c, starts, record);
    } else {
      build<K, false>(s, own, c, starts, record);
    }
    if (thread < K) {
      float sum = s.g_first[thread] + s.total[thread];
#pragma unroll
      for (int j = 1; j < 4; ++j) sum += s.g_first[j * K + thread] + s.total[j * K + thread];
      reinterpret_cast<float*>(record + Record<K>::decay)[thread] = exp2_fast(sum);
    }
    if (thread < 64) reinterpret_cast<float*>(record + Record<K>::beta)[thread] = s.tokens.beta[thread];
    group_sync<threads>(barrier);

    // Products of block rows I with blocks J <= I. Task: (I, q or k).
    constexpr int tasks = 8 / warps > 0 ? 8 / warps : 1;
    float acc[tasks][4][2][4];
#pragma unroll
    for (int n = 0; n < tasks; ++n) {
      const int task = warp + n * warps, i = task < 4 ? task : 7 - task;
      const bool is_q = task < 4;
      const std::uint32_t left = shared_address(is_q ? s.q : s.k) + i * 32 * K;
      const std::uint32_t far_left = shared_address(is_q ? s.far_q : s.far_k);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[n][j][0][e] = acc[n][j][1][e] = 0.0f;
      }
#pragma unroll
      for (int x = 0; x < K; x += 16) {
        const int a_at = block_offset<K>(0, x, lane), b_at = block_offset_right<K>(0, x, lane);
        std::uint32_t a[4], far[4];
        load_matrices(a, left + a_at);
        if (i == 3) load_matrices(far, far_left + a_at);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (j > i) break;
          const bool over_middle = j < 2 && i >= 2;
          const std::uint32_t right = j == i                  ? shared_address(s.own_key) + j * 32 * K
                                      : j == 0 && over_middle ? shared_address(s.far_key)
                                                              : shared_address(s.f) + j * 32 * K;
          std::uint32_t b[4];
          load_matrices(b, right + b_at);
          if (j < 2 && i == 3) {
            mma(acc[n][j][0], far, b[0], b[1]);
            mma(acc[n][j][1], far, b[2], b[3]);
          } else {
            mma(acc[n][j][0], a, b[0], b[1]);
            mma(acc[n][j][1], a, b[2], b[3]);
          }
        }
      }
    }
    group_sync<threads>(barrier);
#pragma unroll
    for (int n = 0; n < tasks; ++n) {
      const int task = warp + n * warps, i = task < 4 ? task : 7 - task;
      const bool is_q = task < 4;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if ((j > i && !is_q) || (j == i && s.tokens.exact[i])) continue;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int e = 0; e < 4; e += 2) {
            const int r = lane / 4 + 4 * e, column = 8 * h + lane % 4 * 2;  // in the block
            float x = acc[n][j][h][e], y = acc[n][j][h][e + 1];
            if (j == i) {
              x = column < r || (is_q && column == r) ? x : 0.0f;
              y = column + 1 < r || (is_q && column + 1 == r) ? y : 0.0f;
            }
            if (is_q) {
              *reinterpret_cast<std::uint32_t*>(aqk + i * 32 * chunk_tokens + piece_offset<chunk_tokens>(r, 2 * j + h) +
                                                lane % 4 * 4) = pack(x, y);
            } else {
              *reinterpret_cast<float2*>(s.l + (16 * i + r) * square_row + 16 * j + column) = {-x, -y};
            }
          }
        }
      }
    }
    for (int block = 0; block < 4; ++block) {
      if (s.tokens.exact[block]) exact_block<K>(p, at, s, block, own, now, aqk, thread, barrier);
    }
    group_sync<threads>(barrier);
    index = work.after(index);
    const bool more = index < count;
    if (more) fetch<K>(p, place(index), s, thread, ahead);
    invert<K>(s, thread, barrier);
    for (int task = thread; task < 512; task += threads) {
      const int r = task / 8, piece = task % 8;
      uint4 packed = {};  // above the diagonal
      if (piece / 2 <= r / 16) {
        const float4 x = quad(s.l + r * square_row + piece * 8), y = quad(s.l + r * square_row + piece * 8 + 4);
        packed = {pack(x.x, x.y), pack(x.z, x.w), pack(y.x, y.y), pack(y.z, y.w)};
      }
      *reinterpret_cast<uint4*>(record + Record<K>::a + piece_offset<chunk_tokens>(r, piece)) = packed;
    }
    if (!more) break;
  }
  if (written != nullptr) {
    group_sync<threads>(barrier);
    if (threadIdx.x % threads == 0) set_flag(written);
  }
}

template <int K>
cudaError_t launch(const Problem& p, void* records, const Pace& pace, cudaStream_t stream) {
  constexpr int shared = groups<K> * static_cast<int>(sizeof(Shared<K>)), threads = 2 * K * groups<K>;
  static_assert(shared <= 232448);
  const cudaError_t set = cudaFuncSetAttribute(prepare_kernel<K>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (set != cudaSuccess) return set;
  const int count = static_cast<int>(p.head_chunks()), most = processors(),
            blocks = (count + groups<K> - 1) / groups<K>;
  prepare_kernel<K><<<static_cast<unsigned>(blocks < most ? blocks : most), threads, shared, stream>>>(
      p, pace, p.chunks(), count, static_cast<std::uint8_t*>(records));
  return cudaGetLastError();
}

}  // namespace

int prepared_at_once(int head_dim) { return processors() * (head_dim == 128 ? groups<128> : groups<64>); }

cudaError_t prepare(const Problem& p, void* records, const Pace& pace, cudaStream_t stream) {
  return p.head_dim == 128 ? launch<128>(p, records, pace, stream) : launch<64>(p, records, pace, stream);
}

}  // namespace deltapipe::kernels::cuda::kda
