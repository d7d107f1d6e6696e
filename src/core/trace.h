// Trace: what this process does when, for steps that someone wants to look at. Spans go into one buffer of fixed size
// that is reserved before they begin; outside of a recording a Span is a branch and nothing more. One recording at a
// time, and only the thread that runs the steps records.
//
// Two tracks: tasks, where spans nest (a step holds its tasks and the optimizer's phases), and communication, where
// they follow each other (calls block one after another).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace deltapipe::trace {

enum class Track : std::uint8_t { tasks, communication };

/// One span. Texts are not owned: they outlive the recording.
struct Event {
  Track track = Track::tasks;
  std::string_view category;     // "step", "task", "optimizer", ...; of the communication track the mesh's axis
  std::string_view name;         // what is done: "forward", "update", "all_gather"
  std::string_view purpose;      // of communication
  std::int64_t begin_ns = 0;     // now_ns()
  std::int64_t end_ns = 0;       // at or after begin_ns
  std::int64_t step = 0;         // of the run, from 1: what set_step() said
  std::int32_t microbatch = -1;  // of tasks; -1: none
  std::int32_t chunk = 0;
  std::int32_t step_offset = 0;  // 1: a task for the step after this one
  std::uint64_t messages = 0;    // sent within the span
  std::uint64_t bytes = 0;       // sent within the span
};

namespace detail {
inline bool recording = false;
}
inline bool is_on() { return detail::recording; }

/// Steady, from an origin of its own on every host.
std::int64_t now_ns();

/// Reserves room for `capacity` events and drops those of an earlier recording.
void reserve(std::size_t capacity);
/// Records from here on. Throws InternalError without reserve().
void start();
void stop();
/// The step that events from here on belong to.
void set_step(std::int64_t step);
/// Adds a finished event, of the present step; counts it as dropped when the buffer is full.
void record(const Event& event);

/// What has been recorded, in the order of the ends.
std::span<const Event> events();
/// Events that found no room.
std::uint64_t dropped();
/// Gives the buffer's memory back.
void clear();

/// A stretch of the task track from its construction to the end of its block, when it begins within a recording.
class Span {
 public:
  Span(std::string_view category, std::string_view name) : on_(is_on()) {
    if (!on_) return;
    event_.category = category;
    event_.name = name;
    event_.begin_ns = now_ns();
  }
  ~Span() { end(); }
  Span(const Span&) = delete;
  Span& operator=(const Span&) = delete;

  /// Before the block's end.
  void end() {
    if (!on_) return;
    on_ = false;
    event_.end_ns = now_ns();
    record(event_);
  }

 private:
  bool on_;
  Event event_;
};

}  // namespace deltapipe::trace
