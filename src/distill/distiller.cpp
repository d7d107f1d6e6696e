#include "distill/distiller.h"

#include "kernels/elementwise.h"
#include "kernels/hidden_loss.h"

#include <algorithm>

namespace deltapipe {
namespace {

Tensor slice(const LossSums& sums, int begin, int end) { return sums.values.rows(begin, end); }

}  // namespace

void Distiller::begin_teacher(const Objective& objective, MicrobatchState& state, Arena& activations) const {
  require(teacher_ != nullptr, "begin_teacher: no teacher");
  const LayerRange& range = teacher_->range();
  const Shape shape{state.batch.size(), teacher_->spec().hidden};
  state.teacher_hidden.assign(static_cast<std::size_t>(range.size()), Tensor());
  for (const auto& [s, t] : objective.hidden_layers) {
    if (t < range.first || t >= range.last) continue;
    Tensor& kept = state.teacher_hidden[static_cast<std::size_t>(t - range.first)];
    if (!kept) kept = activations.allocate(teacher_->dtype(), shape, "teacher hidden state");
  }
  state.teacher = activations.allocate(teacher_->dtype(), shape, "teacher hidden state in motion");
}

void Distiller::forward_teacher(const Context& c, MicrobatchState& state) const {
  const Tensor& x = state.teacher;
  if (teacher_->has_embedding()) teacher_->embed(c, state.batch, x);
  teacher_->run_blocks(c, state.batch, x, [&](std::int64_t l, const Tensor& h) {
    if (const Tensor& kept = state.teacher_hidden[static_cast<std::size_t>(l - teacher_->range().first)]) {
      kernels::copy_cast(c.stream, h, kept);
    }
  });
  if (!teacher_->has_head()) return;
  const auto scope = c.workspace.scope();
  const Tensor rstd = c.workspace.allocate(accumulation_dtype(x.dtype), {x.dim(0)}, "teacher final norm rstd");
  teacher_->final_norm(c, x, x, rstd);
}

void Distiller::begin_student(MicrobatchState& state, Arena& activations, bool keep) const {
  const Shape shape{state.batch.size(), student_.spec().hidden};
  const auto layers = static_cast<std::size_t>(student_.range().size());
  state.hidden.assign(layers + 1, Tensor());
  for (std::size_t i = 0; i <= layers; ++i) {
    state.hidden[i] =
        i == 0 || keep ? activations.allocate(student_.dtype(), shape, "student hidden state") : state.hidden[0];
  }
}

void Distiller::forward_student(const Context& c, MicrobatchState& state, Arena& activations, bool keep) const {
  if (student_.has_embedding()) student_.embed(c, state.batch, state.hidden[0]);
  if (!keep) {
    student_.run_blocks(c, state.batch, state.hidden[0], [](std::int64_t, const Tensor&) {});
    return;
  }
  const auto layers = static_cast<std::size_t>(student_.range().size());
  state.saved.assign(layers, {});
  for (std::size_t i = 0; i < layers; ++i) {
    const auto scope = c.workspace.scope();
    student_.block(student_.range().first + static_cast<std::int64_t>(i))
        .forward(c, state.batch, state.hidden[i], state.hidden[i + 1], state.saved[i],
                 recompute_ ? c.workspace : activations);
  }
}

void Distiller::begin_backward(MicrobatchState& state, Arena& activations) const {
  state.gradient =
      activations.allocate(student_.dtype(), {state.batch.size(), student_.spec().hidden}, "hidden state gradient");
}

void Distiller::head(const Context& c, const kernels::DistillWeights& weights, double token_weight, bool train,
                     const LossSums& sums, MicrobatchState& state) const {
  const Tensor& x = state.hidden.back();
  const std::int64_t tokens = x.dim(0), vocabulary = student_.spec().vocabulary;
  const auto scope = c.workspace.scope();
  const Tensor y = c.workspace.allocate(x.dtype, x.shape, "student final hidden state");
  const Tensor rstd = c.workspace.allocate(accumulation_dtype(x.dtype), {tokens}, "final norm rstd");
  const Tensor dy = train ? c.workspace.allocate(x.dtype, x.shape, "final hidden state gradient") : Tensor();
  student_.final_norm(c, x, y, rstd);
  const std::int64_t rows = std::min(loss_block_tokens_, tokens);
  const Tensor student_logits = c.workspace.allocate(x.dtype, {rows, vocabulary}, "student logits");
  const Tensor teacher_logits =
      state.teacher ? c.workspace.allocate(x.dtype, {rows, vocabulary}, "teacher logits") : Tensor();
  for (std::int64_t t = 0; t < tokens; t += rows) {
    const std::int64_t end = std::min(t + rows, tokens);
    const Tensor zs = student_logits.rows(0, end - t);
    student_.head().forward(c, y.rows(t, end), zs);
    Tensor zt;
    if (state.teacher) {
      zt = teacher_logits.rows(0, end - t);
      teacher_->head().forward(c, state.teacher.rows(t, end), zt);
    }
    kernels::distill_loss(c.stream, weights, zs, zt, state.batch.labels.rows(t, end), token_weight, train,
                          slice(sums, 0, LossSums::head_count), c.workspace);
    if (train) student_.head().backward(c, zs, y.rows(t, end), dy.rows(t, end));
  }
  if (train) student_.final_norm_backward(c, dy, x, rstd, state.gradient);
}

void Distiller::backward_student(const Context& c, const Objective& objective, double token_weight,
                                 const LossSums& sums, MicrobatchState& state) const {
  const double per_layer =
      objective.hidden_layers.empty() ? 0.0 : token_weight / static_cast<double>(objective.hidden_layers.size());
  const Tensor& dx = state.gradient;
  const LayerRange& range = student_.range();
  for (std::int64_t l = range.last - 1; l >= range.first; --l) {
    const auto i = static_cast<std::size_t>(l - range.first);
    if (const std::int64_t t = objective.teacher_layer_of(l); t >= 0) {
      const Tensor& theirs = state.teacher_hidden[static_cast<std::size_t>(t - teacher_->range().first)];
      kernels::hidden_loss(c.stream, state.hidden[i + 1], theirs, state.batch.labels,
                           objective.hidden_cosine * per_layer, objective.hidden_mse * per_layer, dx,
                           slice(sums, LossSums::hidden_cosine, LossSums::hidden_mse + 1), c.workspace);
    }
    if (recompute_) {
      student_.block(l).backward_recomputing(c, state.batch, dx, state.hidden[i], dx);
    } else {
      student_.block(l).backward(c, state.batch, dx, state.hidden[i], state.saved[i], dx);
    }
  }
  if (student_.has_embedding()) student_.embed_backward(c, state.batch, dx);
}

void Distiller::align_mixers(const Context& c, const Objective& objective, double token_weight, const LossSums& sums,
                             const TokenBatch& batch, Arena& activations) const {
  require(teacher_ != nullptr, "align_mixers: no teacher");
  const auto scope = activations.scope();
  const Shape shape{batch.size(), student_.spec().hidden};
  const Tensor x = activations.allocate(student_.dtype(), shape, "teacher hidden state");
  const Tensor next = activations.allocate(student_.dtype(), shape, "teacher hidden state");
  const Tensor wanted = activations.allocate(student_.dtype(), shape, "teacher mixer output");
  const Tensor got = activations.allocate(student_.dtype(), shape, "student mixer output");
  const Tensor d_got = activations.allocate(student_.dtype(), shape, "mixer output gradient");
  const double scale = objective.mixer_mse * token_weight / static_cast<double>(student_.spec().layers());
  // hidden_loss writes two sums, cosine and MSE; the cosine's entry here is a scratch value.
  const Tensor pair = activations.allocate(DType::f64, {2}, "mixer loss sums");
  kernels::fill_zero(c.stream, pair);
  teacher_->embed(c, batch, x);
  for (std::int64_t l = student_.range().first; l < student_.range().last; ++l) {
    {
      const auto teacher_scope = c.workspace.scope();
      Block::Saved saved;
      teacher_->block(l).forward(c, batch, x, next, saved, c.workspace, wanted);
    }
    const auto student_scope = c.workspace.scope();
    Block::Saved saved;
    student_.block(l).mixer_forward(c, batch, x, got, saved, c.workspace);
    kernels::fill_zero(c.stream, d_got);
    kernels::hidden_loss(c.stream, got, wanted, batch.labels, 0.0, scale, d_got, pair, c.workspace);
    student_.block(l).mixer_backward(c, batch, d_got, x, saved);
    kernels::copy_cast(c.stream, next, x);
  }
  kernels::add_in_place(c.stream, pair.rows(1, 2), slice(sums, LossSums::mixer_mse, LossSums::mixer_mse + 1));
}

void Distiller::train(const Context& c, const TokenBatch& batch, const Objective& objective, double token_weight,
                      const LossSums& sums, MicrobatchState& state, Arena& activations) const {
  if (objective.aligns_mixers()) {
    align_mixers(c, objective, token_weight, sums, batch, activations);
    return;
  }
  const auto scope = activations.scope();
  state.batch = batch;
  state.teacher = Tensor();
  if (objective.needs_teacher()) {
    begin_teacher(objective, state, activations);
    forward_teacher(c, state);
  }
  begin_student(state, activations, true);
  forward_student(c, state, activations, true);
  begin_backward(state, activations);
  if (objective.has_head_losses()) {
    head(c, objective.head, token_weight, true, sums, state);
  } else {
    kernels::fill_zero(c.stream, state.gradient);
  }
  backward_student(c, objective, token_weight, sums, state);
}

void Distiller::evaluate(const Context& c, const TokenBatch& batch, const kernels::DistillWeights& weights,
                         const LossSums& sums, MicrobatchState& state, Arena& activations) const {
  const auto scope = activations.scope();
  state.batch = batch;
  state.teacher = Tensor();
  if (teacher_ != nullptr) {
    begin_teacher(Objective(), state, activations);
    forward_teacher(c, state);
  }
  begin_student(state, activations, false);
  forward_student(c, state, activations, false);
  head(c, weights, 0.0, false, sums, state);
}

}  // namespace deltapipe
