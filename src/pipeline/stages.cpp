#include "pipeline/stages.h"

#include <array>

namespace deltapipe::pipeline {
namespace {

Purpose purpose_of(MessageKind kind) {
  return kind == MessageKind::gradient ? Purpose::hidden_gradient : Purpose::hidden_state;
}

int tag_of(MessageKind kind, Stages::Use use) {
  return static_cast<int>(kind) + (use == Stages::Use::evaluation ? message_kinds : 0);
}

}  // namespace

Stages::Stages(Communicator& pipeline, std::vector<Distiller> chunks)
    : pipeline_(&pipeline), chunks_(std::move(chunks)) {
  require(!chunks_.empty(), "Stages: no chunks");
  require(chunks_.size() == 1 || pipeline.size() > 1, "Stages: several chunks on a single rank");
}

void Stages::connect() const {
  if (ranks() == 1) return;
  std::vector<Route> routes;
  const auto add = [&](MessageKind kind, Use use) {
    // From the last rank of the ring to the first there are messages where ranks have several chunks.
    const bool upstream = kind == MessageKind::gradient;
    const auto goes_around = [&](bool to_next) { return to_next ? rank() == ranks() - 1 : rank() == 0; };
    for (const bool sends : {true, false}) {
      if (chunks() == 1 && goes_around(sends != upstream)) continue;
      routes.push_back({peer(kind, sends), tag_of(kind, use), sends});
    }
  };
  add(MessageKind::activation, Use::training);
  add(MessageKind::activation, Use::evaluation);
  add(MessageKind::gradient, Use::training);
  if (has_teacher()) {
    add(MessageKind::teacher, Use::training);
    add(MessageKind::teacher, Use::evaluation);
  }
  pipeline_->connect(routes);
}

int Stages::peer(MessageKind kind, bool sending) const {
  const bool to_next = (kind != MessageKind::gradient) == sending;
  return (rank() + (to_next ? 1 : ranks() - 1)) % ranks();
}

Pending Stages::start_send(const Stream& stream, const Tensor& x, MessageKind kind, Use use) const {
  const std::array<Transfer, 1> sends{{{peer(kind, true), x, tag_of(kind, use)}}};
  return pipeline_->start_exchange(stream, sends, {}, purpose_of(kind));
}

void Stages::receive(const Stream& stream, const Tensor& x, MessageKind kind, Use use) const {
  pipeline_->receive(stream, x, peer(kind, false), purpose_of(kind), tag_of(kind, use));
}

void Stages::evaluate(const Context& c, const TokenBatch& batch, const kernels::DistillWeights& weights,
                      const LossSums& sums, MicrobatchState& state, Arena& activations) const {
  const auto scope = activations.scope();
  // Teacher and student of a chunk reuse the memory of the chunk before: it is sent by then. All of the teacher goes
  // before all of the student, for a rank that waits to send must be waited for by nobody.
  const auto in_motion = [&](const Tensor& x, MessageKind kind, int chunk, const auto& forward) {
    if (!is_first(chunk)) receive(c.stream, x, kind, Use::evaluation);
    forward();
    if (!is_last(chunk)) start_send(c.stream, x, kind, Use::evaluation).wait(c.stream);
  };
  TeacherState* teacher = has_teacher() ? &state.teacher : nullptr;
  if (teacher != nullptr) {
    chunks_.front().begin_teacher(batch, Objective(), *teacher, activations);
    const Tensor x = teacher->x;
    for (int i = 0; i < chunks(); ++i) {
      teacher->hidden.assign(static_cast<std::size_t>(chunk(i).teacher()->range().size()), Tensor());
      in_motion(x, MessageKind::teacher, i, [&] { chunk(i).forward_teacher(c, *teacher); });
    }
  }
  chunks_.front().begin_student(batch, state.student, activations, false);
  const Tensor x = state.student.hidden.front();
  for (int i = 0; i < chunks(); ++i) {
    state.student.hidden.assign(static_cast<std::size_t>(chunk(i).student().range().size()) + 1, x);
    in_motion(x, MessageKind::activation, i, [&] { chunk(i).forward_student(c, state.student, activations, false); });
  }
  if (is_last(chunks() - 1)) {
    chunks_.back().head(c, weights, 0.0, false, sums, teacher, state.student);
  }
}

}  // namespace deltapipe::pipeline
