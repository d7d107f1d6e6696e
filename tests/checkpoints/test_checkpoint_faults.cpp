// Checkpoints under damage, sudden death and full disks.
#include "checkpoints/training_checkpoint.h"
#include "core/file.h"
#include "tests/checkpoints/samples.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <thread>

namespace deltapipe {
namespace {

namespace fs = std::filesystem;

class CheckpointFaults : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "deltapipe-faults-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    dir_ = name;
  }
  void TearDown() override { fs::remove_all(dir_); }

  /// Two rank files, each tensor cut in the middle.
  fs::path write(std::int64_t step) {
    samples::Step content(step);
    const fs::path partial = begin_checkpoint(dir_, step);
    std::vector<FileRecord> records;
    const auto infos = samples::tensors();
    for (int rank = 0; rank < 2; ++rank) {
      std::vector<TensorSlice> slices;
      for (std::size_t i = 0; i < infos.size(); ++i) {
        const std::int64_t n = infos[i].shape.numel();
        slices.push_back(
            samples::slice_of(infos[i], content.contents[i], rank == 0 ? 0 : n / 2, rank == 0 ? n / 2 : n));
      }
      records.push_back(write_rank_file(partial, rank, slices));
    }
    return publish_checkpoint(dir_, content.state, records);
  }
  fs::path dir_;
};

constexpr const char* every_file[] = {"rank-00000.h5", "rank-00001.h5", "checkpoint.h5", "manifest.json"};

/// Opening `folder` must fail with a FormatError that names `file`.
void expect_damaged(const fs::path& folder, const std::string& file, const std::string& how) {
  try {
    CheckpointReader reader(folder);
    ADD_FAILURE() << file << ", " << how << ": no error";
  } catch (const FormatError& e) {
    EXPECT_NE(std::string(e.what()).find(file), std::string::npos) << how << ": " << e.what();
  } catch (const std::exception& e) {
    ADD_FAILURE() << file << ", " << how << ": " << e.what();
  }
}

void overwrite(const fs::path& path, std::size_t at, char byte) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(static_cast<std::streamoff>(at));
  file.put(byte);
}

TEST_F(CheckpointFaults, AFlippedBitAnywhereIsFound) {
  const fs::path folder = write(1);
  RandomStream random(5, "flips");
  const auto flip = [&](char byte) { return static_cast<char>(byte ^ (1 << random.next_below(8))); };
  for (const char* name : every_file) {
    const std::string content = read_file(folder / name);
    constexpr std::size_t regions = 150;  // equal ones, a byte in each, the first and the last of the file among them
    for (std::size_t r = 0; r < regions; ++r) {
      const std::size_t begin = content.size() * r / regions;
      const std::size_t end = content.size() * (r + 1) / regions;
      std::size_t at = begin + random.next_below(end - begin);
      if (r == 0) at = 0;
      if (r + 1 == regions) at = content.size() - 1;
      overwrite(folder / name, at, flip(content[at]));
      expect_damaged(folder, name, fmt::format("bit flipped in byte {}", at));
      overwrite(folder / name, at, content[at]);
    }
  }
  samples::verify(folder);  // all is as before

  // The manifest vouches for the others: each of its bytes.
  std::string text = read_file(folder / "manifest.json");
  manifest::parse(text, "there");
  for (char& c : text) {
    const char old = c;
    c = flip(old);
    EXPECT_THROW(manifest::parse(text, "there"), FormatError) << "byte " << &c - text.data();
    c = old;
  }
  overwrite(folder / "manifest.json", text.size() / 2, flip(text[text.size() / 2]));
  EXPECT_THROW(read_state(folder), FormatError);
  EXPECT_THROW(describe_checkpoint(folder), FormatError);
  EXPECT_EQ(newest_checkpoint(dir_), std::nullopt);
}

