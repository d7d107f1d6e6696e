#include "pipeline/schedule.h"

#include <fmt/core.h>

namespace deltapipe::pipeline {

std::string_view name_of(TaskKind kind) {
  constexpr std::array<std::string_view, task_kinds> names{"teacher_forward", "forward",         "backward",
                                                           "backward_input",  "backward_weight", "align"};
  return names[static_cast<std::size_t>(kind)];
}

std::string_view name_of(MessageKind kind) {
  constexpr std::array<std::string_view, message_kinds> names{"teacher", "activation", "gradient"};
  return names[static_cast<std::size_t>(kind)];
}

std::string describe(const Task& task) {
  std::string text = fmt::format("{} of {}microbatch {}", name_of(task.kind),
                                 task.step_offset == 0 ? "" : "next step's ", task.microbatch);
  if (task.chunk > 0) text += fmt::format(", chunk {}", task.chunk);
  return text;
}

Dependencies dependencies(const Schedule& schedule, int rank, const Task& task) {
  const int stage = schedule.stage_of(rank, task.chunk);
  Dependencies needed;
  const auto add = [&](TaskKind kind, int at_stage) {
    needed.add(schedule.rank_of(at_stage), {kind, task.microbatch, schedule.chunk_of(at_stage), task.step_offset});
  };
  const bool has_teacher = schedule.teacher != Teacher::none;
  switch (task.kind) {
    case TaskKind::teacher_forward:
      if (stage > 0) add(TaskKind::teacher_forward, stage - 1);
      break;
    case TaskKind::forward:
      if (stage > 0) add(TaskKind::forward, stage - 1);
      if (has_teacher && schedule.is_last(stage)) add(TaskKind::teacher_forward, stage);
      break;
    case TaskKind::backward:
    case TaskKind::backward_input:
      add(TaskKind::forward, stage);
      if (!schedule.is_last(stage)) add(task.kind, stage + 1);
      if (has_teacher) add(TaskKind::teacher_forward, stage);
      break;
    case TaskKind::backward_weight: add(TaskKind::backward_input, stage); break;
    case TaskKind::align: add(TaskKind::teacher_forward, stage); break;
  }
  return needed;
}

namespace {

MessageKind message_of(TaskKind sender) {
  switch (sender) {
    case TaskKind::teacher_forward: return MessageKind::teacher;
    case TaskKind::forward: return MessageKind::activation;
    default: return MessageKind::gradient;
  }
}

}  // namespace

std::optional<Message> incoming(const Schedule& schedule, int rank, const Task& task) {
  for (const Dependency& needed : dependencies(schedule, rank, task)) {
    if (needed.rank != rank) return Message{message_of(needed.task.kind), needed.rank, rank};
  }
  return std::nullopt;
}

std::optional<Message> outgoing(const Schedule& schedule, int rank, const Task& task) {
  const int stage = schedule.stage_of(rank, task.chunk);
  int next = -1;
  switch (task.kind) {
    case TaskKind::teacher_forward:
    case TaskKind::forward: next = stage + 1; break;
    case TaskKind::backward:
    case TaskKind::backward_input: next = stage - 1; break;
    case TaskKind::backward_weight:
    case TaskKind::align: break;
  }
  if (next < 0 || next >= schedule.stages() || schedule.rank_of(next) == rank) return std::nullopt;
  return Message{message_of(task.kind), rank, schedule.rank_of(next)};
}

namespace {

TaskLists tasks_with(const Schedule& schedule, int step_offset) {
  TaskLists lists(schedule.tasks.size());
  for (std::size_t r = 0; r < lists.size(); ++r) {
    for (Task task : schedule.tasks[r]) {
      if (task.step_offset != step_offset) continue;
      task.step_offset = 0;
      lists[r].push_back(task);
    }
  }
  return lists;
}

}  // namespace

TaskLists prologue(const Schedule& schedule) { return tasks_with(schedule, 1); }
TaskLists last_step(const Schedule& schedule) { return tasks_with(schedule, 0); }

}  // namespace deltapipe::pipeline
