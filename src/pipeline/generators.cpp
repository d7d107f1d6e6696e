#include "pipeline/generators.h"

#include "core/error.h"

#include <algorithm>

namespace deltapipe::pipeline {
namespace {

Schedule empty_schedule(std::string name, int ranks, int chunks, int microbatches, StudentWork student) {
  if (ranks < 1 || chunks < 1 || microbatches < 1) {
    fail<InternalError>("schedule '{}': {} ranks, {} chunks, {} microbatches; each must be at least 1", name, ranks,
                        chunks, microbatches);
  }
  Schedule schedule;
  schedule.name = std::move(name);
  schedule.ranks = ranks;
  schedule.chunks = chunks;
  schedule.microbatches = microbatches;
  schedule.student = student;
  schedule.ahead.assign(static_cast<std::size_t>(schedule.stages()), 0);
  schedule.tasks.resize(static_cast<std::size_t>(ranks));
  return schedule;
}

/// Sizes of the groups of microbatches that go through all chunks together. A group smaller than p would reach the
/// first rank again after the next group's forwards are due there, and ranks would wait for each other.
std::vector<int> interleaved_groups(int ranks, int microbatches) {
  const int count = std::max(1, microbatches / ranks);
  std::vector<int> sizes(static_cast<std::size_t>(count), microbatches / count);
  for (int i = 0; i < microbatches % count; ++i) ++sizes[static_cast<std::size_t>(i)];
  return sizes;
}

int interleaved_warmup(int ranks, int chunks, int microbatches, int rank) {
  const int largest_group = interleaved_groups(ranks, microbatches).front();
  return std::min(2 * (ranks - 1 - rank) + (chunks - 1) * largest_group, chunks * microbatches);
}

/// Nothing comes back, so microbatches follow each other in the order of the interleaved forwards.
Schedule alignment(int ranks, int chunks, int microbatches) {
  Schedule schedule = empty_schedule("align", ranks, chunks, microbatches, StudentWork::align);
  int first = 0;
  for (const int size : interleaved_groups(ranks, microbatches)) {
    for (int c = 0; c < chunks; ++c) {
      for (int i = first; i < first + size; ++i) {
        for (auto& list : schedule.tasks) list.push_back({TaskKind::align, i, c, 0});
      }
    }
    first += size;
  }
  return schedule;
}

}  // namespace

Schedule one_f_one_b(int ranks, int microbatches) {
  Schedule schedule = empty_schedule("1f1b", ranks, 1, microbatches, StudentWork::whole_backward);
  for (int r = 0; r < ranks; ++r) {
    auto& list = schedule.tasks[static_cast<std::size_t>(r)];
    const int warmup = std::min(ranks - 1 - r, microbatches);
    for (int i = 0; i < warmup; ++i) list.push_back({TaskKind::forward, i, 0, 0});
    for (int i = 0; i < microbatches; ++i) {
      if (warmup + i < microbatches) list.push_back({TaskKind::forward, warmup + i, 0, 0});
      list.push_back({TaskKind::backward, i, 0, 0});
    }
  }
  return schedule;
}

Schedule interleaved(int ranks, int chunks, int microbatches) {
  Schedule schedule = empty_schedule("interleaved", ranks, chunks, microbatches, StudentWork::whole_backward);
  std::vector<Task> forwards, backwards;  // the same order on every rank
  int first = 0;
  for (const int size : interleaved_groups(ranks, microbatches)) {
    for (int c = 0; c < chunks; ++c) {
      for (int i = first; i < first + size; ++i) {
        forwards.push_back({TaskKind::forward, i, c, 0});
        backwards.push_back({TaskKind::backward, i, chunks - 1 - c, 0});
      }
    }
    first += size;
  }
  for (int r = 0; r < ranks; ++r) {
    auto& list = schedule.tasks[static_cast<std::size_t>(r)];
    const auto warmup = static_cast<std::size_t>(interleaved_warmup(ranks, chunks, microbatches, r));
    list.assign(forwards.begin(), forwards.begin() + static_cast<std::ptrdiff_t>(warmup));
    for (std::size_t i = 0; i < backwards.size(); ++i) {
      if (warmup + i < forwards.size()) list.push_back(forwards[warmup + i]);
      list.push_back(backwards[i]);
    }
  }
  return schedule;
}

Schedule zero_bubble(int ranks, int microbatches) {
  Schedule schedule = empty_schedule("zero_bubble", ranks, 1, microbatches, StudentWork::split_backward);
  for (int r = 0; r < ranks; ++r) {
    auto& list = schedule.tasks[static_cast<std::size_t>(r)];
    const int warmup = std::min(ranks - 1 - r, microbatches);
    const int put_off = std::min(r, microbatches - warmup);  // weight parts that wait for the end of the step
    for (int i = 0; i < warmup; ++i) list.push_back({TaskKind::forward, i, 0, 0});
    for (int i = 0; i < microbatches; ++i) {
      if (warmup + i < microbatches) list.push_back({TaskKind::forward, warmup + i, 0, 0});
      list.push_back({TaskKind::backward_input, i, 0, 0});
      if (i >= put_off) list.push_back({TaskKind::backward_weight, i - put_off, 0, 0});
    }
    for (int i = microbatches - put_off; i < microbatches; ++i) list.push_back({TaskKind::backward_weight, i, 0, 0});
  }
  return schedule;
}

int in_flight_bound(const ScheduleRequest& q, int rank) {
  switch (q.kind) {
    case ScheduleKind::one_f_one_b: return std::min(q.microbatches, q.ranks - rank);
    case ScheduleKind::interleaved:
      return std::min(interleaved_warmup(q.ranks, q.chunks, q.microbatches, rank) + 1, q.chunks * q.microbatches);
    case ScheduleKind::zero_bubble: return std::min(q.microbatches, q.ranks);
    case ScheduleKind::align: return 0;
  }
  return 0;
}

Schedule with_teacher_inline(Schedule student) {
  Schedule schedule = std::move(student);
  schedule.teacher = Teacher::in_line;
  schedule.name += ", teacher inline";
  for (auto& list : schedule.tasks) {
    std::vector<Task> both;
    for (const Task& task : list) {
      if (task.kind == TaskKind::forward || task.kind == TaskKind::align) {
        both.push_back({TaskKind::teacher_forward, task.microbatch, task.chunk, 0});
      }
      both.push_back(task);
    }
    list = std::move(both);
  }
  return schedule;
}

Schedule make_schedule(const ScheduleRequest& q, const CostModel& cost) {
  if (q.chunks != 1 && q.kind != ScheduleKind::interleaved && q.kind != ScheduleKind::align) {
    fail<InternalError>("make_schedule: {} chunks; only interleaved and align have more than 1", q.chunks);
  }
  if (q.kind == ScheduleKind::align && q.teacher == Teacher::none) {
    fail<InternalError>("make_schedule: mixer alignment needs the teacher");
  }
  Schedule schedule;
  switch (q.kind) {
    case ScheduleKind::one_f_one_b: schedule = one_f_one_b(q.ranks, q.microbatches); break;
    case ScheduleKind::interleaved: schedule = interleaved(q.ranks, q.chunks, q.microbatches); break;
    case ScheduleKind::zero_bubble: schedule = zero_bubble(q.ranks, q.microbatches); break;
    case ScheduleKind::align: schedule = alignment(q.ranks, q.chunks, q.microbatches); break;
  }
  switch (q.teacher) {
    case Teacher::none: return schedule;
    case Teacher::in_line: return with_teacher_inline(std::move(schedule));
    case Teacher::ahead: return with_teacher_ahead(schedule, cost, q.kept_limit);
  }
  return schedule;
}

}  // namespace deltapipe::pipeline
