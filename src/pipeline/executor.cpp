#include "pipeline/executor.h"

#include "kernels/elementwise.h"
#include "pipeline/buffers.h"
#include "pipeline/simulator.h"

#include <algorithm>

namespace deltapipe::pipeline {
namespace {

constexpr DType byte = DType::u8;

/// Peaks do not depend on costs: a rank's own order decides what it holds.
RankPeak slots_of(const Schedule& schedule, int rank) {
  const StageCost cost{1, 1, 1, 1, 1, 0, 0, 0};
  return simulate(schedule, CostModel::uniform(schedule.stages(), cost)).peaks[static_cast<std::size_t>(rank)];
}

}  // namespace

Executor::Executor(const Stages& stages, Schedule schedule, const Job& job, const HostBatch& batch,
                   const SequenceParallel* sequence, Arena& activations, Arena& communication)
    : stages_(&stages),
      schedule_(std::move(schedule)),
      job_(job),
      prologue_(prologue(schedule_)),
      last_step_(last_step(schedule_)),
      fused_alignment_(schedule_.student == StudentWork::align && schedule_.stages() == 1) {
  require(schedule_.ranks == stages.ranks() && schedule_.chunks == stages.chunks(),
          "Executor: the schedule is for other ranks or chunks");
  const auto slot_memory = [&](std::size_t bytes, const char* label) {
    return Arena::over(label, activations.allocate(byte, {static_cast<std::int64_t>(bytes)}, label));
  };
  const RankPeak peak = slots_of(schedule_, stages.rank());
  const std::size_t begin = activations.used();
  if (!fused_alignment_ && peak.kept_teacher > 0) {
    const std::size_t bytes = measure_teacher(batch);
    for (int i = 0; i < peak.kept_teacher; ++i) {
      teacher_slots_.push_back({slot_memory(bytes, "teacher states of a microbatch"), {}, {}, -1, 0, 0});
    }
  }
  teacher_bytes_ = activations.used() - begin;
  if (const int n = fused_alignment_ ? 1 : peak.in_flight; n > 0) {
    const std::size_t bytes = measure_student(batch, sequence, activations.device());
    for (int i = 0; i < n; ++i) {
      student_slots_.push_back({slot_memory(bytes, "activations of a microbatch"), {}, {}, {}, false, 0, 0});
    }
  }
  const Distiller& any = stages.chunk(0);
  hidden_ = {batch.microbatch(0, job_.microbatch_sequences).size(), any.student().spec().hidden};
  for (int i = 0; i < send_buffers(schedule_); ++i) {
    buffers_.push_back({communication.allocate(any.student().dtype(), hidden_, "pipeline send buffer"), {}});
  }
}

std::size_t Executor::measure_teacher(const HostBatch& batch) const {
  std::size_t bytes = 0;
  for (int i = 0; i < stages_->chunks(); ++i) {
    Arena keep = Arena::measuring("teacher states of a microbatch");
    TeacherState state;
    stages_->chunk(i).begin_teacher(batch.microbatch(0, job_.microbatch_sequences), job_.objective, state, keep);
    bytes = std::max(bytes, keep.peak());
  }
  return bytes;
}

std::size_t Executor::measure_student(const HostBatch& batch, const SequenceParallel* sequence, Device device) const {
  const Stream dry = Stream::dry(device);
  const TokenBatch tokens = batch.microbatch(0, job_.microbatch_sequences);
  Arena workspace = Arena::measuring("workspace", device);
  const Context c{dry, workspace, sequence, nullptr};
  const LossSums sums{Tensor(nullptr, DType::f64, {LossSums::count})};
  std::size_t bytes = 0;
  for (int i = 0; i < stages_->chunks(); ++i) {
    Arena keep = Arena::measuring("activations of a microbatch");
    if (fused_alignment_) {
      stages_->chunk(i).align_through(c, job_.objective, 1, sums, tokens, keep);
    } else {
      TeacherState teacher;
      if (schedule_.teacher != Teacher::none) {
        Arena other = Arena::measuring("teacher states of a microbatch");
        stages_->chunk(i).begin_teacher(tokens, job_.objective, teacher, other);
      }
      StudentState state;
      WeightTape tape;
      stages_->chunk(i).begin_student(tokens, state, keep, true);
      stages_->chunk(i).forward_student(c, state, keep, true);
      Context taping = c;
      if (schedule_.student == StudentWork::split_backward) {
        tape.begin(keep, job_.recompute, job_.put_off_layers);
        taping.tape = &tape;
      }
      stages_->chunk(i).backward_student(taping, job_.objective, 1, sums, &teacher, state);
    }
    bytes = std::max(bytes, keep.peak());
  }
  return bytes;
}

bool Executor::looks_ahead() const {
  return std::any_of(schedule_.ahead.begin(), schedule_.ahead.end(), [](int n) { return n > 0; });
}

TokenBatch Executor::microbatch(const Task& task, const Step& step) const {
  const HostBatch* batch = task.step_offset == 0 ? step.batch : step.next;
  require(batch != nullptr, "Executor: a task of the next step, but no next batch");
  const std::int64_t first = task.microbatch * job_.microbatch_sequences;
  return batch->microbatch(first, first + job_.microbatch_sequences);
}

Executor::TeacherSlot* Executor::find_teacher(const Task& task) {
  if (schedule_.teacher == Teacher::none) return nullptr;
  for (TeacherSlot& slot : teacher_slots_) {
    if (slot.step == step_ + task.step_offset && slot.microbatch == task.microbatch && slot.chunk == task.chunk) {
      return &slot;
    }
  }
  throw InternalError("Executor: the teacher's forward of a microbatch is missing");
}

Executor::StudentSlot& Executor::find_student(const Task& task) {
  for (StudentSlot& slot : student_slots_) {
    if (slot.used && slot.microbatch == task.microbatch && slot.chunk == task.chunk) return slot;
  }
  throw InternalError("Executor: the student's forward of a microbatch is missing");
}

void Executor::send_buffered(const Context& c, const Tensor& x, MessageKind kind) {
  SendBuffer& buffer = buffers_[next_buffer_];
  next_buffer_ = (next_buffer_ + 1) % buffers_.size();
  buffer.sent.wait(c.stream);
  kernels::copy_cast(c.stream, x, buffer.memory);
  buffer.sent = stages_->start_send(c.stream, buffer.memory, kind);
}

void Executor::forward_teacher(const Context& c, const Task& task, const Step& step) {
  if (fused_alignment_) return;
  const auto free = std::find_if(teacher_slots_.begin(), teacher_slots_.end(), [](auto& s) { return s.step < 0; });
  require(free != teacher_slots_.end(), "Executor: no free slot for the teacher's states");
  TeacherSlot& slot = *free;
  slot.step = step_ + task.step_offset;
  slot.microbatch = task.microbatch;
  slot.chunk = task.chunk;
  slot.sent.wait(c.stream);
  slot.memory.reset();
  const Distiller& distiller = stages_->chunk(task.chunk);
  distiller.begin_teacher(microbatch(task, step), job_.objective, slot.state, slot.memory);
  if (receives(task)) stages_->receive(c.stream, slot.state.x, MessageKind::teacher);
  distiller.forward_teacher(c, slot.state);
  if (!sends(task)) return;
  if (buffered_kind(schedule_) == MessageKind::teacher) {
    send_buffered(c, slot.state.x, MessageKind::teacher);
  } else {
    slot.sent = stages_->start_send(c.stream, slot.state.x, MessageKind::teacher);
  }
}

void Executor::forward(const Context& c, const Task& task, const Step& step) {
  const auto free = std::find_if(student_slots_.begin(), student_slots_.end(), [](auto& s) { return !s.used; });
  require(free != student_slots_.end(), "Executor: no free slot for a microbatch");
  StudentSlot& slot = *free;
  slot.used = true;
  slot.microbatch = task.microbatch;
  slot.chunk = task.chunk;
  slot.sent.wait(c.stream);
  slot.memory.reset();
  const Distiller& distiller = stages_->chunk(task.chunk);
  distiller.begin_student(microbatch(task, step), slot.state, slot.memory, true);
  if (receives(task)) stages_->receive(c.stream, slot.state.hidden.front(), MessageKind::activation);
  distiller.forward_student(c, slot.state, slot.memory, true);
  if (sends(task)) slot.sent = stages_->start_send(c.stream, slot.state.hidden.back(), MessageKind::activation);
  if (!stages_->is_last(task.chunk)) return;
  const TeacherSlot* teacher = find_teacher(task);
  distiller.finish_forward(c, job_.objective, step.token_weight, step.sums, teacher ? &teacher->state : nullptr,
                           slot.state);
  // Norm and head are never put off to a weight part: this is all of theirs.
  if (const GradientsComplete& complete = completing(task)) complete(distiller.student().spec().layers());
}

void Executor::backward(const Context& c, const Task& task, const Step& step) {
  StudentSlot& slot = find_student(task);
  if (task.kind == TaskKind::backward_weight) {
    slot.tape.run(c, completing(task));
    slot.used = false;
    return;
  }
  if (receives(task)) stages_->receive(c.stream, slot.state.gradient, MessageKind::gradient);
  Context context = c;
  if (task.kind == TaskKind::backward_input) {
    slot.tape.begin(slot.memory, job_.recompute, job_.put_off_layers);
    context.tape = &slot.tape;
  }
  TeacherSlot* teacher = find_teacher(task);
  stages_->chunk(task.chunk)
      .backward_student(context, job_.objective, step.token_weight, step.sums, teacher ? &teacher->state : nullptr,
                        slot.state, completing(task));
  if (sends(task)) send_buffered(c, slot.state.gradient, MessageKind::gradient);
  if (teacher != nullptr) teacher->step = -1;
  if (task.kind == TaskKind::backward) slot.used = false;
}

void Executor::align(const Context& c, const Task& task, const Step& step) {
  const Distiller& distiller = stages_->chunk(task.chunk);
  if (fused_alignment_) {
    distiller.align_through(c, job_.objective, step.token_weight, step.sums, microbatch(task, step),
                            student_slots_.front().memory, completing(task));
    return;
  }
  TeacherSlot* teacher = find_teacher(task);
  distiller.align(c, job_.objective, step.token_weight, step.sums, teacher->state, completing(task));
  teacher->step = -1;
}

void Executor::run_task(const Context& c, const Task& task, const Step& step) {
  switch (task.kind) {
    case TaskKind::teacher_forward: return forward_teacher(c, task, step);
    case TaskKind::forward: return forward(c, task, step);
    case TaskKind::backward:
    case TaskKind::backward_input:
    case TaskKind::backward_weight: return backward(c, task, step);
    case TaskKind::align: return align(c, task, step);
  }
}

void Executor::run_list(const Context& c, const std::vector<Task>& tasks, const Step& step) {
  for (const Task& task : tasks) {
    if (observer) observer(task, true);
    run_task(c, task, step);
    if (observer) observer(task, false);
  }
}

void Executor::run(const Context& c, const Step& step) {
  const auto rank = static_cast<std::size_t>(stages_->rank());
  if (!running_) run_list(c, prologue_[rank], step);
  const bool last = step.next == nullptr;
  run_list(c, last ? last_step_[rank] : schedule_.tasks[rank], step);
  running_ = !last;
  ++step_;
  if (last) finish_sends(c);
}

void Executor::finish_sends(const Context& c) {
  for (TeacherSlot& slot : teacher_slots_) slot.sent.wait(c.stream);
  for (StudentSlot& slot : student_slots_) slot.sent.wait(c.stream);
  for (SendBuffer& buffer : buffers_) buffer.sent.wait(c.stream);
}

void Executor::stop(const Context& c) {
  if (!running_) return;
  running_ = false;
  for (TeacherSlot& slot : teacher_slots_) slot.step = -1;
  // Stage s holds the next step's microbatches below ahead[s]; those up to ahead[s - 1] are under way to it. They go
  // where nothing is under way from: the student's slots are free between steps, and with alignment, which has none,
  // the teacher's are not sent from.
  Arena& scratch = student_slots_.empty() ? teacher_slots_.front().memory : student_slots_.front().memory;
  scratch.reset();
  const Tensor dropped = scratch.allocate(stages_->chunk(0).student().dtype(), hidden_, "dropped hidden state");
  for (int chunk = 0; chunk < stages_->chunks(); ++chunk) {
    const auto stage = static_cast<std::size_t>(stages_->stage_of(chunk));
    if (stage == 0) continue;
    for (int i = schedule_.ahead[stage]; i < schedule_.ahead[stage - 1]; ++i) {
      stages_->receive(c.stream, dropped, MessageKind::teacher);
    }
  }
  finish_sends(c);
}

}  // namespace deltapipe::pipeline
