#include "kernels/attention.h"

#include "kernels/cpu/common.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/vector_math.h"
#include "kernels/elementwise.h"

#include <algorithm>
#include <limits>

// Queries are cut into blocks; keys into blocks of the same size, laid so that key block j ends where query block j
// ends (the prefix before the first query has negative j). So only blocks with j <= i concern query block i and only
// j == i crosses the diagonal.
namespace deltapipe::kernels::cpu {
namespace {

/// Queries and keys a block: a block of scores (16 KiB in float) and its operands stay in the second-level cache.
constexpr std::int64_t block = 64;

/// Sizes of a call, and which keys its blocks see.
struct Geometry {
  std::int64_t queries, keys, heads, kv_heads, d;
  const std::int32_t* start;

  Geometry(const Tensor& q, const Tensor& k, const Tensor& starts)
      : queries(q.dim(0)),
        keys(k.dim(0)),
        heads(q.dim(1)),
        kv_heads(k.dim(1)),
        d(q.dim(2)),
        start(starts.as<std::int32_t>()) {}

  std::int64_t group() const { return heads / kv_heads; }
  std::int64_t query_blocks() const { return (queries + block - 1) / block; }
  /// Key index of query 0.
  std::int64_t offset() const { return keys - queries; }
  /// Distance between a head's rows of two neighbouring tokens.
  std::int64_t q_stride() const { return heads * d; }
  std::int64_t kv_stride() const { return kv_heads * d; }
  std::int64_t first_key(std::int64_t query) const { return std::max<std::int64_t>(start[query], 0); }
  /// Lowest key block that query block i sees.
  std::int64_t first_key_block(std::int64_t i) const {
    const std::int64_t distance = first_key(i * block) - offset();
    return distance >= 0 ? distance / block : -((-distance + block - 1) / block);
  }

  void check_start() const {
    for (std::int64_t i = 0; i < queries; ++i) {
      if (start[i] > offset() + i || (i > 0 && start[i] < start[i - 1])) {
        fail<InternalError>("attention: start[{}] is {}, expected at most {} and at least its predecessor", i, start[i],
                            offset() + i);
      }
    }
  }
};

/// The part of query block i x key block j that has visible pairs: whole rows and columns without any are cut off.
/// Starts never fall, so these are later queries (whose document begins after block j) and earlier keys.
struct Tile {
  std::int64_t q0, rows;  // queries [q0, q0 + rows)
  std::int64_t k0, cols;  // keys [k0, k0 + cols)
  const std::int32_t* start;
  std::int64_t offset;

  Tile(const Geometry& g, std::int64_t i, std::int64_t j) : start(g.start), offset(g.offset()) {
    q0 = i * block;
    k0 = std::max(offset + j * block, g.first_key(q0));
    const std::int64_t k1 = std::min(offset + (j + 1) * block, g.keys);
    cols = k1 - k0;
    const auto* begin = g.start + q0;
    rows = std::lower_bound(begin, g.start + std::min(q0 + block, g.queries), k1) - begin;
  }
  /// Columns [low, high) that row r sees; at least one.
  std::int64_t low(std::int64_t r) const { return std::max<std::int64_t>(start[q0 + r] - k0, 0); }
  std::int64_t high(std::int64_t r) const { return std::min(cols, offset + q0 + r + 1 - k0); }
};

/// One block of query rows of one head: running maximum and sum of the softmax.
template <class T>
struct RunningSoftmax {
  alignas(64) T maximum[block];
  alignas(64) T sum[block];

