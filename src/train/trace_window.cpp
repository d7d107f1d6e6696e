#include "train/trace_window.h"

#include "core/file.h"
#include "core/log.h"
#include "core/trace.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

namespace deltapipe {
namespace {

constexpr std::size_t capacity = std::size_t{1} << 18;  // events of a rank, about 30 MiB; pages are taken when used
// On a device, between two looks at what it has done, a step: 16 microbatches of 72 layers with 12 operations each.
constexpr std::size_t mark_capacity = std::size_t{1} << 16;
constexpr int clock_rounds = 8;  // messages there and back, of which the fastest counts

template <class T>
Tensor bytes_of(T* data, std::size_t count) {
  return {data, DType::u8, {static_cast<std::int64_t>(count * sizeof(T))}};
}

/// What a rank adds to its clock to have rank 0's. Every rank of the world calls it.
std::int64_t clock_offset_ns(Communicator& world) {
  const Stream stream = Stream::cpu();
  std::vector<std::int64_t> offsets(static_cast<std::size_t>(world.size()), 0);
  const auto meet = [&](int peer) {
    std::int64_t fastest = std::numeric_limits<std::int64_t>::max(), theirs = 0;
    for (int i = 0; i < clock_rounds; ++i) {
      const std::int64_t sent = trace::now_ns();
      world.send(stream, bytes_of(&theirs, 1), peer, Purpose::control);
      world.receive(stream, bytes_of(&theirs, 1), peer, Purpose::control);
      const std::int64_t received = trace::now_ns();
      if (received - sent >= fastest) continue;
      fastest = received - sent;
      const std::int64_t offset = sent + fastest / 2 - theirs;
      offsets[static_cast<std::size_t>(peer)] = std::abs(offset) <= fastest ? 0 : offset;
    }
  };
  if (world.rank() == 0) {
    for (int peer = 1; peer < world.size(); ++peer) meet(peer);
  } else {
    for (int i = 0; i < clock_rounds; ++i) {
      std::int64_t time = 0;
      world.receive(stream, bytes_of(&time, 1), 0, Purpose::control);
      time = trace::now_ns();
      world.send(stream, bytes_of(&time, 1), 0, Purpose::control);
    }
  }
  world.broadcast(stream, bytes_of(offsets.data(), offsets.size()), 0, Purpose::control);
  return offsets[static_cast<std::size_t>(world.rank())];
}

/// "forward 3", "forward 3, chunk 1", "update", "all_gather (gradients)".
std::string title_of(const trace::Event& e) {
  if (e.track == trace::Track::communication) return fmt::format("{} ({})", e.name, e.purpose);
  if (e.microbatch < 0) return std::string(e.name);
  return fmt::format("{} {}{}{}", e.name, e.microbatch, e.chunk > 0 ? fmt::format(", chunk {}", e.chunk) : "",
                     e.step_offset > 0 ? ", next step" : "");
}

std::string arguments_of(const trace::Event& e) {
  std::string text = fmt::format("\"step\":{}", e.step);
  if (e.track == trace::Track::communication) {
    text += fmt::format(",\"axis\":\"{}\",\"purpose\":\"{}\",\"messages\":{},\"bytes\":{}", e.category, e.purpose,
                        e.messages, e.bytes);
  } else if (e.microbatch >= 0) {
    text += fmt::format(",\"kind\":\"{}\",\"microbatch\":{},\"chunk\":{},\"step_offset\":{}", e.name, e.microbatch,
                        e.chunk, e.step_offset);
  }
  return text;
}

/// Tracks of a rank: numbers and names in the file.
class Tracks {
 public:
  explicit Tracks(bool of_device) : of_device_(of_device) { names_ = {"tasks", of_device ? "host" : "communication"}; }
  /// From 1; a lane gets one when it is first asked for.
  std::size_t number_of(const trace::Event& e) {
    if (!of_device_) return e.track == trace::Track::communication ? 2 : 1;
    if (!e.on_device) return 2;
    if (e.lane.empty()) return 1;
    const std::string name = fmt::format("communication: {}", e.lane);
    const auto found = std::find(names_.begin(), names_.end(), name);
    if (found != names_.end()) return static_cast<std::size_t>(found - names_.begin()) + 1;
    names_.push_back(name);
    return names_.size();
  }
  std::string_view category_of(const trace::Event& e) const {
    if (e.track != trace::Track::communication) return e.category;
    if (!of_device_) return "communication";
    if (!e.on_device) return "call";
    return e.lane.empty() ? "communication" : "transfer";
  }
  const std::vector<std::string>& names() const { return names_; }