TEST_F(CheckpointFaults, OnUseVerifiesTheFilesThatAreRead) {
  const fs::path folder = write(1);
  const auto bytes = fs::file_size(folder / "rank-00001.h5");
  const char old = read_file(folder / "rank-00001.h5").back();
  overwrite(folder / "rank-00001.h5", bytes - 1, static_cast<char>(old ^ 1));
  CheckpointReader reader(folder, CheckpointReader::Verify::on_use);
  std::vector<float> x(481);
  reader.read("master", "lm_head.weight", 0, 240, {x.data(), DType::f32, {240}});
  EXPECT_THROW(reader.read("master", "lm_head.weight", 240, 241, {x.data(), DType::f32, {1}}), FormatError);
  EXPECT_THROW(reader.read("master", "lm_head.weight", 0, 481, {x.data(), DType::f32, {481}}), FormatError);
}

TEST_F(CheckpointFaults, TruncatedMissingEmptyAndForeignFiles) {
  const fs::path older = write(1);
  const fs::path folder = write(2);
  RandomStream random(6, "truncations");
  for (const char* name : every_file) {
    const std::string content = read_file(folder / name);
    const auto damage = [&](const std::string& how, const std::string* replacement) {
      fs::remove(folder / name);
      if (replacement) std::ofstream(folder / name, std::ios::binary) << *replacement;
      expect_damaged(folder, name, how);
      EXPECT_EQ(newest_checkpoint(dir_), older) << name << " " << how;
      EXPECT_EQ(find_checkpoint(dir_ / "latest"), older) << name << " " << how;
    };
    damage("missing", nullptr);
    const std::string empty;
    damage("empty", &empty);
    for (int i = 0; i < 20; ++i) {
      const std::string part = content.substr(0, random.next_below(content.size()));
      damage(fmt::format("cut to {}", part.size()), &part);
    }
    const std::string longer = content + '\0';
    damage("one byte longer", &longer);
    std::ofstream(folder / name, std::ios::binary | std::ios::trunc) << content;
    EXPECT_EQ(newest_checkpoint(dir_), folder);
  }
  // A sound HDF5 file of another size, of another checkpoint, and of equal size.
  const std::string mine = read_file(folder / "rank-00000.h5");
  {
    hdf5::File file = hdf5::File::create(folder / "rank-00000.h5", true);
    file.create_group("/master");
    file.close();
  }
  expect_damaged(folder, "rank-00000.h5", "foreign HDF5");
  fs::copy_file(older / "rank-00000.h5", folder / "rank-00000.h5", fs::copy_options::overwrite_existing);
  EXPECT_EQ(fs::file_size(folder / "rank-00000.h5"), mine.size());
  expect_damaged(folder, "rank-00000.h5", "of another step");
  fs::copy_file(older / "manifest.json", folder / "manifest.json", fs::copy_options::overwrite_existing);
  expect_damaged(folder, "rank-00001.h5", "manifest of another step");
}

