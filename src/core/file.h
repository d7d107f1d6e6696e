// Files: whole reads, memory maps, and writes that are either complete or absent.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace deltapipe {

/// Whole content. Throws IoError naming the path and errno's text.
std::string read_file(const std::filesystem::path& path);

/// Writes to a temporary name beside `path`, fsyncs, renames, fsyncs the folder. On any failure the temporary file is
/// removed and an old `path` is left as it was. Throws IoError.
void write_file_atomically(const std::filesystem::path& path, std::string_view content);

/// fsync of a file or folder by path. Throws IoError.
void sync_path(const std::filesystem::path& path);

/// Makes the folder and its parents. Throws IoError when it cannot be made or written to.
void make_writable_folder(const std::filesystem::path& path);

/// A file that says that something is in use. The lock (flock) goes with the object or with the process.
class FileLock {
 public:
  /// Makes the file when it is not there; throws IoError when that fails.
  explicit FileLock(const std::filesystem::path& path);
  ~FileLock();
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;

  /// False while another FileLock holds it, in any process. On a file system without locks it is always held.
  bool try_hold();

 private:
  int fd_;
};

/// XXH3 64-bit hash as 16 hexadecimal digits.
std::string hash_hex(std::span<const std::byte> bytes);
/// The same over a file's content, read in blocks.
std::string hash_file_hex(const std::filesystem::path& path);

/// A file mapped for reading, unmapped at the end of its life.
class MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(MappedFile&&) noexcept;
  MappedFile& operator=(MappedFile&&) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return {data_, size_}; }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace deltapipe
