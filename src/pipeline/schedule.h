// Pipeline schedules as data: for every rank the ordered list of tasks of one optimizer step.
//
// The models are cut into S = p * v virtual stages of consecutive layers, v model chunks on each of p ranks: virtual
// stage s is chunk s / p of rank s % p. Stage s holds the same layers of teacher and student; stage 0 also embeds, the
// last stage also has both heads. A step processes m microbatches.
//
// Rules that every schedule keeps, and verify() holds it to:
// - dependencies() says what must have ended before a task starts.
// - A task that needs another rank's result receives exactly one message and a task sends at most one. Sends are
// buffered
//   and never block; a receive blocks. On a channel (from, to, message kind) messages are received in the order sent.
// - Tasks of one kind and chunk run in the order of the microbatches, so sums over microbatches (gradients, losses) are
//   bitwise the same in every schedule. Where the teacher's forwards stand has no influence on any result.
// - Ranks meet between steps (the global gradient norm and the update need every gradient). Tasks never cross that
// line,
//   but teacher forwards of the next step's microbatches may stand before it: step_offset = 1.
//
// Carried from step to step: stage s enters a step with the teacher's forward of microbatches 0 .. ahead[s] - 1 already
// run (their hidden states kept) and, where ahead[s - 1] > ahead[s], with the messages in between under way. In
// exchange its list holds the forwards of the next step's microbatches 0 .. ahead[s] - 1 with step_offset 1. A run is
//   prologue(), then the step's list again and again, then last_step() once,
// after which every teacher forward has run exactly once. After a resume, or when sequence length or microbatches
// change, the prologue runs again: nothing of this is part of a checkpoint.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace deltapipe::pipeline {

enum class TaskKind : std::uint8_t {
  teacher_forward,
  forward,          // of the student; on the last stage with both heads and the losses on logits
  backward,         // whole, with the hidden-state losses of the stage's layers
  backward_input,   // the same in two parts: the gradient of the stage's input, with those losses,
  backward_weight,  // and the gradients of its weights
  align,            // mixer alignment: student mixers forward and backward on the teacher's hidden states
};
inline constexpr int task_kinds = 6;

std::string_view name_of(TaskKind kind);

struct Task {
  TaskKind kind = TaskKind::forward;
  int microbatch = 0;
  int chunk = 0;
  int step_offset = 0;  // 1: of the next step's data; teacher_forward only
  friend bool operator==(const Task&, const Task&) = default;
};

/// "forward of microbatch 3", "teacher_forward of next step's microbatch 0, chunk 1".
std::string describe(const Task& task);

enum class Teacher : std::uint8_t {
  none,     // no loss needs it
  in_line,  // "inline": right before the student's forward of the same microbatch
  ahead,    // in the bubbles
};
/// What the student does: forward and backward, whole or in two parts, or mixer alignment without messages of its own.
enum class StudentWork : std::uint8_t { whole_backward, split_backward, align };

using TaskLists = std::vector<std::vector<Task>>;  // [rank], in order of execution

struct Schedule {
  std::string name;  // for people: "1f1b, teacher ahead"
  int ranks = 1;
  int chunks = 1;
  int microbatches = 1;
  StudentWork student = StudentWork::whole_backward;
  Teacher teacher = Teacher::none;
  std::vector<int> ahead;  // [virtual stage]: see above; never grows from a stage to the next one
  TaskLists tasks;         // one step between two others

  int stages() const { return ranks * chunks; }
  int stage_of(int rank, int chunk) const { return chunk * ranks + rank; }
  int rank_of(int stage) const { return stage % ranks; }
  int chunk_of(int stage) const { return stage / ranks; }
  bool is_last(int stage) const { return stage == stages() - 1; }
};

/// A task on a rank whose end another task waits for.
struct Dependency {
  int rank = 0;
  Task task;
};
class Dependencies {
 public:
  void add(int rank, const Task& task) { items_[static_cast<std::size_t>(count_++)] = {rank, task}; }
  const Dependency* begin() const { return items_.data(); }
  const Dependency* end() const { return items_.data() + count_; }

 private:
  std::array<Dependency, 3> items_{};
  int count_ = 0;
};

/// With stage s = the task's, i = its microbatch:
///   teacher_forward(i, s) needs teacher_forward(i, s - 1)
///   forward(i, s) needs forward(i, s - 1); on the last stage, whose head compares logits, also teacher_forward(i, s)
///   backward(i, s) and backward_input(i, s) need forward(i, s), the same of (i, s + 1), and for the losses on hidden
///   states teacher_forward(i, s)
///   backward_weight(i, s) needs backward_input(i, s)
///   align(i, s) needs teacher_forward(i, s)
/// The offset of a teacher forward passes to what it depends on; microbatches that the step before has run are
/// included.
Dependencies dependencies(const Schedule& schedule, int rank, const Task& task);

/// What travels between ranks: hidden states downstream, gradients upstream.
enum class MessageKind : std::uint8_t { teacher, activation, gradient };
inline constexpr int message_kinds = 3;  // each has the tag of its number, on the pipeline's communicator
std::string_view name_of(MessageKind kind);

struct Message {
  MessageKind kind = MessageKind::activation;
  int from = 0;
  int to = 0;
};
/// The message that the task receives before it starts; none for a stage at an end, or when its neighbour is the same
/// rank.
std::optional<Message> incoming(const Schedule& schedule, int rank, const Task& task);
/// The message that the task sends at its end.
std::optional<Message> outgoing(const Schedule& schedule, int rank, const Task& task);

/// The teacher forwards that the first step of a run expects to have been run, as tasks of step_offset 0.
TaskLists prologue(const Schedule& schedule);
/// The step's lists without the next step's forwards.
TaskLists last_step(const Schedule& schedule);

/// Throws InternalError with one line that names rank, place and task: a size that does not fit, a missing, repeated or
/// foreign task, messages received in another order than sent, microbatches out of order, a task before what it needs,
/// or a deadlock with every rank's unmet need. Looks at prologue, steps and last step together.
void verify(const Schedule& schedule);

}  // namespace deltapipe::pipeline
