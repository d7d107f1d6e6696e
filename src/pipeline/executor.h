// Runs a rank's list of a schedule, task by task: what the simulator played, on real tensors.
//
// Memory: a microbatch (of one chunk) in flight has a slot, from the start of its forward to the end of its backward,
// and what the teacher leaves for it has another, until the student has used it. There are as many slots as the
// schedule ever fills, found before the first step. A message is received into its slot, when its task begins, and sent
// from its slot or a send buffer (buffers.h), while the next tasks run.
#pragma once

#include "core/arena.h"
#include "data/host_batch.h"
#include "model/weight_tape.h"
#include "pipeline/schedule.h"
#include "pipeline/stages.h"

#include <cstdint>
#include <functional>
#include <vector>

namespace deltapipe::pipeline {

class Executor {
 public:
  /// What a stage of the recipe fixes.
  struct Job {
    Objective objective;
    std::int64_t microbatch_sequences = 1;
    bool recompute = false;
    std::int64_t put_off_layers = 0;  // of a chunk: those whose weights' gradients a split backward puts off; 0: all
  };

  /// Takes slots from `activations` and send buffers from `communication`, for microbatches of `batch`. `stages`
  /// outlives this object. The schedule is a legal one (verify) for this many ranks and chunks. `sequence`: the ranks
  /// that share the sequences, or null.
  Executor(const Stages& stages, Schedule schedule, const Job& job, const HostBatch& batch,
           const SequenceParallel* sequence, Arena& activations, Arena& communication);

  /// Bytes at the start of `activations` that hold the teacher's states, the next step's included.
  std::size_t teacher_bytes() const { return teacher_bytes_; }
  /// Whether a step runs teacher forwards of the next step's batch.
  bool looks_ahead() const;
  const Schedule& schedule() const { return schedule_; }

  struct Step {
    const HostBatch* batch = nullptr;
    const HostBatch* next = nullptr;  // the next step's, where looks_ahead(); null: this is the last step
    double token_weight = 0;          // 1 over the unmasked tokens of the whole global batch
    LossSums sums;                    // added to
  };
  /// One step's forwards and backwards: adds to gradients and sums. The first step after construction or stop() runs
  /// the schedule's prologue before it. All ranks of the pipeline call it.
  void run(const Context& c, const Step& step);
  /// Ends a run of steps early: takes and drops what is under way for a step that will not be.
  void stop(const Context& c);

  /// Called around every task, when set: for traces.
  std::function<void(const Task&, bool begins)> observer;
  /// Told within run(), when set, of every layer of this rank's chunks, the embedding and the head among them, as soon
  /// as the step's last microbatch has added to its gradients: nothing writes them any more, while the backward of
  /// other layers is still to come. Tied embeddings on two stages are complete on each for itself.
  GradientsComplete gradients_complete;

 private:
  struct TeacherSlot {
    Arena memory;
    TeacherState state;
    Pending sent;
    std::int64_t step = -1;  // of the run; -1: free
    int microbatch = 0, chunk = 0;
  };
  struct StudentSlot {
    Arena memory;
    StudentState state;
    WeightTape tape;
    Pending sent;
    bool used = false;
    int microbatch = 0, chunk = 0;
  };
  struct SendBuffer {
    Tensor memory;  // [tokens of a microbatch, D]
    Pending sent;
  };

  void run_list(const Context& c, const std::vector<Task>& tasks, const Step& step);
  void run_task(const Context& c, const Task& task, const Step& step);
  void forward_teacher(const Context& c, const Task& task, const Step& step);
  void forward(const Context& c, const Task& task, const Step& step);
  void backward(const Context& c, const Task& task, const Step& step);
  void align(const Context& c, const Task& task, const Step& step);
  TokenBatch microbatch(const Task& task, const Step& step) const;
  /// Whom the task tells of complete gradients: tasks of one kind and chunk run in the order of the microbatches, so
  /// those of the last one complete them.
  const GradientsComplete& completing(const Task& task) const {
    static const GradientsComplete nobody;
    return task.microbatch == schedule_.microbatches - 1 ? gradients_complete : nobody;
  }
  bool sends(const Task& task) const { return outgoing(schedule_, stages_->rank(), task).has_value(); }
  bool receives(const Task& task) const { return incoming(schedule_, stages_->rank(), task).has_value(); }
  /// Copies x into the buffer whose turn it is and sends it from there.
  void send_buffered(const Context& c, const Tensor& x, MessageKind kind);
  TeacherSlot* find_teacher(const Task& task);
  StudentSlot& find_student(const Task& task);
  std::size_t measure_teacher(const HostBatch& batch) const;
  std::size_t measure_student(const HostBatch& batch, const SequenceParallel* sequence, Device device) const;
  /// Until everything sent has been received.
  void finish_sends(const Context& c);

  const Stages* stages_;
  Schedule schedule_;
  Job job_;
  TaskLists prologue_, last_step_;
  bool fused_alignment_;  // one stage: layer by layer in the align task, and the teacher's task has nothing to do
  std::vector<TeacherSlot> teacher_slots_;
  std::vector<StudentSlot> student_slots_;
  std::vector<SendBuffer> buffers_;
  std::size_t next_buffer_ = 0;
  std::size_t teacher_bytes_ = 0;
  Shape hidden_;           // [tokens of a microbatch, D]
  std::int64_t step_ = 0;  // counts run()
  bool running_ = false;   // the prologue has been run for the next step
};

}  // namespace deltapipe::pipeline
