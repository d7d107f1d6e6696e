#include "core/trace.h"

#include "core/error.h"

#include <chrono>
#include <vector>

namespace deltapipe::trace {
namespace {

struct Recording {
  std::vector<Event> events;  // never grows beyond what reserve() made room for
  std::uint64_t dropped = 0;
  std::int64_t step = 0;
};

Recording& recording() {
  static Recording instance;
  return instance;
}

}  // namespace

std::int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void reserve(std::size_t capacity) {
  Recording& r = recording();
  r.events.clear();
  r.events.reserve(capacity);
  r.dropped = 0;
}

void start() {
  require(recording().events.capacity() > 0, "trace::start: no room has been reserved");
  detail::recording = true;
}

void stop() { detail::recording = false; }

void set_step(std::int64_t step) { recording().step = step; }

void record(const Event& event) {
  if (!is_on()) return;
  Recording& r = recording();
  if (r.events.size() == r.events.capacity()) {
    ++r.dropped;
    return;
  }
  r.events.push_back(event);
  r.events.back().step = r.step;
}

std::span<const Event> events() { return recording().events; }

std::uint64_t dropped() { return recording().dropped; }

void clear() { recording() = {}; }

}  // namespace deltapipe::trace
