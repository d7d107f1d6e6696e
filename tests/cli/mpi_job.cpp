#include "tests/cli/mpi_job.h"

#include "checkpoints/training_checkpoint.h"
#include "core/file.h"

#include <fmt/format.h>
#include <signal.h>
#include <sys/resource.h>

#include <algorithm>
#include <charconv>
#include <sstream>
#include <thread>

namespace deltapipe::testing {
namespace fs = std::filesystem;
namespace {

constexpr const char* rank_variable = "OMPI_COMM_WORLD_RANK";

/// A /proc file's text; empty when its process is gone.
std::string read_proc(pid_t pid, const char* name) {
  try {
    return read_file(fs::path("/proc") / std::to_string(pid) / name);
  } catch (const std::exception&) {
    return "";
  }
}

std::vector<pid_t> children_of(pid_t parent) {
  std::vector<pid_t> found;
  for (const auto& entry : fs::directory_iterator("/proc")) {
    const std::string name = entry.path().filename();
    pid_t pid = 0;
    if (std::from_chars(name.data(), name.data() + name.size(), pid).ptr != name.data() + name.size()) continue;
    const std::string stat = read_proc(pid, "stat");  // PID (NAME) STATE PARENT ...
    const auto close = stat.rfind(')');
    if (close == std::string::npos) continue;
    std::istringstream rest(stat.substr(close + 1));
    char state = 0;
    pid_t of = 0;
    if (rest >> state >> of && of == parent) found.push_back(pid);
  }
  return found;
}

bool is_rank(pid_t pid, int rank) {
  const std::string environment = '\0' + read_proc(pid, "environ");
  const std::string wanted = fmt::format("{}={}", rank_variable, rank);
  return environment.find('\0' + wanted + '\0') != std::string::npos;
}

bool is_alive(pid_t pid) {
  const std::string stat = read_proc(pid, "stat");
  const auto close = stat.rfind(')');
  return close != std::string::npos && stat.compare(close, 3, ") Z") != 0;
}

}  // namespace

Words mpirun(int ranks) {
  return {DELTAPIPE_MPIEXEC, "--allow-run-as-root", "--oversubscribe", "-n", std::to_string(ranks)};
}

Words mpirun(int ranks, int rank, const std::string& first) {
  Words words = mpirun(ranks);
  const std::string script = fmt::format("if [ ${} = {} ]; then {}; fi; exec \"$@\"", rank_variable, rank, first);
  words.insert(words.end(), {"bash", "-c", script, "rank"});
  return words;
}

Job::Job(int ranks, Words arguments, const fs::path& folder) : Job(mpirun(ranks), std::move(arguments), folder) {}

Job::Job(Words launcher, Words arguments, const fs::path& folder)
    : mpirun_(std::move(arguments), {.folder = folder, .launcher = std::move(launcher)}) {}

pid_t Job::pid_of(int rank) {
  pid_t found = -1;
  wait_until([&] {
    for (const pid_t pid : children_of(mpirun_.pid())) {
      known_.insert(pid);
      if (is_rank(pid, rank)) found = pid;
    }
    return found > 0;
  });
  return found;
}

bool Job::kill(int rank, int signal) {
  const pid_t pid = pid_of(rank);
  begin_ = std::chrono::steady_clock::now();
  return pid > 0 && ::kill(pid, signal) == 0;
}

void Job::limit_file_size(int rank, std::uint64_t bytes) {
  const rlimit limit{bytes, bytes};
  const pid_t pid = pid_of(rank);
  ASSERT_TRUE(pid > 0 && prlimit(pid, RLIMIT_FSIZE, &limit, nullptr) == 0) << "rank " << rank << " is not there";
}

bool Job::wait_until(const std::function<bool()>& happened) {
  while (!mpirun_.has_ended()) {
    if (happened()) return true;
    std::this_thread::sleep_for(std::chrono::microseconds(500));
  }
  return false;
}

Outcome Job::wait() {
  // Open MPI may wait for ever for a rank that died while MPI started.
  const auto start = std::chrono::steady_clock::now();
  auto last_seen = start, now = start;
  while (!mpirun_.has_ended() && now - start < std::chrono::minutes(4)) {
    const auto ranks = children_of(mpirun_.pid());
    now = std::chrono::steady_clock::now();
    if (std::any_of(ranks.begin(), ranks.end(), is_alive)) last_seen = now;
    if (now - last_seen > std::chrono::seconds(20)) mpirun_.kill(SIGKILL);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  Outcome outcome = mpirun_.wait();
  end_ = std::chrono::steady_clock::now();
  const auto last = end_ + std::chrono::seconds(10);  // what mpirun has killed may take a moment to be gone
  for (const pid_t pid : known_) {
    while (is_alive(pid) && std::chrono::steady_clock::now() < last) {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    EXPECT_FALSE(is_alive(pid)) << "process " << pid << " outlives its job\n" << outcome;
  }
  return outcome;
}

std::vector<std::string> error_lines(const Outcome& outcome) {
  std::vector<std::string> lines;
  std::istringstream text(outcome.err);
  for (std::string line; std::getline(text, line);) {
    if (line.starts_with("error: ")) lines.push_back(line);
  }
  return lines;
}

::testing::AssertionResult job_fails_with(int code, std::initializer_list<std::string_view> parts, const Outcome& o) {
  const auto failure = [&] { return ::testing::AssertionFailure(); };
  if (o.code != code) return failure() << "expected exit status " << code << "\n" << o;
  const auto lines = error_lines(o);
  if (lines.size() != 1) return failure() << "expected one error line\n" << o;
  for (const std::string_view part : parts) {
    if (lines[0].find(part) == std::string::npos) return failure() << "the error line lacks '" << part << "'\n" << o;
  }
  return ::testing::AssertionSuccess();
}

fs::path last_checkpoint(const fs::path& folder) {
  const fs::path newest = newest_checkpoint(folder / "checkpoints").value();
  const CheckpointReader verified(newest);
  return newest;
}

void expect_whole_checkpoints(const fs::path& folder) {
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder / "checkpoints", error)) {
    if (!entry.path().filename().string().starts_with("step-")) continue;
    EXPECT_NO_THROW(CheckpointReader reader(entry.path())) << entry.path();
  }
}

Words join(Words a, const Words& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

Words settings(std::initializer_list<std::string> list) {
  Words words;
  for (const std::string& setting : list) words.insert(words.end(), {"--set", setting});
  return words;
}

void JobTest::prepare(int align_steps, int distill_steps, int checkpoint_every) const {
  shop.write_job(align_steps, distill_steps, fmt::format("[checkpoint]\nevery_steps = {}\n", checkpoint_every));
}

fs::path JobTest::folder(const std::string& name) const {
  fs::create_directories(shop / name);
  return shop / name;
}

fs::path JobTest::run_whole(int ranks, const Words& mesh, const std::string& name) const {
  const fs::path where = folder(name);
  EXPECT_TRUE(succeeds(Job(ranks, train(mesh), where).wait()));
  return where;
}

void JobTest::expect_same_run(const fs::path& a, const fs::path& b) {
  expect_same_checkpoint(last_checkpoint(run_of(a)), last_checkpoint(run_of(b)));
  EXPECT_EQ(read_metrics(run_of(a) / "metrics.jsonl"), read_metrics(run_of(b) / "metrics.jsonl"));
}

}  // namespace deltapipe::testing
