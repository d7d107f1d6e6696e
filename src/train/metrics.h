// What a run reports: metrics.jsonl (one JSON object a line, for programs) and console lines (for people).
#pragma once

#include "train/trainer.h"

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

namespace deltapipe {

/// What all ranks sent in a step, for one axis and purpose.
struct TrafficMetrics {
  std::string axis, purpose;
  double messages = 0, bytes = 0;
};

/// One step as reported.
struct StepMetrics {
  std::int64_t step = 0;  // from 1, over all stages
  std::string stage;
  std::int64_t stage_step = 0;    // from 1
  std::uint64_t tokens_seen = 0;  // sequence positions, over all stages
  double seconds = 0;             // of this step
  double tokens_per_second = 0;
  double mfu = 0;            // model FLOPs over the ranks' H100 peak (pipeline/model_costs.h); 0: not on GPUs
  std::int64_t skipped = 0;  // non-finite steps so far
  StepReport report;
  std::vector<TrafficMetrics> traffic;  // of what was used; empty for a job of one rank
};

/// An arena of a rank: what was planned before the first step, and what was used at most.
struct ArenaUse {
  std::string name;
  std::uint64_t planned_bytes = 0, peak_bytes = 0;
};
using RankMemoryUse = std::vector<ArenaUse>;

/// How one training process ended.
struct RunResult {
  std::int64_t steps = 0;             // of the whole run so far
  std::uint64_t tokens = 0;           // of the whole run so far
  std::int64_t skipped = 0;           // of the whole run so far
  int stopped_by_signal = 0;          // 0: the run is complete
  double seconds = 0;                 // of this process's steps, evaluations and checkpoints
  std::uint64_t peak_rss_bytes = 0;   // of this process
  std::uint64_t device_bytes = 0;     // of rank 0's GPU in use at the end; 0: on the CPU
  std::vector<RankMemoryUse> memory;  // [rank]
};

/// RUN_DIR/metrics.jsonl. Every line is flushed, so that a reader sees it at once.
class MetricsFile {
 public:
  /// Opens for appending. Lines of steps after `last_step` are dropped first: a resumed run writes them anew.
  MetricsFile(const std::filesystem::path& path, std::int64_t last_step);
  void write(const StepMetrics& m);
  /// The last line of a process: how it ended, how long it took, how much memory it used at most, arena by arena of
  /// every rank.
  void write_end(const RunResult& result);
  void write_evaluation(std::int64_t step, const std::string& stage, const DivergenceResult& result);

 private:
  void line(const std::string& text);
  std::filesystem::path path_;
  std::ofstream file_;
};

/// "distill 12/300  loss 1.234  kl 0.31 ...  4.0 %  left 0:03:21"
class ConsoleProgress {
 public:
  ConsoleProgress(std::uint64_t total_tokens, std::uint64_t done_tokens);
  std::string line(const StepMetrics& m, std::int64_t stage_steps, const Objective& objective);

 private:
  std::uint64_t total_tokens_, first_tokens_;
  std::chrono::steady_clock::time_point begin_;
};

}  // namespace deltapipe
