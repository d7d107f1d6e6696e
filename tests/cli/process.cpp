#include "tests/cli/process.h"

#include "core/error.h"
#include "core/file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <thread>

namespace deltapipe::testing {
namespace fs = std::filesystem;
namespace {

std::string quoted(const std::string& word) {
  return !word.empty() && word.find_first_of(" '\"\\$*[]{}();&|<>?\n") == std::string::npos ? word
                                                                                            : fmt::format("'{}'", word);
}

void redirect(const fs::path& file, int descriptor) {
  const int fd = open(file.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
  if (fd < 0 || dup2(fd, descriptor) < 0) _exit(76);
  close(fd);
}

bool mount_small(const fs::path& folder, std::uint64_t bytes) {
  if (unshare(CLONE_NEWNS) != 0) return false;
  mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr);  // else the mount would be seen outside
  return mount("none", folder.c_str(), "tmpfs", 0, ("size=" + std::to_string(bytes)).c_str()) == 0;
}

/// In the child: the program on a small disk, then a listing of that disk, which vanishes with this process.
[[noreturn]] void run_on_small_disk(char** arguments, const ProcessOptions& o) {
  if (!mount_small(o.small_disk, o.small_disk_bytes)) _exit(77);
  const pid_t pid = fork();
  if (pid == 0) {
    execv(arguments[0], arguments);
    _exit(76);
  }
  int status = 0;
  waitpid(pid, &status, 0);
  for (const auto& e : fs::recursive_directory_iterator(o.small_disk)) {
    dprintf(STDOUT_FILENO, "entry %s\n", e.path().lexically_relative(o.small_disk).c_str());
  }
  _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 76);
}

}  // namespace

std::ostream& operator<<(std::ostream& stream, const Outcome& o) {
  stream << "$ " << o.command << "\n";
  if (o.signal != 0) stream << "[ended by signal " << o.signal << "]\n";
  return stream << "[exit status " << o.code << "]\n[stdout]\n" << o.out << "[stderr]\n" << o.err;
}

Process::Process(std::vector<std::string> arguments, ProcessOptions options) {
  std::string name = (fs::temp_directory_path() / "deltapipe-streams-XXXXXX").string();
  if (mkdtemp(name.data()) == nullptr) fail<IoError>("cannot make {}", name);
  streams_ = name;
  for (const std::string& word : options.launcher) outcome_.command.append(quoted(word)).append(" ");
  outcome_.command += "deltapipe";
  for (const std::string& a : arguments) outcome_.command.append(" ").append(quoted(a));
  arguments.insert(arguments.begin(), DELTAPIPE_BINARY);
  arguments.insert(arguments.begin(), options.launcher.begin(), options.launcher.end());
  std::vector<char*> words;
  for (std::string& a : arguments) words.push_back(a.data());
  words.push_back(nullptr);

  pid_ = fork();
  if (pid_ < 0) fail<IoError>("cannot fork");
  if (pid_ > 0) return;
  // Threads that spin for work would take the cores from processes that have some.
  setenv("OMP_WAIT_POLICY", "passive", 1);
  setenv("LSAN_OPTIONS", "suppressions=" DELTAPIPE_LSAN_SUPPRESSIONS ":print_suppressions=0", 1);
  redirect(streams_ / "out", STDOUT_FILENO);
  redirect(streams_ / "err", STDERR_FILENO);
  if (chdir(options.folder.c_str()) != 0) _exit(76);
  if (options.file_size_limit != 0) {
    const rlimit limit{options.file_size_limit, options.file_size_limit};
    setrlimit(RLIMIT_FSIZE, &limit);
  }
  if (options.small_disk_bytes != 0) run_on_small_disk(words.data(), options);
  execvp(words[0], words.data());
  _exit(76);
}

Process::~Process() {
  if (pid_ > 0) {
    ::kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  std::error_code ignored;
  fs::remove_all(streams_, ignored);
}

void Process::kill(int signal) const {
  if (pid_ > 0) ::kill(pid_, signal);
}

void Process::collect(int status) {
  pid_ = -1;
  if (WIFEXITED(status)) outcome_.code = WEXITSTATUS(status);
  if (WIFSIGNALED(status)) outcome_.signal = WTERMSIG(status);
}

bool Process::has_ended() {
  if (pid_ < 0) return true;
  int status = 0;
  if (waitpid(pid_, &status, WNOHANG) == 0) return false;
  collect(status);
  return true;
}

Outcome Process::wait() {
  const auto end = std::chrono::steady_clock::now() + std::chrono::minutes(5);
  while (!has_ended()) {
    if (std::chrono::steady_clock::now() > end) {
      ADD_FAILURE() << outcome_.command << " did not end within five minutes";
      kill(SIGKILL);
      int status = 0;
      waitpid(pid_, &status, 0);
      collect(status);
      break;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  outcome_.out = read_file(streams_ / "out");
  outcome_.err = read_file(streams_ / "err");
  return outcome_;
}

Outcome run(std::vector<std::string> arguments, const ProcessOptions& options) {
  return Process(std::move(arguments), options).wait();
}

::testing::AssertionResult succeeds(const Outcome& o) {
  if (o.code == 0) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << o;
}

::testing::AssertionResult fails_with(int code, std::initializer_list<std::string_view> parts, const Outcome& o) {
  const auto failure = [&] { return ::testing::AssertionFailure(); };
  if (o.code != code) return failure() << "expected exit status " << code << "\n" << o;
  std::istringstream lines(o.err);
  std::string line, last;
  int errors = 0;
  while (std::getline(lines, line)) {
    errors += line.starts_with("error: ");
    last = line;
  }
  if (errors != 1 || !last.starts_with("error: ")) return failure() << "expected one error line, the last\n" << o;
  for (const std::string_view part : parts) {
    if (last.find(part) == std::string::npos) return failure() << "the error line lacks '" << part << "'\n" << o;
  }
  std::istringstream out(o.out);
  while (std::getline(out, line)) {
    if (!line.starts_with("entry ")) return failure() << "expected nothing on standard output\n" << o;
  }
  return ::testing::AssertionSuccess();
}

}  // namespace deltapipe::testing
