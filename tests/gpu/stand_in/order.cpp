#include "tests/gpu/stand_in/order.h"

#include "tests/gpu/stand_in/stand_in.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>

namespace deltapipe::stand_in {
namespace {

bool is_on() {
  static const bool on = setting("DELTAPIPE_STAND_IN_ORDER", 1) != 0;
  return on;
}

struct Past {
  std::uintptr_t begin, end;
  Access access;
  std::uint32_t number;  // of the stream's work
  const char* what;
};

struct StreamState {
  Clock clock;
  std::vector<Past> past;  // what the host does not know to be done
};

/// A copy that the host has not seen the end of.
struct UnderWay {
  std::size_t stream;
  std::uint32_t number;
  std::byte* host;
  std::size_t bytes;
  std::unique_ptr<std::byte[]> arriving;  // null: the copy reads host memory, which had this hash
  std::uint64_t hash;
  const char* what;
};

struct State {
  std::map<std::pair<cudaStream_t, int>, std::size_t> index;
  std::vector<StreamState> streams;
  std::vector<UnderWay> under_way;
  Clock host;
};

State& state() {
  static auto& s = *new State();
  return s;
}

thread_local bool gives_work = false;

std::uint32_t at(const Clock& clock, std::size_t i) { return i < clock.size() ? clock[i] : 0; }

void merge(Clock& into, const Clock& other) {
  if (into.size() < other.size()) into.resize(other.size());
  for (std::size_t i = 0; i < other.size(); ++i) into[i] = std::max(into[i], other[i]);
}

std::size_t index_of(cudaStream_t stream) {
  State& s = state();
  const bool is_default = stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread;
  const auto [found, is_new] = s.index.try_emplace({stream, is_default ? current_device() : -1}, s.streams.size());
  if (is_new) s.streams.emplace_back();
  return found->second;
}

/// The legacy default stream and those that were created without cudaStreamNonBlocking wait for each other.
void merge_default_streams(cudaStream_t stream, Clock& clock) {
  const State& s = state();
  const int device = device_of_stream(stream);
  if (!is_blocking(stream)) return;
  for (const auto& [key, index] : s.index) {
    const bool is_default = key.first == nullptr;
    if (is_default == (stream == nullptr) || !is_blocking(key.first)) continue;
    if ((is_default ? key.second : device_of_stream(key.first)) == device) merge(clock, s.streams[index].clock);
  }
}

bool conflict(const Past& earlier, const Use& use, Work work) {
  if (earlier.access == Access::write || use.access == Access::write) return true;
  // A kernel may have written what it was given; one that comes later may as well only read.
  return earlier.access == Access::unknown && use.access == Access::read && work == Work::transfer;
}

std::uint64_t hash_of(const std::byte* data, std::size_t bytes) {
  std::uint64_t hash = 0xcbf29ce484222325;
  std::size_t i = 0;
  for (; i + 8 <= bytes; i += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, data + i, sizeof word);
    hash = (hash ^ word) * 0x9e3779b97f4a7c15;
    hash ^= hash >> 29;
  }
  for (; i < bytes; ++i) hash = (hash ^ std::to_integer<std::uint64_t>(data[i])) * 0x100000001b3;
  return hash;
}

/// Of one that has ended. False, said, when it read memory that has changed since.
bool end(const UnderWay& copy) {
  if (copy.arriving != nullptr) {
    std::memcpy(copy.host, copy.arriving.get(), copy.bytes);
    return true;
  }
  if (hash_of(copy.host, copy.bytes) == copy.hash) return true;
  say_refusal(
      fmt::format("{}: its source, {} bytes of page-locked memory from {} on, changed before the host knew that "
                  "it was done",
                  copy.what, copy.bytes, static_cast<const void*>(copy.host)));
  return false;
}

template <class F>
bool end_if(const F& has_ended) {
  bool all_well = true;
  std::erase_if(state().under_way, [&](const UnderWay& copy) {
    if (!has_ended(copy)) return false;
    all_well = end(copy) && all_well;
    return true;
  });
  return all_well;
}

bool overlap(const UnderWay& copy, const void* begin, std::size_t bytes) {
  const auto* first = static_cast<const std::byte*>(begin);
  return copy.host < first + bytes && first < copy.host + copy.bytes;
}

}  // namespace

bool thread_gives_work() { return gives_work; }

