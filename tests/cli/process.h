// The program as a user meets it: a process with arguments, an exit status and two streams of text.
#pragma once

#include <gtest/gtest.h>

#include <sys/types.h>

#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <ostream>
#include <string>
#include <string_view>
#include <vector>

namespace deltapipe::testing {

struct Outcome {
  std::string command;  // as one would type it
  int code = -1;        // exit status; -1 when a signal ended the process
  int signal = 0;
  std::string out, err;
};
/// Command, status and both streams: what every failure should show.
std::ostream& operator<<(std::ostream& stream, const Outcome& outcome);

struct ProcessOptions {
  std::filesystem::path folder = ".";  // working directory
  std::uint64_t file_size_limit = 0;   // bytes that no file may grow beyond; 0: none
  /// A file system of this many bytes is mounted on `small_disk` for the process alone (0: none). Its entries are
  /// listed in Outcome::out, each on a line after "entry ". Exit status 77: this system does not let us mount.
  std::uint64_t small_disk_bytes = 0;
  std::filesystem::path small_disk = {};
  std::vector<std::string> launcher = {};  // words before the program: mpirun and its options
};

/// The program under test, started with `arguments`.
class Process {
 public:
  explicit Process(std::vector<std::string> arguments, ProcessOptions options = {});
  ~Process();  // kills it when it still runs
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  void kill(int signal) const;
  pid_t pid() const { return pid_; }  // -1 once it has ended
  bool has_ended();
  /// Kills the process, and fails the test, when it does not end within five minutes.
  Outcome wait();

 private:
  void collect(int status);

  pid_t pid_ = -1;
  std::filesystem::path streams_;  // a folder of files "out" and "err"
  Outcome outcome_;
};

Outcome run(std::vector<std::string> arguments, const ProcessOptions& options = {});

/// Exit status 0; the test fails with the whole outcome otherwise.
::testing::AssertionResult succeeds(const Outcome& outcome);
/// Exit status `code`, nothing on standard output, and the last line on standard error, and only that one, begins with
/// "error: ". That line contains every part.
::testing::AssertionResult fails_with(int code, std::initializer_list<std::string_view> parts, const Outcome& outcome);

}  // namespace deltapipe::testing
