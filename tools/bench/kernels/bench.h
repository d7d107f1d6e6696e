// What a file of rows needs: device memory with random contents, and the measurement of one operation.
#pragma once

#include "core/arena.h"
#include "core/stream.h"
#include "core/tensor.h"

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace deltapipe::bench {

struct Row {
  std::string op, shape;
  double ms = 0;        // median
  double bytes = 0;     // least traffic with device memory: every input read once, every output written once
  double flop = 0;      // 0: not counted, the operation is bound by memory
  double fraction = 0;  // of the limit: the larger of bytes at copy_bandwidth and flop at peak_flops, over ms
};

struct Limits {
  double copy_bandwidth;  // bytes a second, read and written, of a 2 GiB copy on this device
  double peak_flops;      // a second; 0: not known
};

class Bench {
 public:
  /// `only`: measures operations whose name holds it. `repetitions` of every row.
  Bench(Arena& memory, const Stream& stream, Limits limits, std::string only, int repetitions);

  /// Uninitialised, normal with the given scale, or integers in [0, below); freed when the enclosing scope() ends.
  Tensor empty(DType dtype, const Shape& shape) { return memory_.allocate(dtype, shape, "benchmark"); }
  Tensor normal(DType dtype, const Shape& shape, double scale = 1);
  Tensor integers(const Shape& shape, std::int64_t below);
  [[nodiscard]] Arena::Scope scope() { return memory_.scope(); }

  const Stream& stream() const { return stream_; }
  /// Scratch for operations that take one.
  Arena& workspace() { return workspace_; }

  bool wants(const std::string& op) const { return op.find(only_) != std::string::npos; }
  /// Calls `call` a few times to warm up, then `repetitions` times between events; `prepare` before each, untimed.
  void measure(
      const std::string& op, const std::string& shape, double bytes, double flop, const std::function<void()>& call,
      const std::function<void()>& prepare = [] {});
  const std::vector<Row>& rows() const { return rows_; }

 private:
  Arena& memory_;
  Stream stream_;
  Limits limits_;
  std::string only_;
  int repetitions_;
  Arena workspace_;
  std::vector<Row> rows_;
};

/// Bytes a second of a 2 GiB copy inside the device, read and written.
double measure_copy_bandwidth(Arena& memory, const Stream& stream, int repetitions);

// The files of rows. Each measures its operations on the shapes of AFM-4.5B at `tokens` tokens.
void measure_memory_bound(Bench& bench, std::int64_t tokens);
void measure_compute_bound(Bench& bench, std::int64_t tokens);

}  // namespace deltapipe::bench
