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

// Backward. A block owns a bucket of tokens and a tile of columns. It looks through the ids once, lists the places of
// the bucket's tokens, brings each token's together in order, and adds their rows. A row of the table has one owner and
// its sum one order. The ids stay in the caches while every block reads them.
constexpr int scatter_warps = 8, scatter_threads = 32 * scatter_warps;
constexpr int scatter_width = 4, scatter_groups = 4;  // neighbouring columns of a thread, and how often
constexpr int group_columns = 32 * scatter_width;     // of a warp
constexpr int tile_columns = scatter_groups * group_columns;
constexpr int fewest_buckets_log2 = 8;             // 256: about 128 places a block at 32,768 tokens
constexpr int most_members = 2 * scatter_threads;  // tokens of a bucket
constexpr int most_places = 16 * scatter_threads;  // of the list
constexpr int many = 16;                           // rows of one token that all warps share
constexpr int ids_each = 128;                      // that a thread looks at in a turn
constexpr int few_ids_each = 16;                   // in one whose places may not all fit
static_assert(few_ids_each * scatter_threads <= most_places);

struct Scatter {
  union {
    struct {
      std::int32_t place[most_places];    // as found
      std::uint16_t member[most_places];  // of the place's token; most_members where there is none
    };
    float sums[scatter_warps][tile_columns];  // once places are sorted
  };
  std::uint16_t count[scatter_warps][most_members];               // of a warp's places; then where its next one goes
  std::int32_t sorted[most_places];                               // places by member, then in the order found
  std::uint16_t begin[most_members + 1];                          // of a member's
  std::uint16_t few[most_members], frequent[most_places / many];  // members of fewer than `many` rows; the others
  std::uint32_t totals[scatter_warps];
};

/// Tokens of a bucket agree in the lower bits, mixed with the upper ones, which are the member's number.
struct Bucket {
  std::uint32_t number;
  int log2;
  __device__ __forceinline__ bool has(std::int32_t token) const {
    const auto t = static_cast<std::uint32_t>(token);
    return ((t ^ (t >> log2) ^ number) & ((1u << log2) - 1)) == 0;
  }
  __device__ __forceinline__ std::uint16_t member(std::int32_t token) const {
    return static_cast<std::uint16_t>(token >> log2);
  }
  __device__ __forceinline__ std::int64_t token(std::uint32_t member) const {
    return member << log2 | ((member ^ number) & ((1u << log2) - 1));
  }
};

/// A thread's columns of rows of dout and of the table.
template <class T, bool aligned>
struct Columns {
  const T* dout;
  float* dtable;
  std::int64_t d, first;
  using Row = Pack<T, scatter_width>[scatter_groups];
  using TableRow = Pack<float, scatter_width>[scatter_groups];
  using Sum = float[scatter_groups][scatter_width];

  /// That exist of a group's; not positive: none.
  __device__ __forceinline__ int count(int group) const {
    const std::int64_t left = d - first - group * group_columns;
    return left < scatter_width ? static_cast<int>(left) : scatter_width;
  }
  __device__ __forceinline__ void read(std::int32_t place, Row& row) const {
#pragma unroll
    for (int g = 0; g < scatter_groups; ++g) {
      if (count(g) > 0) row[g].template load<aligned>(dout + place * d + first + g * group_columns, count(g));
    }
  }
  __device__ __forceinline__ void read_table(std::int64_t token, TableRow& row) const {
#pragma unroll
    for (int g = 0; g < scatter_groups; ++g) {
      if (count(g) > 0) row[g].template load<aligned>(dtable + token * d + first + g * group_columns, count(g));
    }
  }
  /// `row` as read_table gave it.
  __device__ __forceinline__ void add_to_table(std::int64_t token, const TableRow& row, const Sum& sum) const {
#pragma unroll
    for (int g = 0; g < scatter_groups; ++g) {
      if (count(g) <= 0) continue;
      float v[scatter_width];
      row[g].get(v);
#pragma unroll
      for (int j = 0; j < scatter_width; ++j) v[j] += sum[g][j];
      float* const to = dtable + token * d + first + g * group_columns;
      if constexpr (aligned) {
        asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "f"(v[0]),
                     "f"(v[1]), "f"(v[2]), "f"(v[3])
                     : "memory");
      } else {
#pragma unroll
        for (int j = 0; j < scatter_width; ++j) {
          if (j < count(g)) to[j] = v[j];
        }
      }
    }
  }
  __device__ __forceinline__ void add(const Row& row, Sum& sum) const {
#pragma unroll
    for (int g = 0; g < scatter_groups; ++g) {
      if (count(g) <= 0) continue;
      float v[scatter_width];
      row[g].get(v);
#pragma unroll
      for (int j = 0; j < scatter_width; ++j) sum[g][j] += v[j];
    }
  }
  /// Adds the rows of places [begin, end), `in_flight` on their way at a time.
  template <int in_flight>
  __device__ __forceinline__ void add_rows(const std::int32_t* begin, const std::int32_t* end, Sum& sum) const {
    for (; begin < end; begin += in_flight) {
      Row rows[in_flight];
#pragma unroll
      for (int u = 0; u < in_flight; ++u) {
        if (begin + u < end) read(begin[u], rows[u]);
      }
#pragma unroll
      for (int u = 0; u < in_flight; ++u) {
        if (begin + u < end) add(rows[u], sum);
      }
    }
  }
};

