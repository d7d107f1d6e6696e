// What attention on CUDA needs beside cuDNN: tables of packed sequences and sums of key gradients.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace deltapipe::kernels::cuda {

/// A run of queries and the keys they see, in tokens; both end together.
struct Sequence {
  std::int32_t query = 0, queries = 0;
  std::int32_t key = 0, keys = 0;
};

/// Sequences handed to a kernel by value: what fits into the 4 KiB of arguments that every CUDA version allows.
struct SequenceList {
  static constexpr int capacity = 240;
  Sequence at[capacity];
};

/// Device arrays that describe sequences to cuDNN (see AttentionTensors).
struct SequenceTable {
  std::int64_t *query_offsets, *key_offsets, *lse_offsets;
  std::int32_t *query_lengths, *key_lengths;
};

/// Elements from a token to the next.
struct SequenceRows {
  std::int64_t query, key;
};

/// Entries [first, first + count) of the table.
cudaError_t write_sequences(const SequenceList& list, int first, int count, const SequenceRows& rows,
                            const SequenceTable& table, cudaStream_t stream);

// n is a multiple of 8 and the pointers are aligned to 16 bytes. bf16 as bit patterns.
/// sums += x
cudaError_t add_to_sums(const std::uint16_t* x, std::size_t n, float* sums, cudaStream_t stream);
/// x = (accumulate ? x : 0) + sums, rows of `width`, a multiple of 8: those of sums one after another, those of x `row`
/// elements apart.
cudaError_t round_sums(const float* sums, std::size_t rows, int width, std::size_t row, bool accumulate,
                       std::uint16_t* x, cudaStream_t stream);
/// x += y
cudaError_t add_gradients(const std::uint16_t* y, std::size_t n, std::uint16_t* x, cudaStream_t stream);

}  // namespace deltapipe::kernels::cuda