bool queue(const char* what, cudaStream_t stream, std::span<const Use> uses, Work work) {
  gives_work = true;
  if (!is_on()) return true;
  const std::lock_guard lock(mutex());
  State& s = state();
  const std::size_t self = index_of(stream);
  Clock& clock = s.streams[self].clock;
  merge(clock, s.host);
  merge_default_streams(stream, clock);
  for (const Use& use : uses) {
    if (use.bytes == 0) continue;
    const auto begin = reinterpret_cast<std::uintptr_t>(use.begin), end = begin + use.bytes;
    for (std::size_t other = 0; other < s.streams.size(); ++other) {
      if (other == self) continue;
      for (const Past& p : s.streams[other].past) {
        if (p.number <= at(clock, other) || p.end <= begin || end <= p.begin || !conflict(p, use, work)) continue;
        say_refusal(
            fmt::format("{} and {} touch {:#x} ({}) on two streams, and no event or wait puts one after the "
                        "other",
                        p.what, what, std::max(begin, p.begin), describe(use.begin)));
        return false;
      }
    }
  }
  if (clock.size() <= self) clock.resize(self + 1);
  const std::uint32_t number = ++clock[self];
  constexpr std::size_t most = 1 << 18;  // of a job that never waits: the oldest are forgotten
  auto& past = s.streams[self].past;
  if (past.size() > most) past.erase(past.begin(), past.begin() + most / 2);
  for (const Use& use : uses) {
    const auto begin = reinterpret_cast<std::uintptr_t>(use.begin);
    if (use.bytes > 0) past.push_back({begin, begin + use.bytes, use.access, number, what});
  }
  return true;
}

bool queue_copy(const char* what, cudaStream_t stream, void* to, const void* from, std::size_t bytes) {
  const Use uses[] = {{from, bytes, Access::read}, {to, bytes, Access::write}};
  if (!queue(what, stream, uses, Work::transfer)) return false;
  const std::lock_guard lock(mutex());
  // The copy comes after those that brought what it reads; the host may not know of them yet.
  if (!is_on_device(from)) {
    end_if([&](const UnderWay& copy) { return copy.arriving != nullptr && overlap(copy, from, bytes); });
  }
  std::byte* source = behind(from);
  std::byte* target = behind(to);
  const bool is_locked_source = !is_on_device(from) && is_page_locked(from);
  const bool is_locked_target = !is_on_device(to) && is_page_locked(to);
  if (!is_on() || (!is_locked_source && !is_locked_target)) {
    std::memmove(target, source, bytes);
    // Host memory that is not page-locked: the call waits for the copy.
    return is_on_device(to) || host_waits_for(clock_of(stream));
  }
  const std::size_t self = index_of(stream);
  const std::uint32_t number = at(state().streams[self].clock, self);
  if (is_locked_target) {
    // What was read from there before has been read: this copy comes after it.
    if (!end_if([&](const UnderWay& copy) { return copy.arriving == nullptr && overlap(copy, to, bytes); }))
      return false;
    auto arriving = std::make_unique_for_overwrite<std::byte[]>(bytes);
    std::memcpy(arriving.get(), source, bytes);
    std::memset(target, 0xff, bytes);  // NaN in every float until it is there
    state().under_way.push_back({self, number, target, bytes, std::move(arriving), 0, what});
  } else {
    std::memmove(target, source, bytes);
    state().under_way.push_back({self, number, source, bytes, nullptr, hash_of(source, bytes), what});
  }
  return true;
}

Clock clock_of(cudaStream_t stream) {
  const std::lock_guard lock(mutex());
  return state().streams.empty() && !is_on() ? Clock() : state().streams[index_of(stream)].clock;
}

void wait_for(cudaStream_t stream, const Clock& clock) {
  const std::lock_guard lock(mutex());
  merge(state().streams[index_of(stream)].clock, clock);
}

bool host_waits_for(const Clock& clock) {
  const std::lock_guard lock(mutex());
  State& s = state();
  merge(s.host, clock);
  for (std::size_t i = 0; i < s.streams.size(); ++i) {
    std::erase_if(s.streams[i].past, [&](const Past& p) { return p.number <= at(s.host, i); });
  }
  return end_if([&](const UnderWay& copy) { return copy.number <= at(s.host, copy.stream); });
}

bool host_waits_for_all() {
  const std::lock_guard lock(mutex());
  Clock all;
  for (const StreamState& s : state().streams) merge(all, s.clock);
  return host_waits_for(all);
}

void settle_host_memory(const void* begin, std::size_t bytes) {
  const std::lock_guard lock(mutex());
  end_if([&](const UnderWay& copy) { return overlap(copy, begin, bytes); });
}

}  // namespace deltapipe::stand_in