/// A number's sum over the threads before this one, and over all, which goes to `all`. All threads call; one barrier.
__device__ __forceinline__ std::uint32_t sum_before(Scatter& list, std::uint32_t own, std::uint32_t& all) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  std::uint32_t until = own;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const std::uint32_t other = __shfl_up_sync(0xffffffffu, until, offset);
    if (lane >= offset) until += other;
  }
  if (lane == 31) list.totals[warp] = until;
  __syncthreads();
  all = 0;
  std::uint32_t before = until - own;
#pragma unroll
  for (int w = 0; w < scatter_warps; ++w) {
    const std::uint32_t total = list.totals[w];
    if (w < warp) before += total;
    all += total;
  }
  return before;
}

/// Lists the places in [begin, begin + threads * each) and below `length` of ids that are in the bucket, if they fit;
/// gives their number. All threads call; two barriers, the second if they fit.
template <int each>
__device__ __forceinline__ int collect(Scatter& list, const std::int32_t* tokens, std::int64_t begin,
                                       std::int64_t length, bool vectors, const Bucket& bucket) {
  const auto thread = static_cast<int>(threadIdx.x);
  const auto other = static_cast<std::int32_t>(bucket.number ^ 1);  // an id of another bucket
  constexpr int words = (each + 31) / 32, of_word = each / 4 / words;
  /// Place of the first of a thread's group of four neighbouring ids.
  const auto place_of = [&](int group) { return begin + (group * scatter_threads + thread) * 4; };
  std::uint32_t matches[words] = {}, found = 0;
#pragma unroll
  for (int w = 0; w < words; ++w) {
    int4 ids[of_word];
    if (vectors && place_of((w + 1) * of_word) - thread * 4 <= length) {
#pragma unroll
      for (int k = 0; k < of_word; ++k) ids[k] = *reinterpret_cast<const int4*>(tokens + place_of(w * of_word + k));
    } else {
#pragma unroll
      for (int k = 0; k < of_word; ++k) {
        const std::int64_t place = place_of(w * of_word + k);
        ids[k].x = place < length ? tokens[place] : other;
        ids[k].y = place + 1 < length ? tokens[place + 1] : other;
        ids[k].z = place + 2 < length ? tokens[place + 2] : other;
        ids[k].w = place + 3 < length ? tokens[place + 3] : other;
      }
    }
#pragma unroll
    for (int k = 0; k < of_word; ++k) {
      const std::int32_t of_group[4] = {ids[k].x, ids[k].y, ids[k].z, ids[k].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) matches[w] |= bucket.has(of_group[j]) ? 1u << (4 * k + j) : 0;
    }
    found += static_cast<std::uint32_t>(__popc(matches[w]));
    asm volatile("" ::: "memory");  // no more loads at a time than registers hold
  }
  std::uint32_t all = 0, entry = sum_before(list, found, all);
  if (all > most_places) return static_cast<int>(all);
#pragma unroll
  for (int w = 0; w < words; ++w) {
    for (std::uint32_t left = matches[w]; left != 0; left &= left - 1) {
      const int bit = __ffs(static_cast<int>(left)) - 1;
      list.place[entry++] = static_cast<std::int32_t>(place_of(w * of_word + bit / 4) + bit % 4);
    }
  }
  __syncthreads();
  return static_cast<int>(all);
}

