// A folder with everything that a tiny job needs: text, token datasets, a teacher, configurations.
#pragma once

#include "tests/cli/process.h"
#include "tests/data/testing.h"

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace deltapipe::testing {

/// Path below a folder -> hash of the content ("" for a folder).
using Listing = std::map<std::string, std::string>;
Listing list_files(const std::filesystem::path& folder);

class Workshop {
 public:
  /// Makes train.h5, validation.h5 (bytes) and an untrained teacher of `layers` layers in teacher/.
  explicit Workshop(int layers = 2);

  std::filesystem::path operator/(std::string_view name) const { return folder_ / name; }
  const std::filesystem::path& path() const { return folder_.path(); }
  std::string text(std::string_view name) const { return (folder_ / name).string(); }

  /// The program, with this folder as its working directory.
  Outcome run(std::vector<std::string> arguments) const;
  ProcessOptions here() const { return {.folder = path()}; }

  /// job.toml: alignment for `align_steps`, then distillation for `distill_steps`, in runs/job. `more`: further tables.
  /// Paths in it are absolute, so that it serves other working directories too.
  std::filesystem::path write_job(int align_steps, int distill_steps, const std::string& more = "") const;

 private:
  TemporaryFolder folder_;
};

/// `command` must fail with `code` and one error line that contains `parts`, and leave the folder as it was.
void expect_refusal(const Workshop& shop, int code, std::initializer_list<std::string_view> parts,
                    std::vector<std::string> command);

/// Tensors, and everything else that decides how a run goes on, of two checkpoint folders: equal bit by bit.
void expect_same_checkpoint(const std::filesystem::path& a, const std::filesystem::path& b);

/// Lines of a metrics.jsonl but for those that say how a process ended, without times and
/// without traffic, which counts what a process says at its start and when a checkpoint is done; each as one JSON text.
std::vector<std::string> read_metrics(const std::filesystem::path& file);
/// Whole lines that report a step.
int count_steps(const std::filesystem::path& metrics);

}  // namespace deltapipe::testing
