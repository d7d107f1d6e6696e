#include "kernels/cuda/attention_kernels.h"

#include <cuda_bf16.h>

#include <algorithm>

namespace deltapipe::kernels::cuda {
namespace {

constexpr int threads = 256;
constexpr int width = 8;  // bf16 elements of a 16-byte access

__global__ void write_entries(const SequenceList list, int first, int count, const SequenceRows rows,
                              const SequenceTable table) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= count) return;
  const Sequence s = list.at[i];
  const int entry = first + i;
  table.query_offsets[entry] = s.query * rows.query;
  table.key_offsets[entry] = s.key * rows.key;
  table.lse_offsets[entry] = s.query;
  table.query_lengths[entry] = s.queries;
  table.key_lengths[entry] = s.keys;
}

struct Values {
  float at[width];
};

__device__ Values load(const std::uint16_t* x) {
  const uint4 raw = *reinterpret_cast<const uint4*>(x);
  const std::uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  Values v;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v.at[2 * i] = __uint_as_float(words[i] << 16);
    v.at[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
  return v;
}
__device__ Values load(const float* x) {
  const float4 a = reinterpret_cast<const float4*>(x)[0], b = reinterpret_cast<const float4*>(x)[1];
  return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}
__device__ void store(const Values& v, std::uint16_t* x) {
  __nv_bfloat162 pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = __floats2bfloat162_rn(v.at[2 * i], v.at[2 * i + 1]);
  *reinterpret_cast<uint4*>(x) = *reinterpret_cast<const uint4*>(pairs);
}
__device__ void store(const Values& v, float* x) {
  reinterpret_cast<float4*>(x)[0] = make_float4(v.at[0], v.at[1], v.at[2], v.at[3]);
  reinterpret_cast<float4*>(x)[1] = make_float4(v.at[4], v.at[5], v.at[6], v.at[7]);
}

/// to = (accumulate ? to : 0) + from, rows of `row_groups` groups of 8: those of `from` one after another, those of
/// `to` `row` elements apart.
template <class From, class To>
__global__ void __launch_bounds__(threads)
    add(const From* __restrict__ from, std::size_t groups, std::size_t row_groups, std::size_t row, bool accumulate,
        To* __restrict__ to) {
  const std::size_t step = static_cast<std::size_t>(gridDim.x) * threads;
  for (std::size_t i = static_cast<std::size_t>(blockIdx.x) * threads + threadIdx.x; i < groups; i += step) {
    To* out = to + i / row_groups * row + i % row_groups * width;
    Values sum = load(from + i * width);
    if (accumulate) {
      const Values before = load(out);
#pragma unroll
      for (int k = 0; k < width; ++k) sum.at[k] += before.at[k];
    }
    store(sum, out);
  }
}

template <class From, class To>
cudaError_t launch_add(const From* from, std::size_t groups, std::size_t row_groups, std::size_t row, bool accumulate,
                       To* to, cudaStream_t stream) {
  if (groups == 0) return cudaSuccess;
  const std::size_t blocks = std::min<std::size_t>((groups + threads - 1) / threads, 132 * 16);  // a full H100
  add<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(from, groups, row_groups, row, accumulate, to);
  return cudaGetLastError();
}

}  // namespace

cudaError_t write_sequences(const SequenceList& list, int first, int count, const SequenceRows& rows,
                            const SequenceTable& table, cudaStream_t stream) {
  static_assert(SequenceList::capacity <= threads);
  write_entries<<<1, threads, 0, stream>>>(list, first, count, rows, table);
  return cudaGetLastError();
}

cudaError_t add_to_sums(const std::uint16_t* x, std::size_t n, float* sums, cudaStream_t stream) {
  return launch_add(x, n / width, n, 0, true, sums, stream);
}

cudaError_t round_sums(const float* sums, std::size_t rows, int row_width, std::size_t row, bool accumulate,
                       std::uint16_t* x, cudaStream_t stream) {
  const auto row_groups = static_cast<std::size_t>(row_width / width);
  return launch_add(sums, rows * row_groups, row_groups, row, accumulate, x, stream);
}

cudaError_t add_gradients(const std::uint16_t* y, std::size_t n, std::uint16_t* x, cudaStream_t stream) {
  return launch_add(y, n / width, n, 0, true, x, stream);
}

}  // namespace deltapipe::kernels::cuda
