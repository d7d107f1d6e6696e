// Whole tiny runs on the ranks of a distributed test, in a folder that all of them see.
#pragma once

#include "core/config.h"
#include "train/run.h"

#include <nlohmann/json.hpp>

#include <filesystem>
#include <string>
#include <vector>

namespace deltapipe::testing {

/// A teacher of four layers, a data set, and a recipe: two steps of alignment, then four of distillation, with an
/// evaluation after each stage. Rank 0 makes the folder and removes it. Functions are for every rank together but for
/// those that read what a run has left.
class SharedRun {
 public:
  SharedRun();
  ~SharedRun();
  SharedRun(const SharedRun&) = delete;
  SharedRun& operator=(const SharedRun&) = delete;

  const std::filesystem::path& path() const { return path_; }
  Config config(const std::vector<std::string>& overrides) const;
  TrainingPlan plan(const Config& config) const;
  /// From the start; what was in the run's folder goes first.
  RunResult run(const Config& config) const;
  // On rank 0 alone, which may go on to the next run before others have read:
  /// The lines of metrics.jsonl, and the trace, of the last run.
  std::vector<nlohmann::json> metrics() const;
  nlohmann::json trace() const;
  bool has_trace() const { return std::filesystem::exists(path_ / "run/trace.json"); }

 private:
  std::filesystem::path path_;
};

}  // namespace deltapipe::testing
