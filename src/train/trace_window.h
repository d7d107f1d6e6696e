// The steps of a run that trace.steps asks for, as one file of all ranks in Chrome's trace event format (Perfetto and
// chrome://tracing open it): a process a rank, with the tracks "tasks" and "communication" of core/trace.h.
//
// On CUDA times are the device's: "tasks" is the compute stream, where a span of category "communication" says that it
// waited for messages, and the messages themselves (category "transfer") have a track for each stream that they run on.
// What the host did (steps, evaluations, and its calls that start messages, category "call") is on the track "host".
//
// Times are microseconds since the recording began, on rank 0's clock. The other ranks' clocks are compared with it
// when the recording begins, by the fastest of several messages there and back; clocks that differ by less than such a
// message takes are taken for one clock, as they are on one host.
#pragma once

#include "comm/mesh.h"
#include "comm/mpi_runtime.h"
#include "core/config.h"

#include <cstdint>
#include <filesystem>

namespace deltapipe {

class TraceWindow {
 public:
  /// `runtime` and `mesh` outlive this object; `stream` is what tasks run on.
  TraceWindow(const TraceConfig& config, MpiRuntime& runtime, const Mesh& mesh, const Stream& stream,
              std::filesystem::path file);
  ~TraceWindow();
  TraceWindow(const TraceWindow&) = delete;
  TraceWindow& operator=(const TraceWindow&) = delete;

  /// Every rank, before the step of this number (from 1, over the run): begins to record at the first step of the
  /// window that the run comes to, and writes the file after the last one.
  void before_step(std::int64_t step);
  /// Every rank, when the run ends: writes what has been recorded. A file that cannot be written is a warning.
  void finish();

 private:
  void begin();

  std::int64_t first_ = 0, last_ = -1;  // an empty window
  MpiRuntime& runtime_;
  const Mesh& mesh_;
  Stream stream_;
  std::filesystem::path file_;
  bool recording_ = false;
  std::int64_t offset_ns_ = 0;  // from this rank's clock to the file's
};

}  // namespace deltapipe
