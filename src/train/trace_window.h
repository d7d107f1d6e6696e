// The steps of a run that trace.steps asks for, as one file of all ranks in Chrome's trace event format (Perfetto and
// chrome://tracing open it): a process a rank, with the tracks "tasks" and "communication" of core/trace.h.
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
  /// `runtime` and `mesh` outlive this object.
  TraceWindow(const TraceConfig& config, MpiRuntime& runtime, const Mesh& mesh, std::filesystem::path file);
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
  std::filesystem::path file_;
  bool recording_ = false;
  std::int64_t offset_ns_ = 0;  // from this rank's clock to the file's
};

}  // namespace deltapipe
