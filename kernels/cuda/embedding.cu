#include "kernels/cuda/launches.h"
#include "kernels/cuda/vector.cuh"

namespace deltapipe::kernels::cuda {
namespace {

constexpr int gather_warps = 8;
constexpr int gather_packs = 5;  // that a thread has in flight

/// One warp a token.
template <class T, bool aligned>
__global__ void __launch_bounds__(32 * gather_warps)
    gather(const std::int32_t* tokens, const T* table, T* out, std::int64_t length, std::int64_t vocabulary,
           std::int64_t d) {
  constexpr int width = pack_width<T>;
  const std::int64_t t = static_cast<std::int64_t>(blockIdx.x) * gather_warps + threadIdx.y;
  if (t >= length) return;
  const std::int64_t token = tokens[t];
  const bool known = token >= 0 && token < vocabulary;
  const T* row = table + (known ? token : 0) * d;
  for (std::int64_t first = threadIdx.x * width; first < d; first += gather_packs * 32 * width) {
    Pack<T, width> v[gather_packs];
#pragma unroll
    for (int u = 0; u < gather_packs; ++u) {
      const std::int64_t at = first + u * 32 * width;
      if (at < d) v[u].template load<aligned>(row + at, d - at < width ? static_cast<int>(d - at) : width);
    }
#pragma unroll
    for (int u = 0; u < gather_packs; ++u) {
      const std::int64_t at = first + u * 32 * width;
      if (at >= d) break;
      if (!known) {
#pragma unroll
        for (std::uint32_t& w : v[u].words) w = 0xffffffffu;  // NaN: a token outside the table is seen
      }
      v[u].template store<aligned>(out + t * d + at, d - at < width ? static_cast<int>(d - at) : width);
    }
  }
}

// Backward. A block owns a bucket of tokens, by a hash of their number, and a tile of columns. It looks through the ids
// once, lists the places of its tokens in order and adds their rows: a row of the table has one owner, its sum one
// order, and nothing is sorted. The ids stay in the caches while every block reads them.
constexpr int scatter_warps = 8, scatter_threads = 32 * scatter_warps;
constexpr int scatter_width = 8;                  // columns of a thread, whatever the type
constexpr int tile_columns = 32 * scatter_width;  // of a block: a warp has them all
constexpr int buckets_log2 = 8;                   // 256: about 128 places a block at 32,768 tokens
constexpr int ids_each = 8;                       // that a thread looks at in a turn
constexpr int turn = scatter_threads * ids_each;  // ids
constexpr int most_places = turn + 2048;          // of a list: it is worked off when another turn might not fit
constexpr int many = 32;                          // rows of one token that all warps share
/// Rows of a token that a thread has in flight.
template <class T>
inline constexpr int in_flight = 8 / static_cast<int>(sizeof(T));

struct Scatter {
  std::int32_t place[most_places], token[most_places];
  float sums[scatter_warps][tile_columns];
  int counts[scatter_warps];
  // Entries where tokens first occur: of fewer than `many` rows, twice the entry and 1 for more than one; the others.
  std::uint16_t first[most_places], frequent[most_places / many + 1];
  int first_count, frequent_count;
};

/// The bucket of a token: the upper bits of a multiplicative hash (Knuth's constant, 2^32 over the golden ratio).
__device__ __forceinline__ std::uint32_t bucket_of(std::int32_t token) {
  return (static_cast<std::uint32_t>(token) * 2654435769u) >> (32 - buckets_log2);
}

template <class T, bool aligned>
struct Columns {
  const T* dout;
  float* dtable;
  std::int64_t d, first;  // first column of the thread
  int count;              // not positive: none

