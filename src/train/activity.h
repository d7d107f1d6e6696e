// What a recording (core/trace.h) says of a step on one rank: how long its compute stream worked, what held it up, and
// which messages ran while it did nothing.
//
// A rank works while it is in a task or a phase of the optimizer and no wait for messages is in between. On CUDA that
// is the device's time: what gaps kernels leave between them counts as work, and a gap in which the host is late with
// the next task as idle. On the CPU messages travel within the calls that wait for them, and all of that is waiting.
#pragma once

#include "core/trace.h"

#include <map>
#include <string>
#include <utility>

namespace deltapipe {

/// Seconds.
struct Activity {
  double step_s = 0;
  double idle_s = 0;  // of the step, neither in a task nor in a phase of the optimizer, or held up in one

  struct Along {
    double held_up_s = 0;   // compute stood still for these messages
    double messages_s = 0;  // messages were under way or waited for their other rank
    double unhidden_s = 0;  // of that, compute did nothing
  };
  std::map<std::string, Along> axes;  // by the mesh's axis
  Along all;                          // of all axes: what overlaps counts once

  /// Without what held it up.
  struct Work {
    double seconds = 0;
    int count = 0;
  };
  std::map<std::pair<std::string, int>, Work> tasks;  // by kind and chunk: those that began in the step
  double update_s = 0;                                // in phases of the optimizer, without what held them up

  double idle_share() const { return idle_s / step_s; }
};

/// Of the step that a span of category "step" marks. Throws InternalError when there is none.
Activity measure_activity(std::span<const trace::Event> events, std::int64_t step);

}  // namespace deltapipe
