// Helpers of the distributed tests. Every rank makes the whole data from one seed, computes the one-rank result itself,
// and compares its share of the distributed one.
#pragma once

#include "comm/mpi_runtime.h"
#include "comm/sequence_layout.h"
#include "tests/kernels/testing.h"

#include <cstring>
#include <functional>
#include <string>
#include <vector>

namespace deltapipe::testing {

/// The process's runtime, made by mpi_main.cpp.
MpiRuntime& runtime();

/// Runs `f` dry to learn its workspace, then for real in an arena of exactly that size filled with NaN.
inline void with_exact_workspace(const std::function<void(const Stream&, Arena&)>& f) {
  Arena measured = Arena::measuring("workspace");
  f(Stream::dry({}), measured);
  EXPECT_EQ(measured.used(), 0u);
  Arena real("workspace", measured.peak());
  const auto bytes = static_cast<std::int64_t>(real.capacity());
  if (bytes > 0) std::memset(real.allocate(DType::u8, {bytes}, "all").data, 0xff, real.capacity());  // NaN
  real.reset();
  f(Stream::cpu(), real);
  EXPECT_EQ(real.used(), 0u);
  EXPECT_EQ(real.peak(), measured.peak());
}

/// Sequence tokens [first, first + L) of every local segment of `rank`, in the order it keeps them.
inline std::vector<std::int64_t> first_tokens(const SequenceLayout& layout, int rank, std::int64_t length) {
  std::vector<std::int64_t> first{rank * length};
  if (layout.kind() == LayoutKind::zigzag) first.push_back((2 * layout.ranks() - 1 - rank) * length);
  return first;
}

/// whole [B, T, ...] -> this rank's [B * segments, L, ...], element by element and apart from the code under test.
template <class T>
Owned<T> cut(const SequenceLayout& layout, int rank, const Owned<T>& whole) {
  const std::int64_t batch = whole.shape()[0], tokens = whole.shape()[1], row = whole.size() / batch / tokens;
  const std::int64_t slots = layout.kind() == LayoutKind::zigzag ? 2 : 1, length = tokens / layout.ranks() / slots;
  Shape shape{batch * slots, length};
  for (int i = 2; i < whole.shape().rank(); ++i) shape.append(whole.shape()[i]);
  Owned<T> out(shape);
  const auto first = first_tokens(layout, rank, length);
  std::int64_t to = 0;
  for (std::int64_t b = 0; b < batch; ++b) {
    for (const std::int64_t begin : first) {
      for (std::int64_t i = 0; i < length * row; ++i) out[to++] = whole[(b * tokens + begin) * row + i];
    }
  }
  return out;
}

/// start [B, T] of whole sequences; each sequence's documents begin at its tokens in `documents` (the first is 0).
inline Owned<std::int32_t> pack_documents(std::int64_t tokens,
                                          const std::vector<std::vector<std::int32_t>>& documents) {
  Owned<std::int32_t> start({static_cast<std::int64_t>(documents.size()), tokens});
  for (std::size_t b = 0; b < documents.size(); ++b) {
    for (std::int32_t t = 0; t < tokens; ++t) {
      for (const std::int32_t s : documents[b]) {
        if (s <= t) start[static_cast<std::int64_t>(b) * tokens + t] = s;
      }
    }
  }
  return start;
}

template <class T>
bool same_bits(const Owned<T>& a, const Owned<T>& b) {
  if (a.size() == 0 || b.size() == 0) return a.size() == b.size();  // no memory to compare
  return a.size() == b.size() && std::memcmp(a.begin(), b.begin(), static_cast<std::size_t>(a.size()) * sizeof(T)) == 0;
}

inline std::int64_t ceil_log2(std::int64_t n) {
  std::int64_t rounds = 0;
  for (std::int64_t d = 1; d < n; d *= 2) ++rounds;
  return rounds;
}

/// The message of the CommunicationError that `f` throws; empty when it throws none.
template <class F>
std::string communication_error(const F& f) {
  try {
    f();
  } catch (const CommunicationError& e) {
    return e.what();
  }
  return "";
}

}  // namespace deltapipe::testing
