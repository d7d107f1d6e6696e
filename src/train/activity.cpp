#include "train/activity.h"

#include "core/error.h"
#include "core/intervals.h"

#include <algorithm>

namespace deltapipe {
namespace {

double seconds(const Intervals& list) { return 1e-9 * static_cast<double>(length(list)); }

Interval time_of(const trace::Event& e) { return {e.begin_ns, e.end_ns}; }

}  // namespace

Activity measure_activity(std::span<const trace::Event> events, std::int64_t step) {
  const auto marked = std::find_if(events.begin(), events.end(), [&](const trace::Event& e) {
    return e.category == "step" && e.track == trace::Track::tasks && e.step == step;
  });
  if (marked == events.end()) fail<InternalError>("measure_activity: step {} has not been recorded", step);
  const Intervals whole{time_of(*marked)};
  const bool of_device = std::any_of(events.begin(), events.end(), [](const auto& e) { return e.on_device; });

  Intervals work, waits, phases;
  std::map<std::string, Intervals> waits_along, messages_along;
  for (const trace::Event& e : events) {
    if (e.on_device != of_device) continue;  // of the host, beside a device
    if (e.track == trace::Track::communication) {
      const std::string axis(e.category);
      const bool is_wait = e.lane.empty(), is_message = !of_device || !is_wait;
      if (is_wait) waits.push_back(time_of(e));
      if (is_wait) waits_along[axis].push_back(time_of(e));
      if (is_message) messages_along[axis].push_back(time_of(e));
    } else if (e.category == "task" || e.category == "optimizer") {
      work.push_back(time_of(e));
      if (e.category == "optimizer") phases.push_back(time_of(e));
    }
  }
  waits = united(std::move(waits));
  const Intervals busy = common(without(united(std::move(work)), waits), whole);
  const Intervals idle = without(whole, busy);

  Activity a;
  a.step_s = seconds(whole);
  a.idle_s = seconds(idle);
  a.update_s = seconds(without(common(united(std::move(phases)), whole), waits));
  a.all.held_up_s = seconds(common(waits, whole));
  for (auto& [axis, list] : waits_along) a.axes[axis].held_up_s = seconds(common(united(std::move(list)), whole));
  Intervals messages;
  for (auto& [axis, list] : messages_along) {
    messages.insert(messages.end(), list.begin(), list.end());
    const Intervals own = common(united(std::move(list)), whole);
    a.axes[axis].messages_s = seconds(own);
    a.axes[axis].unhidden_s = seconds(common(own, idle));
  }
  messages = common(united(std::move(messages)), whole);
  a.all.messages_s = seconds(messages);
  a.all.unhidden_s = seconds(common(messages, idle));
  for (const trace::Event& e : events) {
    if (e.on_device != of_device || e.category != "task") continue;
    if (e.begin_ns < whole.front().begin || e.begin_ns >= whole.front().end) continue;
    Activity::Work& w = a.tasks[{std::string(e.name), e.chunk}];
    w.seconds += seconds(without({time_of(e)}, waits));
    ++w.count;
  }
  return a;
}

}  // namespace deltapipe