 private:
  bool of_device_;
  std::vector<std::string> names_;
};

/// This rank's entries of "traceEvents", each after the first with a comma before it.
std::string write_events(const Mesh& mesh, std::int64_t offset_ns) {
  const int rank = mesh.rank();
  const Coordinate& at = mesh.coordinate();
  std::string text = fmt::format(
      "{{\"ph\":\"M\",\"pid\":{0},\"name\":\"process_name\",\"args\":{{\"name\":\"rank {0}: data {1}, pipeline {2}, "
      "sequence "
      "{3}\"}}}},\n{{\"ph\":\"M\",\"pid\":{0},\"name\":\"process_sort_index\",\"args\":{{\"sort_index\":{0}}}}}",
      rank, at.data, at.pipeline, at.sequence);
  std::vector<trace::Event> events(trace::events().begin(), trace::events().end());
  std::sort(events.begin(), events.end(), [](const trace::Event& a, const trace::Event& b) {
    return a.begin_ns != b.begin_ns ? a.begin_ns < b.begin_ns : a.end_ns > b.end_ns;  // the outer span first
  });
  Tracks tracks(trace::is_of_device());
  for (const trace::Event& e : events) {
    fmt::format_to(
        std::back_inserter(text),
        ",\n{{\"ph\":\"X\",\"pid\":{},\"tid\":{},\"ts\":{:.3f},\"dur\":{:.3f},\"cat\":\"{}\",\"name\":\"{}\","
        "\"args\":{{{}}}}}",
        rank, tracks.number_of(e), static_cast<double>(e.begin_ns + offset_ns) * 1e-3,
        static_cast<double>(e.end_ns - e.begin_ns) * 1e-3, tracks.category_of(e), title_of(e), arguments_of(e));
  }
  for (std::size_t i = 0; i < tracks.names().size(); ++i) {
    text +=
        fmt::format(",\n{{\"ph\":\"M\",\"pid\":{},\"tid\":{},\"name\":\"thread_name\",\"args\":{{\"name\":\"{}\"}}}}",
                    rank, i + 1, tracks.names()[i]);
  }
  return text;
}

}  // namespace

TraceWindow::TraceWindow(const TraceConfig& config, MpiRuntime& runtime, const Mesh& mesh, const Stream& stream,
                         std::filesystem::path file)
    : runtime_(runtime), mesh_(mesh), stream_(stream), file_(std::move(file)) {
  if (config.steps.empty()) return;
  first_ = config.steps[0];
  last_ = config.steps[1];
}

TraceWindow::~TraceWindow() {
  trace::stop();
  trace::clear();
}

void TraceWindow::before_step(std::int64_t step) {
  if (recording_ && step > last_) finish();
  if (!recording_ && step >= first_ && step <= last_) begin();
  if (recording_) trace::set_step(step);
}

void TraceWindow::begin() {
  runtime_.set_where("the beginning of the trace");
  trace::reserve(capacity, stream_.device(), mark_capacity);
  Communicator& world = runtime_.world();
  offset_ns_ = clock_offset_ns(world);
  std::int64_t origin_ns = trace::now_ns();
  world.broadcast(Stream::cpu(), bytes_of(&origin_ns, 1), 0, Purpose::control);
  offset_ns_ -= origin_ns;
  recording_ = true;
  trace::start(stream_);
}

void TraceWindow::finish() {
  if (!recording_) return;
  recording_ = false;
  trace::settle(stream_);
  trace::stop();
  last_ = -1;  // one recording a run
  runtime_.set_where("the end of the trace");
  Communicator& world = runtime_.world();
  const Stream stream = Stream::cpu();
  std::string own = write_events(mesh_, offset_ns_);
  std::vector<std::uint64_t> all(2 * static_cast<std::size_t>(world.size()));  // bytes and dropped events of each rank
  std::array<std::uint64_t, 2> numbers{own.size(), trace::dropped()};
  trace::clear();
  world.all_gather(stream, bytes_of(numbers.data(), numbers.size()), bytes_of(all.data(), all.size()),
                   Purpose::control);
  if (world.rank() != 0) {
    world.send(stream, bytes_of(own.data(), own.size()), 0, Purpose::control);
    return;
  }
  const MeshShape& m = mesh_.shape();
  std::string text = "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n" + own;
  std::uint64_t dropped = numbers[1];
  for (int rank = 1; rank < world.size(); ++rank) {
    const auto i = 2 * static_cast<std::size_t>(rank);
    own.resize(all[i]);
    dropped += all[i + 1];
    world.receive(stream, bytes_of(own.data(), own.size()), rank, Purpose::control);
    text += ",\n" + own;
  }
  text += fmt::format(
      "\n],\n\"otherData\":{{\"mesh\":{{\"data\":{},\"pipeline\":{},\"sequence\":{}}},\"dropped_events\":{}}}}}\n",
      m.data, m.pipeline, m.sequence, dropped);
  if (dropped > 0) log::warn("the trace lacks {} events that found no room; trace fewer steps", dropped);
  try {
    write_file_atomically(file_, text);
    log::info("trace of {} rank{} written to {}", m.size(), m.size() == 1 ? "" : "s", file_.string());
  } catch (const std::exception& e) {
    log::warn("the trace is lost: {}", e.what());
  }
}

}  // namespace deltapipe
