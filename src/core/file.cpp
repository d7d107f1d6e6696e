#include "core/file.h"

#include "core/error.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

namespace deltapipe {
namespace fs = std::filesystem;
namespace {

class Descriptor {
 public:
  Descriptor(const fs::path& path, int flags, mode_t mode = 0) : fd_(open(path.c_str(), flags | O_CLOEXEC, mode)) {}
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  explicit operator bool() const { return fd_ >= 0; }
  int get() const { return fd_; }

 private:
  int fd_;
};

[[noreturn]] void fail_io(const char* verb, const fs::path& path) {
  const int e = errno;
  fail<IoError>("cannot {} {}: {}", verb, path.string(), std::strerror(e));
}

void write_all(int fd, std::string_view content, const fs::path& path) {
  while (!content.empty()) {
    const ssize_t n = ::write(fd, content.data(), content.size());
    if (n < 0) {
      if (errno == EINTR) continue;
      fail_io("write", path);
    }
    content.remove_prefix(static_cast<std::size_t>(n));
  }
}

}  // namespace

std::string read_file(const fs::path& path) {
  const Descriptor fd(path, O_RDONLY);
  if (!fd) fail_io("open", path);
  std::string content;
  std::vector<char> block(std::size_t{1} << 16);
  for (;;) {
    const ssize_t n = ::read(fd.get(), block.data(), block.size());
    if (n == 0) return content;
    if (n < 0) {
      if (errno == EINTR) continue;
      fail_io("read", path);
    }
    content.append(block.data(), static_cast<std::size_t>(n));
  }
}

void sync_path(const fs::path& path) {
  const Descriptor fd(path, O_RDONLY);
  if (!fd) fail_io("open", path);
  // Some file systems refuse fsync on folders; the rename is then as durable as they make it.
  if (fsync(fd.get()) != 0 && errno != EINVAL) fail_io("sync", path);
}

void write_file_atomically(const fs::path& path, std::string_view content) {
  const fs::path temporary = path.string() + ".tmp." + std::to_string(getpid());
  try {
    {
      const Descriptor fd(temporary, O_WRONLY | O_CREAT | O_TRUNC, 0644);
      if (!fd) fail_io("create", temporary);
      write_all(fd.get(), content, temporary);
      if (fsync(fd.get()) != 0) fail_io("sync", temporary);
    }
    if (rename(temporary.c_str(), path.c_str()) != 0) fail_io("rename to", path);
  } catch (...) {
    unlink(temporary.c_str());
    throw;
  }
  sync_path(path.has_parent_path() ? path.parent_path() : fs::path("."));
}

void make_writable_folder(const fs::path& path) {
  std::error_code ec;
  fs::create_directories(path, ec);
  if (ec) fail<IoError>("cannot create folder {}: {}", path.string(), ec.message());
  if (access(path.c_str(), W_OK | X_OK) != 0) fail_io("write into folder", path);
}

FileLock::FileLock(const fs::path& path) : fd_(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644)) {
  if (fd_ < 0) fail_io("open", path);
}

FileLock::~FileLock() { close(fd_); }

bool FileLock::try_hold() { return flock(fd_, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK; }

std::string hash_hex(std::span<const std::byte> bytes) {
  return fmt::format("{:016x}", XXH3_64bits(bytes.data(), bytes.size()));
}

std::string hash_file_hex(const fs::path& path) {
  const Descriptor fd(path, O_RDONLY);
  if (!fd) fail_io("open", path);
  const std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state(XXH3_createState(), &XXH3_freeState);
  XXH3_64bits_reset(state.get());
  std::vector<char> block(std::size_t{1} << 20);
  for (;;) {
    const ssize_t n = ::read(fd.get(), block.data(), block.size());
    if (n == 0) break;
    if (n < 0) {
      if (errno == EINTR) continue;
      fail_io("read", path);
    }
    XXH3_64bits_update(state.get(), block.data(), static_cast<std::size_t>(n));
  }
  return fmt::format("{:016x}", XXH3_64bits_digest(state.get()));
}

MappedFile::MappedFile(const fs::path& path) : path_(path) {
  const Descriptor fd(path, O_RDONLY);
  if (!fd) fail_io("open", path);
  struct stat info {};
  if (fstat(fd.get(), &info) != 0) fail_io("examine", path);
  if (!S_ISREG(info.st_mode)) fail<IoError>("{} is not a regular file", path.string());
  size_ = static_cast<std::size_t>(info.st_size);
  if (size_ == 0) return;
  void* p = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd.get(), 0);
  if (p == MAP_FAILED) fail_io("map", path);
  data_ = static_cast<const std::byte*>(p);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<std::byte*>(data_), size_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)), data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

}  // namespace deltapipe