  /// Turns row r of scores into exp(score - maximum), zero where not visible, and scales the output row (d values, not
  /// read when first) to the new maximum.
  void take(T* scores, const Tile& tile, std::int64_t r, bool first, T* output, std::int64_t d) {
    const std::int64_t low = tile.low(r), high = tile.high(r);
    const T before = first ? -std::numeric_limits<T>::infinity() : maximum[r];
    T top = before;
#pragma omp simd reduction(max : top)
    for (std::int64_t c = low; c < high; ++c) top = scores[c] > top ? scores[c] : top;
    T added = 0;
#pragma omp simd reduction(+ : added)
    for (std::int64_t c = low; c < high; ++c) {
      const T e = vexp(scores[c] - top);
      scores[c] = e;
      added += e;
    }
    std::fill(scores, scores + low, T(0));
    std::fill(scores + high, scores + tile.cols, T(0));
    maximum[r] = top;
    if (first) {
      sum[r] = added;
    } else if (top == before) {
      sum[r] += added;
    } else {
      const T shrink = vexp(before - top);
      sum[r] = sum[r] * shrink + added;
      for (std::int64_t x = 0; x < d; ++x) output[x] *= shrink;
    }
  }
};

/// Output rows and lse of query block i, head h. Key blocks are taken from the diagonal down, so that every row sees a
/// key in the first of them.
template <class T>
void forward_block(const Geometry& g, std::int64_t i, std::int64_t h, T scale, const T* q, const T* k, const T* v, T* o,
                   T* lse) {
  alignas(64) T scores[block * block];
  RunningSoftmax<T> softmax;
  const std::int64_t d = g.d, kv = h / g.group();
  const std::int64_t q0 = i * block, rows = std::min(block, g.queries - q0);
  const T* queries = q + q0 * g.q_stride() + h * d;
  T* output = o + q0 * g.q_stride() + h * d;
  for (std::int64_t j = i; j >= g.first_key_block(i); --j) {
    const Tile tile(g, i, j);
    const bool first = j == i;
    const std::int64_t key_offset = tile.k0 * g.kv_stride() + kv * d;
    gemm<T>(Transpose::no, Transpose::yes, tile.rows, tile.cols, d, scale, queries, g.q_stride(), k + key_offset,
            g.kv_stride(), 0, scores, block);
    for (std::int64_t r = 0; r < tile.rows; ++r) {
      softmax.take(scores + r * block, tile, r, first, output + r * g.q_stride(), d);
    }
    gemm<T>(Transpose::no, Transpose::no, tile.rows, d, tile.cols, 1, scores, block, v + key_offset, g.kv_stride(),
            first ? 0 : 1, output, g.q_stride());
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    const T factor = T(1) / softmax.sum[r];
    T* row = output + r * g.q_stride();
    for (std::int64_t x = 0; x < d; ++x) row[x] *= factor;
    lse[h * g.queries + q0 + r] = softmax.maximum[r] + std::log(softmax.sum[r]);
  }
}

template <class T>
struct BackwardTensors {
  const T *d_o, *q, *k, *v, *lse, *delta;  // delta [Hq, L] = do . o
  T *dq, *dk, *dv;
};

/// Adds what query block i, key block j give to dq, dk and dv of key/value head kv. dq is set when j == i.
template <class T>
void backward_block(const Geometry& g, std::int64_t i, std::int64_t j, std::int64_t kv, T scale,
                    const BackwardTensors<T>& t) {
  alignas(64) T p[block * block];
  alignas(64) T ds[block * block];
  const Tile tile(g, i, j);
  const std::int64_t d = g.d, rows = tile.rows, cols = tile.cols, qs = g.q_stride(), ks = g.kv_stride();
  const std::int64_t key_offset = tile.k0 * ks + kv * d;
  for (std::int64_t h = kv * g.group(); h < (kv + 1) * g.group(); ++h) {
    const std::int64_t query_offset = tile.q0 * qs + h * d;
    const T* lse = t.lse + h * g.queries + tile.q0;
    const T* delta = t.delta + h * g.queries + tile.q0;
    gemm<T>(Transpose::no, Transpose::yes, rows, cols, d, scale, t.q + query_offset, qs, t.k + key_offset, ks, 0, p,
            block);
    gemm<T>(Transpose::no, Transpose::yes, rows, cols, d, 1, t.d_o + query_offset, qs, t.v + key_offset, ks, 0, ds,
            block);
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t low = tile.low(r), high = tile.high(r);
      T *pr = p + r * block, *dsr = ds + r * block;
      const T row_lse = lse[r], row_delta = delta[r];
      for (std::int64_t c = low; c < high; ++c) {
        const T e = vexp(pr[c] - row_lse);
        pr[c] = e;
        dsr[c] = scale * e * (dsr[c] - row_delta);
      }
      for (T* row : {pr, dsr}) {
        std::fill(row, row + low, T(0));
        std::fill(row + high, row + cols, T(0));
      }
    }
    gemm<T>(Transpose::yes, Transpose::no, cols, d, rows, 1, p, block, t.d_o + query_offset, qs, 1, t.dv + key_offset,
            ks);
    gemm<T>(Transpose::yes, Transpose::no, cols, d, rows, 1, ds, block, t.q + query_offset, qs, 1, t.dk + key_offset,
            ks);
    gemm<T>(Transpose::no, Transpose::no, rows, d, cols, 1, ds, block, t.k + key_offset, ks, j == i ? 0 : 1,
            t.dq + query_offset, qs);
  }
}

}  // namespace

