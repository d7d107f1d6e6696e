#include "pipeline/buffers.h"

#include "core/error.h"

#include <algorithm>
#include <deque>
#include <map>
#include <tuple>
#include <vector>

namespace deltapipe::pipeline {
namespace {

/// A task of the whole run: kind, stage, microbatch and step.
using Id = std::tuple<TaskKind, int, int, int>;

Id id_of(const Schedule& s, int rank, const Task& task, int step) {
  return {task.kind, s.stage_of(rank, task.chunk), task.microbatch, step + task.step_offset};
}

/// The task that receives what this one sends.
Id receiver_of(const Schedule& s, int rank, const Task& task, int step) {
  const bool upstream = task.kind == TaskKind::backward || task.kind == TaskKind::backward_input;
  return {task.kind, s.stage_of(rank, task.chunk) + (upstream ? -1 : 1), task.microbatch, step + task.step_offset};
}

class Run {
 public:
  Run(const Schedule& schedule, int buffers) : s_(schedule), buffers_(static_cast<std::size_t>(buffers)) {
    sent_.resize(static_cast<std::size_t>(s_.ranks));
  }

  /// Every rank runs its list to the end, in any real timing.
  bool ends(const TaskLists& lists, int step) {
    std::vector<std::size_t> place(lists.size(), 0);
    for (std::size_t r = 0; r < lists.size(); ++r) reach(lists, place, static_cast<int>(r), step);
    for (bool moved = true; moved;) {
      moved = false;
      for (int r = 0; r < s_.ranks; ++r) {
        const auto i = static_cast<std::size_t>(r);
        while (place[i] < lists[i].size() && can_run(r, lists[i][place[i]], step)) {
          run(r, lists[i][place[i]++], step);
          reach(lists, place, r, step);
          moved = true;
        }
      }
    }
    for (std::size_t r = 0; r < lists.size(); ++r) {
      if (place[r] < lists[r].size()) return false;
    }
    return true;
  }

 private:
  /// A rank that has reached a task takes its message.
  void reach(const TaskLists& lists, const std::vector<std::size_t>& place, int r, int step) {
    const auto i = static_cast<std::size_t>(r);
    if (place[i] < lists[i].size()) reached_[id_of(s_, r, lists[i][place[i]], step)] = true;
  }
  bool sends_buffered(int r, const Task& task) const {
    const auto message = outgoing(s_, r, task);
    return message && message->kind == buffered_kind(s_);
  }
  bool can_run(int r, const Task& task, int step) {
    for (const Dependency& d : dependencies(s_, r, task)) {
      if (!done_[id_of(s_, d.rank, d.task, step)]) return false;
    }
    if (!sends_buffered(r, task)) return true;
    const std::deque<Id>& sent = sent_[static_cast<std::size_t>(r)];  // the buffer whose turn it is
    return sent.size() < buffers_ || reached_[sent.front()];
  }
  void run(int r, const Task& task, int step) {
    done_[id_of(s_, r, task, step)] = true;
    if (!sends_buffered(r, task)) return;
    std::deque<Id>& sent = sent_[static_cast<std::size_t>(r)];
    if (sent.size() == buffers_) sent.pop_front();
    sent.push_back(receiver_of(s_, r, task, step));
  }

  const Schedule& s_;
  std::size_t buffers_;
  std::map<Id, bool> done_, reached_;
  std::vector<std::deque<Id>> sent_;  // [rank]: receivers of what its buffers hold, oldest first
};

bool suffices(const Schedule& s, int buffers) {
  Run run(s, buffers);
  return run.ends(prologue(s), 0) && run.ends(s.tasks, 0) && run.ends(s.tasks, 1) && run.ends(last_step(s), 2);
}

}  // namespace

MessageKind buffered_kind(const Schedule& schedule) {
  return schedule.student == StudentWork::align ? MessageKind::teacher : MessageKind::gradient;
}

int send_buffers(const Schedule& schedule) {
  int most = 0;
  for (int r = 0; r < schedule.ranks; ++r) {
    int sends = 0;
    for (const Task& task : schedule.tasks[static_cast<std::size_t>(r)]) {
      const auto message = outgoing(schedule, r, task);
      if (message && message->kind == buffered_kind(schedule)) ++sends;
    }
    most = std::max(most, sends);
  }
  if (most == 0) return 0;
  for (int n = 1; n < 2 * most; ++n) {
    if (suffices(schedule, n)) return n;
  }
  return 2 * most;  // as many as two steps send
}

}  // namespace deltapipe::pipeline
