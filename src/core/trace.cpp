#include "core/trace.h"

#include "core/device_memory.h"
#include "core/error.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <vector>

namespace deltapipe::trace {
namespace {

/// A moment that both clocks know.
struct Anchor {
  deltapipe::Event event;
  std::int64_t at_ns = 0;
};

/// An event whose marks the device has not been known to reach.
struct Marked {
  Event event;
  Mark begin, end;
  std::int64_t anchor;  // the last one before its marks
};

struct Recording {
  std::vector<Event> events;  // never grows beyond what reserve() made room for
  std::uint64_t dropped = 0;
  std::int64_t step = 0;
  // Of a CUDA device:
  std::vector<deltapipe::Event> marks;
  std::vector<Mark> free_marks;
  std::vector<Marked> marked;   // room for one a mark
  std::vector<Anchor> anchors;  // used in turn
  std::int64_t anchor = -1;     // number of the last one
};

// Marked events wait for messages of the step after theirs at most.
constexpr std::size_t anchor_count = 4;

Recording& recording() {
  static Recording instance;
  return instance;
}

Anchor& anchor_of(Recording& r, std::int64_t number) {
  return r.anchors[static_cast<std::size_t>(number) % r.anchors.size()];
}

/// `stream` has nothing to do: the event is reached as soon as it is recorded, in the middle of the two looks at the
/// host's clock to within a few microseconds.
void set_anchor(Recording& r, const Stream& stream) {
  synchronize(stream);
  Anchor& anchor = anchor_of(r, ++r.anchor);
  const std::int64_t before = now_ns();
  anchor.event.record(stream);
  anchor.event.synchronize();
  anchor.at_ns = before + (now_ns() - before) / 2;
}

std::int64_t time_of(Recording& r, Mark mark, std::int64_t anchor_number) {
  const Anchor& anchor = anchor_of(r, anchor_number);
  const double seconds = r.marks[static_cast<std::size_t>(mark)].seconds_since(anchor.event);
  return anchor.at_ns + std::llround(1e9 * seconds);
}

void keep(Recording& r, const Event& event) {
  if (r.events.size() == r.events.capacity()) {
    ++r.dropped;
    return;
  }
  r.events.push_back(event);
}

}  // namespace

std::int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void reserve(std::size_t capacity, Device device, std::size_t marks) {
  Recording& r = recording();
  r = {};
  r.events.reserve(capacity);
  if (device.is_cpu()) return;
  require(marks > 0, "trace::reserve: a device's recording needs marks");
  r.marks.reserve(marks);
  r.free_marks.reserve(marks);
  r.marked.reserve(marks);
  for (std::size_t i = 0; i < marks; ++i) {
    r.marks.emplace_back(device, true);
    r.free_marks.push_back(static_cast<Mark>(marks - 1 - i));
  }
  for (std::size_t i = 0; i < anchor_count; ++i) r.anchors.push_back({deltapipe::Event(device, true), 0});
}

void start(const Stream& stream) {
  Recording& r = recording();
  require(r.events.capacity() > 0, "trace::start: no room has been reserved");
  require(is_of_device() == stream.device().is_cuda(), "trace::start: a device's recording needs its compute stream");
  if (is_of_device()) set_anchor(r, stream);
  detail::recording = true;
  detail::marking = is_of_device();
}

void stop() { detail::recording = detail::marking = false; }

void set_step(std::int64_t step) { recording().step = step; }

void record(const Event& event) {
  if (!is_on()) return;
  Event own = event;
  own.step = recording().step;
  keep(recording(), own);
}

Mark mark(const Stream& stream) {
  if (!is_marking(stream)) return no_mark;
  Recording& r = recording();
  if (r.free_marks.empty()) {
    ++r.dropped;
    return no_mark;
  }
  const Mark mark = r.free_marks.back();
  r.free_marks.pop_back();
  r.marks[static_cast<std::size_t>(mark)].record(stream);
  return mark;
}

void record(const Event& event, Mark begin, const Stream& stream) {
  if (begin == no_mark) return;
  Recording& r = recording();
  const Mark end = mark(stream);
  if (end == no_mark) {
    r.free_marks.push_back(begin);
    return;
  }
  r.marked.push_back({event, begin, end, r.anchor});
  r.marked.back().event.step = r.step;
}

void settle(const Stream& stream) {
  Recording& r = recording();
  if (!is_on() || !is_of_device() || stream.is_dry()) return;
  synchronize(stream);
  std::erase_if(r.marked, [&](Marked& m) {
    if (!r.marks[static_cast<std::size_t>(m.end)].reached()) return false;
    if (r.anchor - m.anchor < static_cast<std::int64_t>(anchor_count)) {
      m.event.on_device = true;
      m.event.begin_ns = time_of(r, m.begin, m.anchor);
      m.event.end_ns = std::max(m.event.begin_ns, time_of(r, m.end, m.anchor));
      keep(r, m.event);
    } else {
      ++r.dropped;
    }
    r.free_marks.push_back(m.begin);
    r.free_marks.push_back(m.end);
    return true;
  });
  set_anchor(r, stream);
}

std::span<const Event> events() { return recording().events; }

bool is_of_device() { return !recording().anchors.empty(); }

std::uint64_t dropped() { return recording().dropped; }

void clear() { recording() = {}; }

}  // namespace deltapipe::trace
