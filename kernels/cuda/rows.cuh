// Rows of d elements, each handled by one block of threads that keeps it in registers: the thread holds `packs` packs,
// threads * width elements apart. Used by RMSNorm and the losses on hidden states.
#pragma once

#include "kernels/cuda/vector.cuh"

#include <algorithm>

namespace deltapipe::kernels::cuda {

inline constexpr int most_row_threads = 256;
// Three blocks on each of an H100's 132 multiprocessors, what __launch_bounds__(256, 2) leaves room for at the 160
// threads of a hidden size of 2,560.
inline constexpr std::int64_t most_row_blocks = 396;

inline std::int64_t rows_per_block(std::int64_t rows) { return (rows + most_row_blocks - 1) / most_row_blocks; }
inline std::int64_t row_blocks(std::int64_t rows) {
  const std::int64_t each = rows_per_block(rows);
  return rows == 0 ? 0 : (rows + each - 1) / each;
}

/// Blocks of most_row_threads threads whose registers a multiprocessor holds without spilling.
template <int packs>
inline constexpr int row_blocks_resident = packs <= 4 ? 2 : 1;

/// Rows that a block has in flight, so that enough bytes are.
template <int packs>
inline constexpr int rows_at_once = packs == 1   ? 4
                                    : packs == 2 ? 2
                                                 : 1;

/// Place of a thread's packs in a row.
template <class T, int packs>
struct RowPlace {
  static constexpr int width = pack_width<T>;
  int first, d;
  __device__ explicit RowPlace(std::int64_t elements)
      : first(static_cast<int>(threadIdx.x) * width), d(static_cast<int>(elements)) {}
  __device__ __forceinline__ int at(int k) const { return first + k * static_cast<int>(blockDim.x) * width; }
  __device__ __forceinline__ int count(int k) const { return min(width, d - at(k)); }  // none when not positive
};

/// f.template operator()<packs>(threads) with the fewest packs that most_row_threads threads need.
template <class T, class F>
cudaError_t for_row_packs(std::int64_t d, const F& f) {
  const std::int64_t all = (d + pack_width<T> - 1) / pack_width<T>;
  const auto threads = [&](int packs) { return static_cast<int>((all + packs * 32 - 1) / (packs * 32) * 32); };
  if (all <= most_row_threads) return f.template operator()<1>(threads(1));
  if (all <= 2 * most_row_threads) return f.template operator()<2>(threads(2));
  if (all <= 4 * most_row_threads) return f.template operator()<4>(threads(4));
  return f.template operator()<8>(threads(8));
}

/// f.template operator()<aligned>() with whether rows of d elements at these pointers can be moved in whole packs.
template <class T, class F, class... P>
cudaError_t for_alignment(std::int64_t d, const F& f, const P*... p) {
  if (d % pack_width<T> == 0 && all_aligned(p...)) return f.template operator()<true>();
  return f.template operator()<false>();
}

}  // namespace deltapipe::kernels::cuda
