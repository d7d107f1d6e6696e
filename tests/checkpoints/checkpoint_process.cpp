// A process that tests start in order to kill it, or to take its disk away.
//   checkpoint_process loop DIR    writes one checkpoint after another until it is killed, going on where DIR stands;
//                                  says "ready" first
//   checkpoint_process limit DIR   files may not grow: what happens to a checkpoint, and after the limit is lifted?
//   checkpoint_process full DIR    the same on a full file system (a small one of its own, mounted on DIR)
// limit and full print what they see; exit status 77: this system does not let us mount.
#include "tests/checkpoints/samples.h"

#include <fmt/format.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <fstream>

/// The HDF5 library loses its caches when it cannot close a file. That our own handles do not leak is seen in the tests
/// of whole files.
extern "C" const char* __lsan_default_suppressions() { return "leak:libhdf5\n"; }

namespace deltapipe {
namespace {

namespace fs = std::filesystem;

[[noreturn]] void write_forever(const fs::path& dir) {
  std::int64_t step = 0;
  if (const auto newest = newest_checkpoint(dir)) step = read_state(*newest).step;
  CheckpointWriter writer(dir, 2);
  fmt::print("ready\n");
  std::fflush(stdout);
  for (int i = 0;; ++i) {
    if (i % 3 != 0) ++step;  // every third time the same step again: replacing is to be killed, too
    const samples::Step content(step);
    writer.write(content.state, content.slices);
    writer.wait();
  }
}

void limit_file_size(rlim_t bytes) {
  rlimit limit{};
  getrlimit(RLIMIT_FSIZE, &limit);
  limit.rlim_cur = bytes;
  setrlimit(RLIMIT_FSIZE, &limit);
}

bool mount_small(const fs::path& dir) {
  if (unshare(CLONE_NEWNS) != 0 && unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0) return false;
  mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr);  // else the mount would be seen outside
  return mount("none", dir.c_str(), "tmpfs", 0, "size=600k") == 0;
}

void print_entries(const fs::path& dir) {
  for (const auto& entry : fs::directory_iterator(dir)) fmt::print("entry {}\n", entry.path().filename().string());
}

int run_out_of_space(const fs::path& dir, bool by_limit) {
  std::signal(SIGXFSZ, SIG_IGN);
  if (!by_limit && !mount_small(dir)) return 77;
  CheckpointWriter writer(dir, 5);
  const samples::Step small(1);
  writer.write(small.state, small.slices);
  writer.wait();
  if (by_limit) limit_file_size(100000);

  // One tensor too large, then a great many tensors whose data is small: the disk runs full at different places.
  std::vector<TensorInfo> many;
  for (int i = 0; i < 1500; ++i) many.push_back({"master", fmt::format("weight.{}", i), DType::f32, {64}});
  int step = 2;
  for (const auto& infos : {std::vector<TensorInfo>{{"master", "large", DType::f32, {400, 1000}}}, many}) {
    const samples::Step large(step++, infos);
    writer.write(large.state, large.slices);
    try {
      writer.wait();
      fmt::print("written\n");
    } catch (const IoError& e) {
      fmt::print("IoError {}\n", e.what());
    } catch (const std::exception& e) {
      fmt::print("other error {}\n", e.what());
    }
    print_entries(dir);
  }
  samples::verify(newest_checkpoint(dir).value());

  if (by_limit) limit_file_size(RLIM_INFINITY);
  const samples::Step after(9);
  writer.write(after.state, after.slices);
  writer.wait();
  samples::verify(newest_checkpoint(dir).value());
  fmt::print("at last {}\n", newest_checkpoint(dir).value().filename().string());
  for (const auto& entry : fs::directory_iterator("/proc/self/fd")) {
    std::error_code gone;  // the listing's own descriptor
    const std::string target = fs::read_symlink(entry.path(), gone);
    if (target.find(".h5") != std::string::npos) fmt::print("still open {}\n", target);
  }
  return 0;
}

}  // namespace
}  // namespace deltapipe

int main(int argc, char** argv) {
  const std::string mode = argc == 3 ? argv[1] : "";
  if (mode == "loop") deltapipe::write_forever(argv[2]);
  if (mode == "limit" || mode == "full") return deltapipe::run_out_of_space(argv[2], mode == "limit");
  return 2;
}
