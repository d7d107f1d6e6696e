// Optimizer states that live in page-locked host memory (memory.optimizer = "host"), brought to the device a piece at a
// time for their update and taken back. Three streams: pieces come in on one, are updated on the caller's, go back on a
// third, so that copies of both directions and updates run beside each other; a slot of device memory is filled again
// when what it held has gone.
#pragma once

#include "core/arena.h"
#include "core/device_memory.h"
#include "core/stream.h"

#include <array>
#include <cstdint>
#include <optional>
#include <span>

namespace deltapipe {

class StateFerry {
 public:
  /// States of one kind that are updated together: master weights and both moments.
  static constexpr std::size_t most_states = 3;
  /// Elements of each state in a piece. 8 Mi: a copy of 32 MiB, long against its start.
  static constexpr std::int64_t piece = std::int64_t{1} << 23;

  /// Takes its slots from `device`, an arena on the device, for `states` tensors of `dtype` a piece.
  StateFerry(Arena& device, DType dtype, std::size_t states);

  /// For every piece [begin, end) of the states, which have one size: update(begin, end, copies on the device), queued
  /// on `stream`; what it leaves in the copies goes back. What follows on `stream` comes after the last copy.
  template <class F>
  void carry(const Stream& stream, std::span<const Tensor> states, const F& update) {
    if (stream.is_dry()) return;
    const std::int64_t n = states.front().numel();
    for (std::int64_t begin = 0; begin < n; begin += piece) {
      const std::int64_t end = begin + piece < n ? begin + piece : n;
      update(begin, end, bring(stream, states, begin, end));
      take_back(stream, states, begin, end);
    }
    leave(stream);
  }

 private:
  static constexpr std::size_t slots = 3;
  struct Slot {
    std::array<Tensor, most_states> states;
    std::optional<Event> filled, updated, empty;
  };

  std::span<const Tensor> bring(const Stream& stream, std::span<const Tensor> states, std::int64_t begin,
                                std::int64_t end);
  void take_back(const Stream& stream, std::span<const Tensor> states, std::int64_t begin, std::int64_t end);
  void leave(const Stream& stream);

  std::array<Slot, slots> slots_;
  std::array<Tensor, most_states> brought_;
  std::size_t next_ = 0;
  std::optional<StreamOwner> in_, out_;  // made at the first use: a plan has no device
};

}  // namespace deltapipe