  /// Adds rows of dout in the order of `next()`, which gives an entry of the list or -1.
  template <class Next>
  __device__ __forceinline__ void add_rows(const Scatter& list, Next&& next, float (&sum)[scatter_width]) const {
    bool more = true;
    while (more) {
      Pack<T, scatter_width> rows[in_flight<T>];
      bool there[in_flight<T>];
#pragma unroll
      for (int u = 0; u < in_flight<T>; ++u) {
        const int entry = more ? next() : -1;
        more = entry >= 0;
        there[u] = more && count > 0;
        if (there[u]) rows[u].template load<aligned>(dout + list.place[entry] * d + first, count);
      }
#pragma unroll
      for (int u = 0; u < in_flight<T>; ++u) {
        if (!there[u]) continue;
        float v[scatter_width];
        rows[u].get(v);
#pragma unroll
        for (int j = 0; j < scatter_width; ++j) sum[j] += v[j];
      }
    }
  }
  __device__ __forceinline__ void read_row(std::int32_t place, Pack<T, scatter_width>& row) const {
    if (count > 0) row.template load<aligned>(dout + place * d + first, count);
  }
  __device__ __forceinline__ void read_table(std::int32_t token, Pack<float, scatter_width>& row) const {
    if (count > 0) row.template load<aligned>(dtable + token * d + first, count);
  }
  /// `row` as read_table gave it.
  __device__ __forceinline__ void add_to_table(std::int32_t token, Pack<float, scatter_width>& row,
                                               const float (&sum)[scatter_width]) const {
    if (count <= 0) return;
    float v[scatter_width];
    row.get(v);
#pragma unroll
    for (int j = 0; j < scatter_width; ++j) v[j] += sum[j];
    row.set(v);
    row.template store<aligned>(dtable + token * d + first, count);
  }
};

/// Entries of a list [0, size) that hold `token`, from entry `at` on, in order; a warp asks together.
struct Occurrences {
  const Scatter& list;
  std::int32_t token;
  int size, lane, at;      // `at`: first entry of the 32 in `mask`
  std::uint32_t mask = 0;  // of those not given yet
  __device__ __forceinline__ Occurrences(const Scatter& l, std::int32_t t, int n, int from)
      : list(l), token(t), size(n), lane(static_cast<int>(threadIdx.x) % 32), at(from) {
    look();
  }
  __device__ __forceinline__ void look() {
    mask = __ballot_sync(0xffffffffu, at + lane < size && list.token[at + lane] == token);
  }
  __device__ __forceinline__ int operator()() {
    while (mask == 0) {
      at += 32;
      if (at >= size) return -1;
      look();
    }
    const int bit = __ffs(static_cast<int>(mask)) - 1;
    mask &= mask - 1;
    return at + bit;
  }
};

/// Whether no entry before `entry` holds its token.
__device__ __forceinline__ bool is_first(const Scatter& list, int entry, std::int32_t token) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int at = 0; at < entry; at += 32) {
    if (__any_sync(0xffffffffu, at + lane < entry && list.token[at + lane] == token)) return false;
  }
  return true;
}

/// Adds the rows of a list's places to the table. All threads call, after a barrier.
template <class T, bool aligned>
__device__ void work_off(Scatter& list, int size, const Columns<T, aligned>& columns) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x == 0) list.first_count = list.frequent_count = 0;
  __syncthreads();
  // Where tokens first occur, a warp an entry; the order of what is found does not matter.
  for (int entry = warp; entry < size; entry += scatter_warps) {
    const std::int32_t token = list.token[entry];
    if (!is_first(list, entry, token)) continue;
    int rows = 0;
    for (int at = entry; at < size; at += 32) {
      rows += __popc(__ballot_sync(0xffffffffu, at + lane < size && list.token[at + lane] == token));
    }
    if (lane != 0) continue;
    if (rows >= many) {
      list.frequent[atomicAdd(&list.frequent_count, 1)] = static_cast<std::uint16_t>(entry);
    } else {
      list.first[atomicAdd(&list.first_count, 1)] = static_cast<std::uint16_t>(2 * entry + (rows > 1 ? 1 : 0));
    }
  }
  __syncthreads();
  // A warp a token, the next one's rows on their way.
  Pack<T, scatter_width> next_row;
  Pack<float, scatter_width> next_old;
  int next = 0;
  const auto fetch = [&](int i) {
    if (i >= list.first_count) return;
    next = list.first[i];
    columns.read_row(list.place[next / 2], next_row);
    columns.read_table(list.token[next / 2], next_old);
  };
  fetch(warp);
  for (int i = warp; i < list.first_count; i += scatter_warps) {
    const int entry = next / 2;
    const bool others = next % 2 == 1;
    const Pack<T, scatter_width> row = next_row;
    Pack<float, scatter_width> old = next_old;
    fetch(i + scatter_warps);
    const std::int32_t token = list.token[entry];
    float sum[scatter_width];
    row.get(sum);
    if (others) columns.add_rows(list, Occurrences(list, token, size, entry + 1), sum);
    columns.add_to_table(token, old, sum);
  }
  // Tokens of many rows: each warp adds those in its part of the list, the parts are added in order.
  const int part = (size + scatter_warps - 1) / scatter_warps;
  const int begin = warp * part, end = begin + part < size ? begin + part : size;
  for (int i = 0; i < list.frequent_count; ++i) {
    const std::int32_t token = list.token[list.frequent[i]];
    float sum[scatter_width] = {};
    if (begin < end) columns.add_rows(list, Occurrences(list, token, end, begin), sum);
#pragma unroll
    for (int j = 0; j < scatter_width; ++j) list.sums[warp][lane + 32 * j] = sum[j];
    __syncthreads();
    if (warp == i % scatter_warps) {
      Pack<float, scatter_width> row;
      columns.read_table(token, row);
#pragma unroll
      for (int j = 0; j < scatter_width; ++j) {
        sum[j] = list.sums[0][lane + 32 * j];
        for (int w = 1; w < scatter_warps; ++w) sum[j] += list.sums[w][lane + 32 * j];
      }
      columns.add_to_table(token, row, sum);
    }
    __syncthreads();
  }
}