/// Starts the helper with its standard output in `output`.
pid_t start(const char* mode, const fs::path& dir, const fs::path& output) {
  const std::string dir_text = dir.string(), output_text = output.string();
  const pid_t child = fork();
  if (child == 0) {
    const int fd = open(output_text.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (fd < 0 || dup2(fd, STDOUT_FILENO) < 0) _exit(126);
    execl(CHECKPOINT_PROCESS, CHECKPOINT_PROCESS, mode, dir_text.c_str(), static_cast<char*>(nullptr));
    _exit(127);
  }
  return child;
}

/// Until `condition` holds, at most a minute (a crowded machine).
template <class F>
[[nodiscard]] bool wait_until(const F& condition) {
  for (int i = 0; i < 60000; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return false;
}

bool has_leftovers(const fs::path& dir) {
  if (!fs::exists(dir)) return false;
  return std::any_of(fs::directory_iterator(dir), fs::directory_iterator(),
                     [](const auto& entry) { return entry.path().filename().string().starts_with("."); });
}

TEST_F(CheckpointFaults, KilledAtAnyMomentAWholeOneRemains) {
  using Clock = std::chrono::steady_clock;
  RandomStream random(static_cast<std::uint64_t>(getpid()), "kills");
  const fs::path dir = dir_ / "checkpoints", output = dir_ / "output";
  std::chrono::microseconds one_write{0};  // about how long a checkpoint takes here; measured in round 0
  std::int64_t highest = -1;
  int rounds_with_leftovers = 0;
  for (int round = 0; round <= 30; ++round) {
    const pid_t child = start("loop", dir, output);
    ASSERT_GT(child, 0);
    EXPECT_TRUE(wait_until([&] { return fs::exists(output) && fs::file_size(output) > 0; })) << "no \"ready\"";
    const auto begin = Clock::now();
    if (round == 0) {
      EXPECT_TRUE(wait_until([&] { return fs::exists(dir / checkpoint_name(3)); }));
      one_write = std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - begin) / 3;
    } else {
      const auto at_most = static_cast<std::uint64_t>(one_write.count()) * 3;
      std::this_thread::sleep_for(std::chrono::microseconds(random.next_below(at_most)));
    }
    EXPECT_EQ(kill(child, SIGKILL), 0);
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFSIGNALED(status)) << "the process ended by itself, status " << status;
    fs::remove(output);
    rounds_with_leftovers += has_leftovers(dir) ? 1 : 0;
    const auto newest = newest_checkpoint(dir);
    ASSERT_TRUE(newest) << "round " << round << ": every checkpoint is gone";
    ASSERT_NO_THROW(samples::verify(*newest)) << "round " << round;
    const std::int64_t step = read_state(*newest).step;
    EXPECT_GE(step, highest) << "round " << round;
    highest = step;
  }
  EXPECT_GT(rounds_with_leftovers, 0) << "no kill fell into a write: the test tests nothing";
}

void expect_survival(const fs::path& dir, const char* mode, const std::string& reason) {
  const fs::path disk = dir / "disk", output = dir / "output";
  fs::create_directory(disk);
  int status = 0;
  ASSERT_EQ(waitpid(start(mode, disk, output), &status, 0) > 0, true);
  ASSERT_TRUE(WIFEXITED(status)) << "ended by signal " << WTERMSIG(status);
  const std::string text = read_file(output);
  if (WEXITSTATUS(status) == 77) GTEST_SKIP() << "this system lets no process mount a file system of its own";
  ASSERT_EQ(WEXITSTATUS(status), 0) << text;
  int errors = 0, entries = 0;
  std::string last;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line); last = line) {
    if (line.starts_with("IoError ")) {
      ++errors;
      EXPECT_NE(line.find(reason), std::string::npos) << line;
      EXPECT_NE(line.find(".h5"), std::string::npos) << line;
    } else if (line.starts_with("entry ")) {
      ++entries;
      EXPECT_EQ(line, "entry step-00000001");
    } else {
      EXPECT_EQ(line, "at last step-00000009");
    }
  }
  EXPECT_EQ(errors, 2) << text;
  EXPECT_EQ(entries, 2) << text;
  EXPECT_EQ(last, "at last step-00000009") << text;
}

TEST_F(CheckpointFaults, AFileThatMayNotGrowLeavesTheOlderCheckpoint) {
  expect_survival(dir_, "limit", "File too large");
}

TEST_F(CheckpointFaults, AFullDiskLeavesTheOlderCheckpoint) {
  expect_survival(dir_, "full", "No space left on device");
}

TEST_F(CheckpointFaults, AFolderThatCannotBeMadeIsAnIoError) {
  std::ofstream(dir_ / "file") << "x";
  EXPECT_THROW(CheckpointWriter(dir_ / "file" / "checkpoints", 1), IoError);
  const fs::path dir = dir_ / "checkpoints";
  CheckpointWriter writer(dir, 1);
  const samples::Step content(1);
  writer.write(content.state, content.slices);
  writer.wait();
  fs::rename(dir, dir_ / "aside");
  std::ofstream(dir) << "x";  // the folder's name is now that of a file
  writer.write(content.state, content.slices);
  EXPECT_THROW(writer.write(content.state, content.slices), IoError);
  EXPECT_NO_THROW(writer.wait());  // the error was reported once
  samples::verify(dir_ / "aside" / "step-00000001");
}

}  // namespace
}  // namespace deltapipe
