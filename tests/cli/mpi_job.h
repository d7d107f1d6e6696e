// A training job of several ranks under mpirun, and what can happen to one of them.
#pragma once

#include "tests/cli/process.h"
#include "tests/cli/workshop.h"

#include <chrono>
#include <functional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace deltapipe::testing {

using Words = std::vector<std::string>;

/// mpirun with `ranks` ranks on this machine. On rank `rank` the shell command `first` comes before the program, whose
/// words are "$@".
Words mpirun(int ranks);
Words mpirun(int ranks, int rank, const std::string& first);

class Job {
 public:
  /// `deltapipe arguments...` on every rank.
  Job(int ranks, Words arguments, const std::filesystem::path& folder);
  Job(Words launcher, Words arguments, const std::filesystem::path& folder);

  /// Waits for the rank's process to be there; -1 when the job ends before.
  pid_t pid_of(int rank);
  /// False when the job had ended before.
  bool kill(int rank, int signal);
  /// The rank's files may not grow beyond `bytes` from now on.
  void limit_file_size(int rank, std::uint64_t bytes);

  /// Looks until `happened` or the end of the job; whether it still runs.
  bool wait_until(const std::function<bool()>& happened);
  bool has_ended() { return mpirun_.has_ended(); }
  /// Until the job has ended by itself; fails the test where ranks outlive it.
  Outcome wait();
  /// From the last kill, or the start, to the end.
  double seconds() const { return std::chrono::duration<double>(end_ - begin_).count(); }

 private:
  Process mpirun_;
  std::set<pid_t> known_;
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now(), end_ = begin_;
};

/// Exit status `code`, and one line of all that deltapipe printed on all ranks begins with "error: ", which contains
/// every part. What mpirun has to say is its own.
::testing::AssertionResult job_fails_with(int code, std::initializer_list<std::string_view> parts,
                                          const Outcome& outcome);
/// Lines that begin with "error: ".
std::vector<std::string> error_lines(const Outcome& outcome);

/// A run folder's checkpoint of the highest step, after all of its files' hashes were verified.
std::filesystem::path last_checkpoint(const std::filesystem::path& folder);
/// Every folder step-N holds a whole checkpoint.
void expect_whole_checkpoints(const std::filesystem::path& folder);

Words join(Words a, const Words& b);
/// "--set" before each.
Words settings(std::initializer_list<std::string> list);

/// A workshop with a job for up to four stages of a pipeline: two stages of the recipe, a checkpoint every step or as
/// often as `prepare` is told.
class JobTest : public ::testing::Test {
 protected:
  void prepare(int align_steps, int distill_steps, int checkpoint_every) const;
  /// A new working directory.
  std::filesystem::path folder(const std::string& name) const;
  static std::filesystem::path run_of(const std::filesystem::path& folder) { return folder / "runs/job"; }
  /// `train job.toml --resume auto` and more.
  Words train(const Words& more = {}) const { return join({"train", shop.text("job.toml"), "--resume", "auto"}, more); }
  /// Steps in the run's metrics.
  static int steps_done(const std::filesystem::path& folder) { return count_steps(run_of(folder) / "metrics.jsonl"); }
  /// An undisturbed run in a folder of that name.
  std::filesystem::path run_whole(int ranks, const Words& mesh, const std::string& name = "whole") const;
  /// The same weights, moments and place, bit by bit, and the same metrics.
  static void expect_same_run(const std::filesystem::path& a, const std::filesystem::path& b);

  const Workshop shop{4};
};

}  // namespace deltapipe::testing