void attention_forward(const Stream& stream, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& start,
                       float scale, const Tensor& o, const Tensor& lse, Arena&) {
  if (stream.is_dry()) return;
  for_real(q.dtype, "attention_forward", [&]<class T>() {
    const Geometry g(q, k, start);
    g.check_start();
    // Later query blocks see more keys: they go first, so that threads end together.
    parallel_for(g.query_blocks() * g.heads, [&](std::int64_t task) {
      forward_block<T>(g, g.query_blocks() - 1 - task / g.heads, task % g.heads, static_cast<T>(scale), q.as<T>(),
                       k.as<T>(), v.as<T>(), o.as<T>(), lse.as<T>());
    });
  });
}

// Blocks run in waves: wave w holds the pairs (i, i - w), so that within a wave every query block and every key block
// has one owner, and every sum over waves one order, with no partial sums to keep.
void attention_backward(const Stream& stream, const Tensor& d_o, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Tensor& o, const Tensor& lse, const Tensor& start, float scale, const Tensor& dq,
                        const Tensor& dk, const Tensor& dv, bool accumulate_kv, Arena& workspace) {
  const auto scope = workspace.scope();
  const Tensor delta = workspace.allocate(lse.dtype, lse.shape, "attention delta");
  if (stream.is_dry()) return;
  if (!accumulate_kv) {
    fill_zero(stream, dk);
    fill_zero(stream, dv);
  }
  for_real(q.dtype, "attention_backward", [&]<class T>() {
    const Geometry g(q, k, start);
    g.check_start();
    const BackwardTensors<T> t{d_o.as<T>(),   q.as<T>(),  k.as<T>(),  v.as<T>(), lse.as<T>(),
                               delta.as<T>(), dq.as<T>(), dk.as<T>(), dv.as<T>()};
    parallel_blocks(g.queries, rows_per_task(2 * g.heads * g.d), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        for (std::int64_t h = 0; h < g.heads; ++h) {
          const std::int64_t at = (i * g.heads + h) * g.d;
          delta.as<T>()[h * g.queries + i] = dot(t.d_o + at, o.as<T>() + at, g.d);
        }
      }
    });
    const std::int64_t blocks = g.query_blocks();
    std::int64_t waves = 0;
    for (std::int64_t i = 0; i < blocks; ++i) waves = std::max(waves, i - g.first_key_block(i) + 1);
    for (std::int64_t w = 0; w < waves; ++w) {
      parallel_for(blocks * g.kv_heads, [&](std::int64_t task) {
        const std::int64_t i = task / g.kv_heads, kv = task % g.kv_heads;
        if (i - w >= g.first_key_block(i)) backward_block<T>(g, i, i - w, kv, static_cast<T>(scale), t);
      });
    }
  });
}

}  // namespace deltapipe::kernels::cpu
