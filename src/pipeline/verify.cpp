#include "core/error.h"
#include "pipeline/execution.h"

#include <algorithm>

namespace deltapipe::pipeline {
namespace {

void check_sizes(const Schedule& s) {
  if (s.ranks < 1 || s.chunks < 1 || s.microbatches < 1) {
    fail<InternalError>("schedule '{}': {} ranks, {} chunks, {} microbatches; each must be at least 1", s.name, s.ranks,
                        s.chunks, s.microbatches);
  }
  if (std::ssize(s.tasks) != s.ranks) {
    fail<InternalError>("schedule '{}': {} task lists for {} ranks", s.name, s.tasks.size(), s.ranks);
  }
  if (s.student == StudentWork::align && s.teacher == Teacher::none) {
    fail<InternalError>("schedule '{}': mixer alignment without a teacher", s.name);
  }
  if (std::ssize(s.ahead) != s.stages()) {
    fail<InternalError>("schedule '{}': 'ahead' has {} entries for {} virtual stages", s.name, s.ahead.size(),
                        s.stages());
  }
  int limit = s.teacher == Teacher::ahead ? s.microbatches : 0;
  for (int stage = 0; stage < s.stages(); ++stage) {
    const int ahead = s.ahead[static_cast<std::size_t>(stage)];
    if (ahead < 0 || ahead > limit) {
      fail<InternalError>("schedule '{}': stage {} starts a step with {} teacher forwards done, possible are 0 to {}",
                          s.name, stage, ahead, limit);
    }
    limit = ahead;
  }
}

/// Whether a complete step has this task on this rank.
bool belongs(const Schedule& s, int rank, const Task& task) {
  if (task.microbatch < 0 || task.microbatch >= s.microbatches || task.chunk < 0 || task.chunk >= s.chunks)
    return false;
  if (task.kind == TaskKind::teacher_forward) {
    if (s.teacher == Teacher::none) return false;
    const int ahead = s.ahead[static_cast<std::size_t>(s.stage_of(rank, task.chunk))];
    return task.step_offset == (task.microbatch < ahead ? 1 : 0);
  }
  if (task.step_offset != 0) return false;
  switch (s.student) {
    case StudentWork::whole_backward: return task.kind == TaskKind::forward || task.kind == TaskKind::backward;
    case StudentWork::split_backward:
      return task.kind == TaskKind::forward || task.kind == TaskKind::backward_input ||
             task.kind == TaskKind::backward_weight;
    case StudentWork::align: return task.kind == TaskKind::align;
  }
  return false;
}

void check_complete(const Schedule& s) {
  for (int r = 0; r < s.ranks; ++r) {
    const std::size_t columns = static_cast<std::size_t>(s.chunks) * static_cast<std::size_t>(s.microbatches);
    std::vector<int> place(task_kinds * columns, -1);
    const auto slot = [&](const Task& t) -> int& {
      return place[static_cast<std::size_t>(t.kind) * columns +
                   static_cast<std::size_t>(t.chunk) * static_cast<std::size_t>(s.microbatches) +
                   static_cast<std::size_t>(t.microbatch)];
    };
    const auto& list = s.tasks[static_cast<std::size_t>(r)];
    for (int i = 0; i < std::ssize(list); ++i) {
      const Task& task = list[static_cast<std::size_t>(i)];
      if (!belongs(s, r, task)) {
        fail<InternalError>("schedule '{}': rank {} has {} at place {}, which is no part of its step", s.name, r,
                            describe(task), i);
      }
      if (slot(task) >= 0) {
        fail<InternalError>("schedule '{}': rank {} has {} twice, at places {} and {}", s.name, r, describe(task),
                            slot(task), i);
      }
      slot(task) = i;
    }
    for (int kind = 0; kind < task_kinds; ++kind) {
      for (int chunk = 0; chunk < s.chunks; ++chunk) {
        for (int microbatch = 0; microbatch < s.microbatches; ++microbatch) {
          for (int offset = 0; offset < 2; ++offset) {
            const Task task{static_cast<TaskKind>(kind), microbatch, chunk, offset};
            if (belongs(s, r, task) && slot(task) < 0) {
              fail<InternalError>("schedule '{}': rank {} lacks {}", s.name, r, describe(task));
            }
          }
        }
      }
    }
  }
}

/// A message as sender and receiver know it: the sending task and the step of its data.
struct Sent {
  int step;
  Task task;
  friend bool operator==(const Sent&, const Sent&) = default;
};

std::string describe(const Sent& message) { return fmt::format("{} (step {})", describe(message.task), message.step); }

void check_channels(const Schedule& s, const std::vector<Segment>& segments) {
  struct Channel {
    int to = 0;
    std::vector<Sent> sent, received;
  };
  std::vector<Channel> channels(static_cast<std::size_t>(message_kinds) * static_cast<std::size_t>(s.ranks));
  const auto channel = [&](const Message& m) -> Channel& {  // a rank sends messages of one kind to one other rank only
    Channel& c = channels[static_cast<std::size_t>(m.kind) * static_cast<std::size_t>(s.ranks) +
                          static_cast<std::size_t>(m.from)];
    c.to = m.to;
    return c;
  };
  const auto sent_by = [](const Segment& segment, Task task) {
    const int step = segment.step + task.step_offset;
    task.step_offset = 0;
    return Sent{step, task};
  };
  for (const Segment& segment : segments) {
    for (int r = 0; r < s.ranks; ++r) {
      for (const Task& task : (*segment.lists)[static_cast<std::size_t>(r)]) {
        if (const auto m = outgoing(s, r, task)) channel(*m).sent.push_back(sent_by(segment, task));
        for (const Dependency& needed : dependencies(s, r, task)) {
          if (needed.rank != r) channel(*incoming(s, r, task)).received.push_back(sent_by(segment, needed.task));
        }
      }
    }
  }
  for (std::size_t i = 0; i < channels.size(); ++i) {
    const auto& [to, sent, received] = channels[i];
    const auto [a, b] = std::mismatch(sent.begin(), sent.end(), received.begin(), received.end());
    if (a == sent.end() && b == received.end()) continue;
    const auto ranks = static_cast<std::size_t>(s.ranks);
    fail<InternalError>(
        "schedule '{}': channel {} from rank {} to rank {}: message {} is of {}, the receiver expects {}", s.name,
        name_of(static_cast<MessageKind>(i / ranks)), i % ranks, to, a - sent.begin(),
        a == sent.end() ? "nothing" : describe(*a), b == received.end() ? "nothing" : describe(*b));
  }
}

void check_microbatch_order(const Schedule& s) {
  for (int r = 0; r < s.ranks; ++r) {
    std::vector<const Task*> latest(static_cast<std::size_t>(task_kinds) * static_cast<std::size_t>(s.chunks), nullptr);
    for (const Task& task : s.tasks[static_cast<std::size_t>(r)]) {
      const Task*& before = latest[static_cast<std::size_t>(task.kind) * static_cast<std::size_t>(s.chunks) +
                                   static_cast<std::size_t>(task.chunk)];
      const auto index = [&](const Task& t) { return t.step_offset * s.microbatches + t.microbatch; };
      if (before != nullptr && index(*before) > index(task)) {
        fail<InternalError>("schedule '{}': rank {} has {} after {}; microbatches must come in order", s.name, r,
                            describe(task), describe(*before));
      }
      before = &task;
    }
  }
}

}  // namespace

void verify(const Schedule& schedule) {
  check_sizes(schedule);
  check_complete(schedule);
  const TaskLists first = prologue(schedule), last = last_step(schedule);
  const std::vector<Segment> segments{
      {0, false, &first}, {0, true, &schedule.tasks}, {1, true, &schedule.tasks}, {2, true, &last}};
  check_channels(schedule, segments);
  check_microbatch_order(schedule);
  play(schedule, segments, CostModel::uniform(schedule.stages(), {}));
}

}  // namespace deltapipe::pipeline
