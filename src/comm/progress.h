// The one loop that every wait runs: it advances all unfinished operations of the process, so that ranks may wait for
// theirs in any order, sleeps a little longer each time, and gives up at the deadline.
#pragma once

#include "comm/communicator.h"

#include <functional>
#include <string>
#include <thread>
#include <vector>

namespace deltapipe {

class Progress {
 public:
  /// Something that moves on when it is called; MPI itself makes progress only inside its calls.
  class Operation {
   public:
    virtual ~Operation() = default;
    virtual void advance() = 0;
  };

  explicit Progress(const CommunicationSettings& settings) : settings_(settings) {}

  CommunicationSettings& settings() { return settings_; }
  const std::string& where() const { return where_; }
  void set_where(std::string where) { where_ = std::move(where); }

  void add(Operation* operation) { operations_.push_back(operation); }
  void remove(Operation* operation) noexcept { std::erase(operations_, operation); }
  /// Throws CommunicationError on an MPI error, InternalError on a thread other than the one that made this object.
  void advance_all();
  /// Runs until done() holds, then returns true; false after timeout_s, in which time that this process itself was
  /// stopped (SIGSTOP, a suspended machine) does not count: others were not silent then. It yields the processor for 50
  /// microseconds, then sleeps, from 1 microsecond up to 0.2 milliseconds at a time.
  bool wait_until(const std::function<bool()>& done);

 private:
  CommunicationSettings settings_;
  std::string where_;
  std::vector<Operation*> operations_;
  std::thread::id thread_ = std::this_thread::get_id();
};

}  // namespace deltapipe
