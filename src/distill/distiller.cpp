#include "distill/distiller.h"

#include "kernels/elementwise.h"
#include "kernels/hidden_loss.h"

#include <algorithm>

namespace deltapipe {
namespace {

Tensor slice(const LossSums& sums, int begin, int end) { return sums.values.rows(begin, end); }

}  // namespace

void Distiller::begin_teacher(const TokenBatch& batch, const Objective& objective, TeacherState& state,
                              Arena& keep) const {
  require(teacher_ != nullptr, "begin_teacher: no teacher");
  state.batch = batch;
  const LayerRange& range = teacher_->range();
  const auto layers = static_cast<std::size_t>(range.size());
  const Shape shape{batch.size(), teacher_->spec().hidden};
  const auto take = [&](const char* label) { return keep.allocate(teacher_->dtype(), shape, label); };
  state.hidden.assign(layers, Tensor());
  for (const auto& [s, t] : objective.hidden_layers) {
    if (t < range.first || t >= range.last) continue;
    Tensor& kept = state.hidden[static_cast<std::size_t>(t - range.first)];
    if (!kept) kept = take("teacher hidden state");
  }
  state.mixer_in.clear();
  state.mixer_out.clear();
  if (objective.aligns_mixers()) {
    for (std::size_t i = 0; i < layers; ++i) {
      state.mixer_in.push_back(take("teacher mixer input"));
      state.mixer_out.push_back(take("teacher mixer output"));
    }
  }
  // With alignment the first block's input is what enters; every other block's is where the block before it writes.
  state.x = take("teacher hidden state in motion");
}

void Distiller::forward_teacher(const Context& c, TeacherState& state) const {
  const Tensor& x = state.x;
  if (teacher_->has_embedding()) teacher_->embed(c, state.batch, x);
  const LayerRange& range = teacher_->range();
  for (std::int64_t l = range.first; l < range.last; ++l) {
    const auto i = static_cast<std::size_t>(l - range.first);
    const auto scope = c.workspace.scope();
    Block::Saved saved;
    if (state.mixer_in.empty()) {
      teacher_->block(l).forward(c, state.batch, x, x, saved, c.workspace);
    } else {
      kernels::copy_cast(c.stream, x, state.mixer_in[i]);
      teacher_->block(l).forward(c, state.batch, state.mixer_in[i], x, saved, c.workspace, state.mixer_out[i]);
    }
    if (const Tensor& kept = state.hidden[i]) kernels::copy_cast(c.stream, x, kept);
  }
  if (!teacher_->has_head()) return;
  const auto scope = c.workspace.scope();
  const Tensor rstd = c.workspace.allocate(accumulation_dtype(x.dtype), {x.dim(0)}, "teacher final norm rstd");
  teacher_->final_norm(c, x, x, rstd);
}

void Distiller::begin_student(const TokenBatch& batch, StudentState& state, Arena& keep, bool train) const {
  state.batch = batch;
  const Shape shape{batch.size(), student_->spec().hidden};
  const auto layers = static_cast<std::size_t>(student_->range().size());
  state.hidden.assign(layers + 1, Tensor());
  for (std::size_t i = 0; i <= layers; ++i) {
    state.hidden[i] =
        i == 0 || train ? keep.allocate(student_->dtype(), shape, "student hidden state") : state.hidden[0];
  }
  state.gradient = train ? keep.allocate(student_->dtype(), shape, "hidden state gradient") : Tensor();
}

void Distiller::forward_student(const Context& c, StudentState& state, Arena& keep, bool train) const {
  if (student_->has_embedding()) student_->embed(c, state.batch, state.hidden[0]);
  if (!train) {
    student_->run_blocks(c, state.batch, state.hidden[0], [](std::int64_t, const Tensor&) {});
    return;
  }
  const auto layers = static_cast<std::size_t>(student_->range().size());
  state.saved.assign(layers, {});
  for (std::size_t i = 0; i < layers; ++i) {
    const auto scope = c.workspace.scope();
    student_->block(student_->range().first + static_cast<std::int64_t>(i))
        .forward(c, state.batch, state.hidden[i], state.hidden[i + 1], state.saved[i], recompute_ ? c.workspace : keep);
  }
}

void Distiller::head(const Context& c, const kernels::DistillWeights& weights, double token_weight, bool train,
                     const LossSums& sums, const TeacherState* teacher, StudentState& state) const {
  const Tensor& x = state.hidden.back();
  const std::int64_t tokens = x.dim(0), vocabulary = student_->spec().vocabulary;
  const auto scope = c.workspace.scope();
  const Tensor y = c.workspace.allocate(x.dtype, x.shape, "student final hidden state");
  const Tensor rstd = c.workspace.allocate(accumulation_dtype(x.dtype), {tokens}, "final norm rstd");
  const Tensor dy = train ? c.workspace.allocate(x.dtype, x.shape, "final hidden state gradient") : Tensor();
  student_->final_norm(c, x, y, rstd);
  const std::int64_t rows = std::min(loss_block_tokens_, tokens);
  const Shape logits{rows, kernels::linear_row(c.stream, x.dtype, vocabulary)};
  const Tensor student_logits = c.workspace.allocate(x.dtype, logits, "student logits");
  const Tensor teacher_logits = teacher != nullptr ? c.workspace.allocate(x.dtype, logits, "teacher logits") : Tensor();
  for (std::int64_t t = 0; t < tokens; t += rows) {
    const std::int64_t end = std::min(t + rows, tokens);
    const Tensor zs = student_logits.rows(0, end - t);
    student_->head().forward(c, y.rows(t, end), zs);
    Tensor zt;
    if (teacher != nullptr) {
      zt = teacher_logits.rows(0, end - t);
      teacher_->head().forward(c, teacher->x.rows(t, end), zt);
    }
    kernels::distill_loss(c.stream, weights, zs, zt, state.batch.labels.rows(t, end), token_weight, train,
                          slice(sums, 0, LossSums::head_count), c.workspace, vocabulary);
    if (train) student_->head().backward(c, zs, y.rows(t, end), dy.rows(t, end));
  }
  if (train) student_->final_norm_backward(c, dy, x, rstd, state.gradient);
}

void Distiller::finish_forward(const Context& c, const Objective& objective, double token_weight, const LossSums& sums,
                               const TeacherState* teacher, StudentState& state) const {
  if (objective.has_head_losses()) {
    head(c, objective.head, token_weight, true, sums, teacher, state);
  } else {
    kernels::fill_zero(c.stream, state.gradient);
  }
}

void Distiller::backward_student(const Context& c, const Objective& objective, double token_weight,
                                 const LossSums& sums, const TeacherState* teacher, StudentState& state,
                                 const GradientsComplete& complete) const {
  const double per_layer =
      objective.hidden_layers.empty() ? 0.0 : token_weight / static_cast<double>(objective.hidden_layers.size());
  const Tensor& dx = state.gradient;
  const LayerRange& range = student_->range();
  for (std::int64_t l = range.last - 1; l >= range.first; --l) {
    const auto i = static_cast<std::size_t>(l - range.first);
    Context own = c;
    if (c.tape != nullptr && !c.tape->takes(l - range.first)) own.tape = nullptr;
    if (const std::int64_t t = objective.teacher_layer_of(l); t >= 0) {
      const Tensor& theirs = teacher->hidden[static_cast<std::size_t>(t - teacher_->range().first)];
      kernels::hidden_loss(c.stream, state.hidden[i + 1], theirs, state.batch.labels,
                           objective.hidden_cosine * per_layer, objective.hidden_mse * per_layer, dx,
                           slice(sums, LossSums::hidden_cosine, LossSums::hidden_mse + 1), c.workspace);
    }
    if (recompute_) {
      student_->block(l).backward_recomputing(own, state.batch, dx, state.hidden[i], dx);
    } else {
      student_->block(l).backward(own, state.batch, dx, state.hidden[i], state.saved[i], dx);
    }
    if (own.tape != nullptr) {
      own.tape->end_layer(l);
    } else if (complete) {
      complete(l);
    }
  }
  if (!student_->has_embedding()) return;
  student_->embed_backward(c, state.batch, dx);
  if (complete) complete(embedding_layer);
}

double Distiller::alignment_scale(const Objective& objective, double token_weight) const {
  return objective.mixer_mse * token_weight / static_cast<double>(student_->spec().layers());
}

/// `sums` [2]: hidden_loss writes two, cosine and MSE; the cosine's entry is a scratch value here.
void Distiller::align_layer(const Context& c, const TokenBatch& batch, std::int64_t layer, double scale,
                            const Tensor& x, const Tensor& wanted, const Tensor& sums) const {
  const auto scope = c.workspace.scope();
  const Tensor got = c.workspace.allocate(x.dtype, x.shape, "student mixer output");
  const Tensor d_got = c.workspace.allocate(x.dtype, x.shape, "mixer output gradient");
  Block::Saved saved;
  student_->block(layer).mixer_forward(c, batch, x, got, saved, c.workspace);
  kernels::fill_zero(c.stream, d_got);
  kernels::hidden_loss(c.stream, got, wanted, batch.labels, 0.0, scale, d_got, sums, c.workspace);
  student_->block(layer).mixer_backward(c, batch, d_got, x, saved);
}

void Distiller::align(const Context& c, const Objective& objective, double token_weight, const LossSums& sums,
                      const TeacherState& teacher, const GradientsComplete& complete) const {
  const auto scope = c.workspace.scope();
  const Tensor pair = c.workspace.allocate(DType::f64, {2}, "mixer loss sums");
  kernels::fill_zero(c.stream, pair);
  const LayerRange& range = student_->range();
  for (std::int64_t l = range.first; l < range.last; ++l) {
    const auto i = static_cast<std::size_t>(l - range.first);
    align_layer(c, teacher.batch, l, alignment_scale(objective, token_weight), teacher.mixer_in[i],
                teacher.mixer_out[i], pair);
    if (complete) complete(l);
  }
  kernels::add_in_place(c.stream, pair.rows(1, 2), slice(sums, LossSums::mixer_mse, LossSums::mixer_mse + 1));
}

void Distiller::align_through(const Context& c, const Objective& objective, double token_weight, const LossSums& sums,
                              const TokenBatch& batch, Arena& activations, const GradientsComplete& complete) const {
  require(teacher_ != nullptr, "align_through: no teacher");
  const auto scope = activations.scope();
  const Shape shape{batch.size(), student_->spec().hidden};
  const Tensor x = activations.allocate(student_->dtype(), shape, "teacher hidden state");
  const Tensor next = activations.allocate(student_->dtype(), shape, "teacher hidden state");
  const Tensor wanted = activations.allocate(student_->dtype(), shape, "teacher mixer output");
  const Tensor pair = activations.allocate(DType::f64, {2}, "mixer loss sums");
  kernels::fill_zero(c.stream, pair);
  teacher_->embed(c, batch, x);
  for (std::int64_t l = 0; l < student_->spec().layers(); ++l) {
    {
      const auto teacher_scope = c.workspace.scope();
      Block::Saved saved;
      teacher_->block(l).forward(c, batch, x, next, saved, c.workspace, wanted);
    }
    align_layer(c, batch, l, alignment_scale(objective, token_weight), x, wanted, pair);
    if (complete) complete(l);
    kernels::copy_cast(c.stream, next, x);
  }
  kernels::add_in_place(c.stream, pair.rows(1, 2), slice(sums, LossSums::mixer_mse, LossSums::mixer_mse + 1));
}

}  // namespace deltapipe
