// How a call is refused, and settings.
#include "tests/gpu/stand_in/stand_in.h"

#include <execinfo.h>
#include <unistd.h>

#include <cstdlib>

namespace deltapipe::stand_in {
namespace {

std::string& refusal() {
  thread_local std::string message;
  return message;
}

void print_stack() {
  constexpr int most = 64;
  void* frames[most];
  const int count = backtrace(frames, most);
  backtrace_symbols_fd(frames, count, STDERR_FILENO);
}

}  // namespace

std::recursive_mutex& mutex() {
  static auto& m = *new std::recursive_mutex();
  return m;
}

long setting(const char* name, long otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr && *text != '\0' ? std::strtol(text, nullptr, 10) : otherwise;
}

bool logs() {
  static const bool on = setting("DELTAPIPE_STAND_IN_LOG", 0) != 0;
  return on;
}

void say_refusal(const std::string& message) {
  refusal() = message;
  const std::string line = "CUDA stand-in: " + message + "\n";
  [[maybe_unused]] const auto written = write(STDERR_FILENO, line.data(), line.size());
  if (setting("DELTAPIPE_STAND_IN_STACK", 0) != 0) print_stack();
  if (setting("DELTAPIPE_STAND_IN_ABORT", 0) != 0) std::abort();
}

const std::string& last_refusal() { return refusal(); }

const char* with_refusal(const char* text) {
  thread_local std::string whole;
  whole = refusal().empty() ? text : fmt::format("{} ({})", text, refusal());
  return whole.c_str();
}

int device_count() {
  static const int count = [] {
    const long devices = setting("DELTAPIPE_STAND_IN_DEVICES", 8);
    return static_cast<int>(devices < 0 ? 0 : devices > 16 ? 16 : devices);
  }();
  return count;
}

}  // namespace deltapipe::stand_in