/// Sorts the listed places by member into list.sorted, and lists the members. Gives how many of these have few rows,
/// and many. Tokens outside the table are left out. All threads call; a barrier comes last.
__device__ __forceinline__ int2 sort(Scatter& list, int size, const std::int32_t* tokens, std::int64_t vocabulary,
                                     const Bucket& bucket) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  std::uint16_t* const count = list.count[warp];
  for (int i = lane; i < most_members / 2; i += 32) reinterpret_cast<std::uint32_t*>(count)[i] = 0;
  const int part = (size + scatter_threads - 1) / scatter_threads * 32;  // of a warp
  const int first = warp * part, end = first + part < size ? first + part : size;
  for (int i = first + lane; i < end; i += 32) {
    const std::int32_t token = tokens[list.place[i]];
    list.member[i] = token >= 0 && token < vocabulary ? bucket.member(token) : most_members;
  }
  __syncwarp();
  /// f(entry, the member's count before it) for the warp's entries in order; the counts go up.
  const auto walk = [&](const auto& f) {
    for (int i = first; i < end; i += 32) {
      const int member = i + lane < end ? list.member[i + lane] : most_members;
      const bool there = member < most_members;
      const std::uint32_t same = __match_any_sync(0xffffffffu, member);
      const int rank = __popc(same & ((1u << lane) - 1));
      const int before = there ? count[member] : 0;
      if (there) f(i + lane, before + rank);
      __syncwarp();
      if (there && rank == 0) count[member] = static_cast<std::uint16_t>(before + __popc(same));
      __syncwarp();
    }
  };
  walk([](int, int) {});
  __syncthreads();
  // A thread adds up the warps' counts of two members, then the block those of all: places, members of few rows and of
  // many, in one number.
  constexpr int few_bit = 13, frequent_bit = 23;
  static_assert(most_places < 1 << few_bit && most_members < 1 << (frequent_bit - few_bit) &&
                most_places / many < 1 << (32 - frequent_bit));
  std::uint32_t own[2];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    std::uint32_t rows = 0;
    for (const auto& of_warp : list.count) rows += of_warp[2 * thread + k];
    own[k] = rows == 0 ? 0 : rows | (rows < many ? 1u << few_bit : 1u << frequent_bit);
  }
  std::uint32_t total = 0, at = sum_before(list, own[0] + own[1], total);
  const auto places = [](std::uint32_t x) { return x & ((1u << few_bit) - 1); };
  const auto few = [](std::uint32_t x) { return x >> few_bit & ((1u << (frequent_bit - few_bit)) - 1); };
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int member = 2 * thread + k;
    list.begin[member] = static_cast<std::uint16_t>(places(at));
    std::uint32_t next = places(at);
    for (auto& of_warp : list.count) {
      const std::uint32_t rows = of_warp[member];
      of_warp[member] = static_cast<std::uint16_t>(next);
      next += rows;
    }
    if (few(own[k]) != 0) list.few[few(at)] = static_cast<std::uint16_t>(member);
    if (own[k] >> frequent_bit != 0) list.frequent[at >> frequent_bit] = static_cast<std::uint16_t>(member);
    at += own[k];
  }
  if (thread == scatter_threads - 1) list.begin[most_members] = static_cast<std::uint16_t>(places(total));
  __syncthreads();
  walk([&](int entry, int to) { list.sorted[to] = list.place[entry]; });
  __syncthreads();
  return make_int2(static_cast<int>(few(total)), static_cast<int>(total >> frequent_bit));
}

