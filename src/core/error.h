// Typed errors. `main` catches Error, prints "error: <one line>" and exits with exit_code().
#pragma once

#include <fmt/core.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace deltapipe {

class Error : public std::runtime_error {
 public:
  explicit Error(const std::string& message) : std::runtime_error(message) {}
  /// Process exit status for this kind of error; the same on every rank.
  virtual int exit_code() const { return 1; }
};

/// Wrong command line.
struct UsageError : Error {
  using Error::Error;
  int exit_code() const override { return 2; }
};
/// Wrong or contradictory configuration; the message names file, line and key.
struct ConfigError : Error {
  using Error::Error;
  int exit_code() const override { return 3; }
};
/// A file exists but its content is wrong: damaged, foreign, truncated, misshapen.
struct FormatError : Error {
  using Error::Error;
  int exit_code() const override { return 4; }
};
/// The operating system refused: missing file, permission, full disk. The message carries errno's text.
struct IoError : Error {
  using Error::Error;
  int exit_code() const override { return 5; }
};
/// Out of memory on a device or in an arena.
struct MemoryError : Error {
  using Error::Error;
  int exit_code() const override { return 6; }
};
/// Training cannot go on: too many non-finite steps in a row.
struct NumericError : Error {
  using Error::Error;
  int exit_code() const override { return 7; }
};
/// A peer rank failed, is silent or disagrees.
struct CommunicationError : Error {
  using Error::Error;
  int exit_code() const override { return 8; }
};
/// Another rank failed and has told of it: this rank ends with the same exit code and says nothing.
class PeerError : public Error {
 public:
  PeerError(int rank, int code) : Error("rank " + std::to_string(rank) + " failed"), code_(code) {}
  int exit_code() const override { return code_; }

 private:
  int code_;
};
/// A broken contract inside the program (a wrong shape handed to a kernel): a bug, not user input.
struct InternalError : Error {
  using Error::Error;
  int exit_code() const override { return 70; }
};

/// fail<IoError>("cannot open {}: {}", path, reason)
template <class E, class... Args>
[[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) {
  throw E(fmt::format(format, std::forward<Args>(args)...));
}

/// Contract check that stays on in release builds; `what` names the operation and the broken condition.
inline void require(bool condition, const char* what) {
  if (!condition) throw InternalError(what);
}

}  // namespace deltapipe
