#include "core/error.h"
#include "core/random.h"
#include "pipeline/generators.h"

#include <algorithm>
#include <deque>

namespace deltapipe::pipeline {
namespace {

/// Draws one task after another, of any rank, among those whose needs are met and whose message is next on its channel.
class Draw {
 public:
  Draw(std::uint64_t seed, Schedule& schedule)
      : random_(seed, "random schedule"),
        s_(schedule),
        done_(2 * task_kinds * stages() * microbatches(), false),
        next_(task_kinds * stages(), 0),
        channels_(static_cast<std::size_t>(message_kinds * schedule.ranks)) {}

  void draw_ahead() {
    int limit = s_.microbatches;
    if (s_.chunks > 1) {
      // Chunks share channels, and messages under way between steps would have to keep one order on all of them.
      const int all = static_cast<int>(random_.next_below(static_cast<std::uint64_t>(limit) + 1));
      std::fill(s_.ahead.begin(), s_.ahead.end(), all);
    } else {
      for (int& ahead : s_.ahead) {
        ahead = limit = static_cast<int>(random_.next_below(static_cast<std::uint64_t>(limit) + 1));
      }
    }
  }

  void draw_tasks() {
    for (int stage = 0; stage < s_.stages(); ++stage) {  // what the step before has run
      const int rank = s_.rank_of(stage);
      for (int i = 0; i < s_.ahead[static_cast<std::size_t>(stage)]; ++i) {
        const Task task{TaskKind::teacher_forward, i, s_.chunk_of(stage), 0};
        done(rank, task) = true;
        const bool under_way = stage + 1 < s_.stages() && i >= s_.ahead[static_cast<std::size_t>(stage) + 1];
        if (under_way) send(rank, task);
      }
      next_[index(TaskKind::teacher_forward, stage)] = s_.ahead[static_cast<std::size_t>(stage)];
    }
    std::vector<std::pair<int, Task>> ready;
    for (;;) {
      ready.clear();
      for (int stage = 0; stage < s_.stages(); ++stage) collect(stage, ready);
      if (ready.empty()) return;
      const auto& [rank, task] = ready[random_.next_below(ready.size())];
      run(rank, task);
    }
  }

 private:
  using Key = std::array<int, 3>;  // microbatch, chunk and step offset of the sending task

  std::size_t stages() const { return static_cast<std::size_t>(s_.stages()); }
  std::size_t microbatches() const { return static_cast<std::size_t>(s_.microbatches); }
  std::size_t index(TaskKind kind, int stage) const {
    return static_cast<std::size_t>(kind) * stages() + static_cast<std::size_t>(stage);
  }
  std::vector<bool>::reference done(int rank, const Task& t) {
    const std::size_t row =
        static_cast<std::size_t>(t.step_offset * task_kinds) * stages() + index(t.kind, s_.stage_of(rank, t.chunk));
    return done_[row * microbatches() + static_cast<std::size_t>(t.microbatch)];
  }
  std::deque<Key>& channel(const Message& m) {
    return channels_[static_cast<std::size_t>(static_cast<int>(m.kind) * s_.ranks + m.from)];
  }
  void send(int rank, const Task& task) {
    if (const auto m = outgoing(s_, rank, task)) channel(*m).push_back({task.microbatch, task.chunk, task.step_offset});
  }

  /// The next task of each kind on the stage, if it may run now.
  void collect(int stage, std::vector<std::pair<int, Task>>& ready) {
    const int rank = s_.rank_of(stage), m = s_.microbatches;
    for (int k = 0; k < task_kinds; ++k) {
      const auto kind = static_cast<TaskKind>(k);
      if (!takes_part(kind)) continue;
      const int i = next_[index(kind, stage)];
      const int end = kind == TaskKind::teacher_forward ? m + s_.ahead[static_cast<std::size_t>(stage)] : m;
      if (i >= end) continue;
      const Task task{kind, i % m, s_.chunk_of(stage), i / m};
      bool met = true;
      for (const Dependency& needed : dependencies(s_, rank, task)) {
        met = met && done(needed.rank, needed.task);
        if (!met || needed.rank == rank) continue;
        const Key wanted{needed.task.microbatch, needed.task.chunk, needed.task.step_offset};
        met = channel(*incoming(s_, rank, task)).front() == wanted;
      }
      if (met) ready.emplace_back(rank, task);
    }
  }
  bool takes_part(TaskKind kind) const {
    switch (kind) {
      case TaskKind::teacher_forward: return s_.teacher != Teacher::none;
      case TaskKind::forward: return s_.student != StudentWork::align;
      case TaskKind::backward: return s_.student == StudentWork::whole_backward;
      case TaskKind::backward_input:
      case TaskKind::backward_weight: return s_.student == StudentWork::split_backward;
      case TaskKind::align: return s_.student == StudentWork::align;
    }
    return false;
  }
  void run(int rank, const Task& task) {
    if (const auto m = incoming(s_, rank, task)) channel(*m).pop_front();
    send(rank, task);
    done(rank, task) = true;
    ++next_[index(task.kind, s_.stage_of(rank, task.chunk))];
    s_.tasks[static_cast<std::size_t>(rank)].push_back(task);
  }

  RandomStream random_;
  Schedule& s_;
  std::vector<bool> done_;
  std::vector<int> next_;  // [kind, stage]: microbatches begun; the teacher's count on into the next step
  std::vector<std::deque<Key>> channels_;
};

}  // namespace

Schedule random_legal_schedule(std::uint64_t seed, int ranks, int chunks, int microbatches, StudentWork student,
                               Teacher teacher) {
  require(ranks >= 1 && chunks >= 1 && microbatches >= 1, "random_legal_schedule: a size is below 1");
  require(student != StudentWork::align || teacher != Teacher::none, "random_legal_schedule: align needs a teacher");
  Schedule schedule;
  schedule.name = fmt::format("random {}", seed);
  schedule.ranks = ranks;
  schedule.chunks = chunks;
  schedule.microbatches = microbatches;
  schedule.student = student;
  schedule.teacher = teacher;
  schedule.ahead.assign(static_cast<std::size_t>(schedule.stages()), 0);
  schedule.tasks.resize(static_cast<std::size_t>(ranks));
  Draw draw(seed, schedule);
  if (teacher == Teacher::ahead) draw.draw_ahead();
  draw.draw_tasks();
  return schedule;
}

}  // namespace deltapipe::pipeline