/// Adds the rows of a sorted list to the table.
template <class T, bool aligned>
__device__ __forceinline__ void work_off(Scatter& list, int2 members, const Bucket& bucket,
                                         const Columns<T, aligned>& columns) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  using C = Columns<T, aligned>;
  // A warp a token, the next one's first row and the table's on their way.
  typename C::Row next_row;
  typename C::TableRow next_old;
  const auto fetch = [&](int i) {
    if (i >= members.x) return;
    const int member = list.few[i];
    columns.read(list.sorted[list.begin[member]], next_row);
    columns.read_table(bucket.token(member), next_old);
  };
  fetch(warp);
  for (int i = warp; i < members.x; i += scatter_warps) {
    const int member = list.few[i], begin = list.begin[member], end = list.begin[member + 1];
    typename C::Sum sum = {};
    columns.add(next_row, sum);
    typename C::TableRow old;
#pragma unroll
    for (int g = 0; g < scatter_groups; ++g) old[g] = next_old[g];
    fetch(i + scatter_warps);
    columns.template add_rows<2>(list.sorted + begin + 1, list.sorted + end, sum);
    columns.add_to_table(bucket.token(member), old, sum);
  }
  // Tokens of many rows: each warp adds a part of them, the parts are added in order, two columns a thread.
  for (int i = 0; i < members.y; ++i) {
    const int member = list.frequent[i], begin = list.begin[member], end = list.begin[member + 1];
    const int part = (end - begin + scatter_warps - 1) / scatter_warps;
    typename C::Sum sum = {};
    const int from = begin + warp * part;
    columns.template add_rows<8 / static_cast<int>(sizeof(T))>(
        list.sorted + from, list.sorted + (from + part < end ? from + part : end), sum);
#pragma unroll
    for (int g = 0; g < scatter_groups; ++g) {
      *reinterpret_cast<float4*>(&list.sums[warp][g * group_columns + lane * scatter_width]) =
          make_float4(sum[g][0], sum[g][1], sum[g][2], sum[g][3]);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < tile_columns / scatter_threads; ++k) {
      const int column = thread + k * scatter_threads;
      float of_all = list.sums[0][column];
      for (int w = 1; w < scatter_warps; ++w) of_all += list.sums[w][column];
      const std::int64_t at = columns.first - lane * scatter_width + column;
      if (at < columns.d) columns.dtable[bucket.token(member) * columns.d + at] += of_all;
    }
    __syncthreads();
  }
}

template <class T, bool aligned>
__global__ void __launch_bounds__(scatter_threads, 2)
    scatter(const T* dout, const std::int32_t* tokens, float* dtable, int length, std::int64_t vocabulary,
            std::int64_t d, int tiles, int buckets_log2) {
  extern __shared__ char memory[];
  Scatter& list = *reinterpret_cast<Scatter*>(memory);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const Bucket bucket{static_cast<std::uint32_t>(blockIdx.x) / static_cast<std::uint32_t>(tiles), buckets_log2};
  const std::int64_t tile = blockIdx.x - static_cast<std::int64_t>(bucket.number) * tiles;
  const Columns<T, aligned> columns{dout, dtable, d, tile * tile_columns + lane * scatter_width};
  const bool vectors = reinterpret_cast<std::uintptr_t>(tokens) % 16 == 0;
  const auto add = [&](int size) {
    if (size == 0) return;
    const int2 members = sort(list, size, tokens, vocabulary, bucket);
    work_off(list, members, bucket, columns);
    __syncthreads();
  };
  for (std::int64_t begin = 0; begin < length; begin += ids_each * scatter_threads) {
    const int size = collect<ids_each>(list, tokens, begin, length, vectors, bucket);
    if (size <= most_places) {
      add(size);
      continue;
    }
    const std::int64_t end = begin + ids_each * scatter_threads < length ? begin + ids_each * scatter_threads : length;
    for (std::int64_t from = begin; from < end; from += few_ids_each * scatter_threads) {
      __syncthreads();
      add(collect<few_ids_each>(list, tokens, from, end, vectors, bucket));
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
  int buckets_log2 = fewest_buckets_log2;
  while (((vocabulary - 1) >> buckets_log2) >= most_members) ++buckets_log2;
  const auto launch = [&](auto kernel) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(sizeof(Scatter)));
    if (status != cudaSuccess) return status;
    kernel<<<static_cast<unsigned>(tiles) << buckets_log2, scatter_threads, sizeof(Scatter), stream>>>(
        dout, tokens, dtable, static_cast<int>(length), vocabulary, d, tiles, buckets_log2);
    return cudaGetLastError();
  };
  return d % scatter_width == 0 && all_aligned(dout, dtable) ? launch(scatter<T, true>) : launch(scatter<T, false>);
}
template cudaError_t embedding_backward(const Bits*, const std::int32_t*, float*, std::int64_t, std::int64_t,
                                        std::int64_t, cudaStream_t);
template cudaError_t embedding_backward(const float*, const std::int32_t*, float*, std::int64_t, std::int64_t,
                                        std::int64_t, cudaStream_t);

}  // namespace deltapipe::kernels::cuda
