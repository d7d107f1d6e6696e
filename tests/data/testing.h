// Helpers of the data tests: a folder that cleans up after itself, files, the error a call throws.
#pragma once

#include "data/token_dataset.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace deltapipe::testing {

/// A fresh folder, removed with everything in it.
class TemporaryFolder {
 public:
  TemporaryFolder();
  ~TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  std::filesystem::path operator/(std::string_view name) const { return path_ / name; }
  const std::filesystem::path& path() const { return path_; }
  /// Names of everything inside, at any depth.
  std::set<std::string> names() const;

 private:
  std::filesystem::path path_;
};

/// Writes `content`, making folders on the way; returns `path`.
std::filesystem::path write_text(const std::filesystem::path& path, std::string_view content);

/// While it lives, no file of this process can grow beyond `bytes`: writes fail with EFBIG, as on a full disk with
/// ENOSPC.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(std::uint64_t bytes);
  ~FileSizeLimit();
  FileSizeLimit(const FileSizeLimit&) = delete;
  FileSizeLimit& operator=(const FileSizeLimit&) = delete;

 private:
  std::uint64_t old_limit_;
  void (*old_handler_)(int);
};

using Documents = std::vector<std::vector<std::uint32_t>>;

/// `count` documents of 1 to `longest` ids below `vocabulary`.
Documents random_documents(std::uint64_t seed, std::size_t count, std::uint64_t longest, std::uint64_t vocabulary);
void write_dataset(const std::filesystem::path& path, const TokenDatasetInfo& info, const Documents& documents);
Documents read_documents(const TokenDataset& dataset);
/// All documents in a row.
std::vector<std::uint32_t> join(const Documents& documents);

/// The message of the E that f() throws; a test failure and "" when it throws something else or nothing.
template <class E, class F>
std::string error_of(const F& f) {
  try {
    f();
  } catch (const E& e) {
    EXPECT_EQ(std::string_view(e.what()).find('\n'), std::string_view::npos) << "more than one line: " << e.what();
    return e.what();
  } catch (const std::exception& e) {
    ADD_FAILURE() << "another exception: " << e.what();
    return {};
  }
  ADD_FAILURE() << "no exception";
  return {};
}

#define EXPECT_MENTIONS(text, word) \
  EXPECT_NE(std::string(text).find((word)), std::string::npos) << "\"" << (text) << "\" lacks \"" << (word) << "\""

}  // namespace deltapipe::testing
