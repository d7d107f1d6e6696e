#include "tools/bench/kernels/bench.h"

#include "core/random.h"
#include "kernels/cuda/common.h"

#include <algorithm>
#include <cstdio>

namespace deltapipe::bench {
namespace {

using kernels::cuda::check;
using kernels::cuda::native;

/// Median time of `call` in milliseconds, each between two events.
double median_ms(const Stream& stream, int repetitions, const std::function<void()>& call,
                 const std::function<void()>& prepare) {
  constexpr int warm_up = 3;
  cudaEvent_t begin = nullptr, end = nullptr;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<float> times;
  for (int i = 0; i < warm_up + repetitions; ++i) {
    prepare();
    check(cudaEventRecord(begin, native(stream)), "cudaEventRecord");
    call();
    check(cudaEventRecord(end, native(stream)), "cudaEventRecord");
    check(cudaEventSynchronize(end), "benchmark");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    if (i >= warm_up) times.push_back(ms);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::nth_element(times.begin(), times.begin() + repetitions / 2, times.end());
  return static_cast<double>(times[static_cast<std::size_t>(repetitions / 2)]);
}

constexpr std::size_t workspace_bytes = std::size_t{4} << 30;

/// Copies `bytes` of host data to `to`, again and again until it is full.
void tile(const void* from, std::size_t bytes, const Tensor& to) {
  check(cudaMemcpy(to.data, from, std::min(bytes, to.bytes()), cudaMemcpyHostToDevice), "cudaMemcpy");
  for (std::size_t at = bytes; at < to.bytes(); at *= 2) {
    check(cudaMemcpy(static_cast<std::byte*>(to.data) + at, to.data, std::min(at, to.bytes() - at),
                     cudaMemcpyDeviceToDevice),
          "cudaMemcpy");
  }
}

}  // namespace

Bench::Bench(Arena& memory, const Stream& stream, Limits limits, std::string only, int repetitions)
    : memory_(memory),
      stream_(stream),
      limits_(limits),
      only_(std::move(only)),
      repetitions_(repetitions),
      workspace_("workspace", workspace_bytes, memory.device()) {}

Tensor Bench::normal(DType dtype, const Shape& shape, double scale) {
  constexpr std::size_t distinct = 1048573;  // a prime: rows do not repeat
  RandomStream random(1, "benchmark");
  std::vector<float> values(distinct);
  for (float& x : values) x = static_cast<float>(scale * random.next_normal());
  const Tensor t = empty(dtype, shape);
  if (dtype == DType::bf16) {
    std::vector<BFloat16> rounded(distinct);
    std::transform(values.begin(), values.end(), rounded.begin(), to_bfloat16);
    tile(rounded.data(), distinct * sizeof(BFloat16), t);
  } else {
    require(dtype == DType::f32, "Bench::normal: only bfloat16 and float32");
    tile(values.data(), distinct * sizeof(float), t);
  }
  return t;
}

Tensor Bench::integers(const Shape& shape, std::int64_t below) {
  RandomStream random(1, "benchmark integers");
  std::vector<std::int32_t> values(static_cast<std::size_t>(shape.numel()));
  for (auto& x : values) x = static_cast<std::int32_t>(random.next_below(static_cast<std::uint64_t>(below)));
  const Tensor t = empty(DType::i32, shape);
  tile(values.data(), values.size() * sizeof(std::int32_t), t);
  return t;
}

void Bench::measure(const std::string& op, const std::string& shape, double bytes, double flop,
                    const std::function<void()>& call, const std::function<void()>& prepare) {
  if (!wants(op)) return;
  Row row{.op = op, .shape = shape, .bytes = bytes, .flop = flop};
  row.ms = median_ms(stream_, repetitions_, call, prepare);
  const double compute = limits_.peak_flops > 0 ? flop / limits_.peak_flops : 0;
  row.fraction = std::max(bytes / limits_.copy_bandwidth, compute) * 1e3 / row.ms;
  std::printf("%-30s %-26s %9.4f ms %8.1f MB %7.0f GB/s %5.0f TFLOP/s %5.1f %%\n", op.c_str(), shape.c_str(), row.ms,
              bytes * 1e-6, bytes / row.ms * 1e-6, flop / row.ms * 1e-9, 100 * row.fraction);
  std::fflush(stdout);
  rows_.push_back(row);
}

double measure_copy_bandwidth(Arena& memory, const Stream& stream, int repetitions) {
  const auto scope = memory.scope();
  constexpr std::int64_t bytes = std::int64_t{1} << 31;
  const Tensor from = memory.allocate(DType::u8, {bytes}, "copy"), to = memory.allocate(DType::u8, {bytes}, "copy");
  check(cudaMemset(from.data, 0x5a, from.bytes()), "cudaMemset");
  const auto copy = [&] {
    check(cudaMemcpyAsync(to.data, from.data, to.bytes(), cudaMemcpyDeviceToDevice, native(stream)), "copy");
  };
  const double ms = median_ms(stream, repetitions, copy, [] {});
  return 2 * static_cast<double>(bytes) / ms * 1e3;
}

}  // namespace deltapipe::bench