template <class T, bool aligned>
__global__ void __launch_bounds__(scatter_threads, 3)
    scatter(const T* dout, const std::int32_t* tokens, float* dtable, std::int64_t length, std::int64_t vocabulary,
            std::int64_t d, int tiles) {
  extern __shared__ char memory[];
  Scatter& list = *reinterpret_cast<Scatter*>(memory);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const auto bucket = static_cast<std::uint32_t>(blockIdx.x) / static_cast<std::uint32_t>(tiles);
  const std::int64_t first =
      (blockIdx.x - static_cast<std::int64_t>(bucket) * tiles) * tile_columns + lane * scatter_width;
  const Columns<T, aligned> columns{dout, dtable, d, first,
                                    static_cast<int>(d - first < scatter_width ? d - first : scatter_width)};
  int size = 0;
  std::int32_t next[ids_each];
  // A warp looks at 256 ids that follow each other, a lane at every 32nd.
  const auto fetch = [&](std::int64_t begin) {
    const std::int64_t from = begin + warp * (32 * ids_each) + lane;
#pragma unroll
    for (int k = 0; k < ids_each; ++k) next[k] = from + 32 * k < length ? tokens[from + 32 * k] : -1;
  };
  fetch(0);
  for (std::int64_t begin = 0; begin < length; begin += turn) {
    const std::int64_t from = begin + warp * (32 * ids_each) + lane;
    std::int32_t id[ids_each];
#pragma unroll
    for (int k = 0; k < ids_each; ++k) id[k] = next[k];
    fetch(begin + turn);
    std::uint32_t match[ids_each];
    int found = 0;
#pragma unroll
    for (int k = 0; k < ids_each; ++k) {
      match[k] = __ballot_sync(0xffffffffu, id[k] >= 0 && id[k] < vocabulary && bucket_of(id[k]) == bucket);
      found += __popc(match[k]);
    }
    if (lane == 0) list.counts[warp] = found;
    __syncthreads();
    int at = size;
    for (int w = 0; w < scatter_warps; ++w) {
      if (w < warp) at += list.counts[w];
      size += list.counts[w];
    }
#pragma unroll
    for (int k = 0; k < ids_each; ++k) {
      if (match[k] >> lane & 1) {
        const int entry = at + __popc(match[k] & ((1u << lane) - 1));
        list.place[entry] = static_cast<std::int32_t>(from + 32 * k);
        list.token[entry] = id[k];
      }
      at += __popc(match[k]);
    }
    __syncthreads();
    if (size > most_places - turn || begin + turn >= length) {
      work_off(list, size, columns);
      size = 0;
      fetch(begin + turn);  // again: they need not be kept while rows are added
    }
  }
}

}  // namespace

template <class T>
cudaError_t embedding_forward(const std::int32_t* tokens, const T* table, T* out, std::int64_t length,
                              std::int64_t vocabulary, std::int64_t d, cudaStream_t stream) {
  if (length == 0 || d == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>((length + gather_warps - 1) / gather_warps);
  const dim3 threads(32, gather_warps);
  if (d % pack_width<T> == 0 && all_aligned(table, out)) {
    gather<T, true><<<blocks, threads, 0, stream>>>(tokens, table, out, length, vocabulary, d);
  } else {
    gather<T, false><<<blocks, threads, 0, stream>>>(tokens, table, out, length, vocabulary, d);
  }
  return cudaGetLastError();
}
template cudaError_t embedding_forward(const std::int32_t*, const Bits*, Bits*, std::int64_t, std::int64_t,
                                       std::int64_t, cudaStream_t);
template cudaError_t embedding_forward(const std::int32_t*, const float*, float*, std::int64_t, std::int64_t,
                                       std::int64_t, cudaStream_t);

template <class T>
cudaError_t embedding_backward(const T* dout, const std::int32_t* tokens, float* dtable, std::int64_t length,
                               std::int64_t vocabulary, std::int64_t d, cudaStream_t stream) {
  if (length == 0 || d == 0) return cudaSuccess;
  const auto tiles = static_cast<int>((d + tile_columns - 1) / tile_columns);
  const auto launch = [&](auto kernel) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(sizeof(Scatter)));
    if (status != cudaSuccess) return status;
    kernel<<<static_cast<unsigned>(tiles) << buckets_log2, scatter_threads, sizeof(Scatter), stream>>>(
        dout, tokens, dtable, length, vocabulary, d, tiles);
    return cudaGetLastError();
  };
  return d % scatter_width == 0 && all_aligned(dout, dtable) ? launch(scatter<T, true>) : launch(scatter<T, false>);
}
template cudaError_t embedding_backward(const Bits*, const std::int32_t*, float*, std::int64_t, std::int64_t,
                                        std::int64_t, cudaStream_t);
template cudaError_t embedding_backward(const float*, const std::int32_t*, float*, std::int64_t, std::int64_t,
                                        std::int64_t, cudaStream_t);

}  // namespace deltapipe::kernels::cuda
