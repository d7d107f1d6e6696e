// Times every operation on the shapes of AFM-4.5B: a table, and JSON with --out.
#include "kernels/cuda/common.h"
#include "kernels/settings.h"
#include "tools/bench/kernels/bench.h"
#include "tools/bench/report.h"

#include <fmt/format.h>
#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <cstdio>

namespace deltapipe::bench {
namespace {

using kernels::cuda::check;

int run(int argc, char** argv) {
  std::string out, only, commit = DELTAPIPE_COMMIT;
  std::int64_t tokens = 32768;
  int repetitions = 30;
  double memory_gb = 16, peak_tflops = 735;
  bool deterministic = false;
  CLI::App app("Times deltapipe's CUDA operations on the shapes of AFM-4.5B.");
  app.add_option("--out", out, "JSON file to write");
  app.add_option("--only", only, "only operations whose name holds this");
  app.add_option("--tokens", tokens, "tokens a sequence")->check(CLI::PositiveNumber);
  app.add_option("--repetitions", repetitions, "calls timed a row, of which the median counts")
      ->check(CLI::PositiveNumber);
  app.add_option("--memory-gb", memory_gb, "device memory to use");
  app.add_option("--peak-tflops", peak_tflops, "bfloat16 rate that products are held against");
  app.add_flag("--deterministic", deterministic, "as with run.deterministic = true");
  app.add_option("--commit", commit, "commit to name in the JSON file");
  CLI11_PARSE(app, argc, argv);

  kernels::settings().deterministic = deterministic;
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  cudaStream_t native = nullptr;
  check(cudaStreamCreateWithFlags(&native, cudaStreamNonBlocking), "cudaStreamCreate");
  const Stream stream = Stream::cuda(0, native);
  Arena memory("benchmark tensors", static_cast<std::size_t>(memory_gb * 1e9), Device{Device::Kind::cuda, 0});
  const Limits limits{measure_copy_bandwidth(memory, stream, repetitions), peak_tflops * 1e12};
  std::printf("%s, driver %s; copy of 2 GiB: %.0f GB/s read and written\n", properties.name, driver_version().c_str(),
              limits.copy_bandwidth * 1e-9);
  Bench bench(memory, stream, limits, only, repetitions);
  measure_memory_bound(bench, tokens);
  measure_compute_bound(bench, tokens);

  if (out.empty()) return 0;
  nlohmann::ordered_json json = begin_report("kernels", properties.name, commit, argc, argv);
  json["copy_bytes_per_second"] = limits.copy_bandwidth;
  json["rows"] = nlohmann::ordered_json::array();
  for (const Row& row : bench.rows()) {
    json["rows"].push_back({{"op", row.op},
                            {"shape", row.shape},
                            {"ms", row.ms},
                            {"bytes", row.bytes},
                            {"flop", row.flop},
                            {"fraction_of_limit", row.fraction}});
  }
  write_report(out, json);
  return 0;
}

}  // namespace
}  // namespace deltapipe::bench

int main(int argc, char** argv) {
  try {
    return deltapipe::bench::run(argc, argv);
  } catch (const deltapipe::Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return error.exit_code();
  }
}
