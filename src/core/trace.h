// Trace: what this process does when, for steps that someone wants to look at. Spans go into one buffer of fixed size
// that is reserved before they begin; outside of a recording a Span is a branch and nothing more. One recording at a
// time, and only the thread that runs the steps records.
//
// Two tracks: tasks, where spans nest (a step holds its tasks and the optimizer's phases), and communication, where
// they follow each other (calls block one after another).
//
// On CUDA work runs later than it is given to a stream. A recording for a CUDA device has a pool of timing events: a
// mark puts one of them into a stream, and a span between two marks says when the device ran what lies between them.
// Its times are read when the stream has been drained (settle), which also joins the device's clock to the host's.
#pragma once

#include "core/stream.h"

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
  std::string_view lane;         // the device's stream, of messages that run beside the compute stream; else empty
  bool on_device = false;        // times are the device's; otherwise the host's: of calls, where there is a device
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
inline bool marking = false;  // of a CUDA device
}  // namespace detail
inline bool is_on() { return detail::recording; }
/// Whether what `stream` is given now is timed by marks.
inline bool is_marking(const Stream& stream) {
  return detail::marking && !stream.is_dry() && stream.device().is_cuda();
}

/// Steady, from an origin of its own on every host.
std::int64_t now_ns();

/// Reserves room for `capacity` events and drops those of an earlier recording. `device`: of the streams that will be
/// marked; a CUDA device's recording has `marks` marks at a time, from when they are made to when they are settled.
void reserve(std::size_t capacity, Device device = {}, std::size_t marks = 0);
/// Records from here on. Throws InternalError without reserve(). With a CUDA device, waits for `stream`, its compute
/// stream.
void start(const Stream& stream = Stream::cpu());
void stop();
/// The step that events from here on belong to.
void set_step(std::int64_t step);
/// Adds a finished event, of the present step; counts it as dropped when the buffer is full.
void record(const Event& event);

/// A point in the work of a stream, or none.
using Mark = std::int32_t;
inline constexpr Mark no_mark = -1;
/// The end of what `stream` has been given so far; no_mark where is_marking() is false or marks have run out.
Mark mark(const Stream& stream);
/// Adds an event of the device, of the present step, from `begin` to the end of what `stream` has been given so far.
/// Nothing for no_mark.
void record(const Event& event, Mark begin, const Stream& stream);
/// Waits for `stream`, the compute stream, and gives their times to the marked events that have been reached. Messages
/// that have not yet ended on other streams wait for the next call. Nothing outside of a device's recording.
void settle(const Stream& stream);

/// What has been recorded, in the order of the ends, as far as they are known: marked events when they are settled.
std::span<const Event> events();
/// Whether the recording is of a CUDA device.
bool is_of_device();
/// Events that found no room.
std::uint64_t dropped();
/// Gives the buffer's memory back.
void clear();

/// A stretch of the task track from its construction to the end of its block, when it begins within a recording: the
/// host's time, or with a stream that is marked, the device's.
class Span {
 public:
  Span(std::string_view category, std::string_view name, const Stream& stream = Stream::cpu())
      : on_(is_on()), stream_(stream) {
    if (!on_) return;
    event_.category = category;
    event_.name = name;
    if (is_marking(stream)) {
      mark_ = mark(stream);
    } else {
      event_.begin_ns = now_ns();
    }
  }
  ~Span() { end(); }
  Span(const Span&) = delete;
  Span& operator=(const Span&) = delete;

  /// Before the block's end.
  void end() {
    if (!on_) return;
    on_ = false;
    if (is_marking(stream_)) {
      record(event_, mark_, stream_);
    } else {
      event_.end_ns = now_ns();
      record(event_);
    }
  }

 private:
  bool on_;
  Stream stream_;
  Mark mark_ = no_mark;
  Event event_;
};

}  // namespace deltapipe::trace
