// Where a step's time goes: seconds by operation and by task, with a wait for the device around each, so that nothing
// overlaps. A profiled step is slower than a step.
#pragma once

#include "core/stream.h"
#include "pipeline/executor.h"

#include <chrono>
#include <map>
#include <string>

namespace deltapipe::bench {

/// Of one kind of work, over all profiled steps.
struct Share {
  double seconds = 0;
  long calls = 0;
};

class Profile {
 public:
  /// Observes every operation of the process and the executor's tasks until it goes. One at a time.
  Profile(pipeline::Executor& executor, const Stream& stream);
  ~Profile();
  Profile(const Profile&) = delete;
  Profile& operator=(const Profile&) = delete;

  const std::map<std::string, Share>& operations() const { return operations_; }
  const std::map<std::string, Share>& tasks() const { return tasks_; }

 private:
  using Clock = std::chrono::steady_clock;
  static void on_call(const Stream& stream, const char* name, bool begins);

  pipeline::Executor& executor_;
  Stream stream_;
  std::map<std::string, Share> operations_, tasks_;
  Clock::time_point call_begin_, task_begin_;
};

}  // namespace deltapipe::bench
