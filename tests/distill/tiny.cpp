#include "tests/distill/tiny.h"

#include "core/random.h"

#include <algorithm>
#include <cmath>

namespace deltapipe::testing {

TinyJob::TinyJob(const ModelSpec& student, const ModelSpec* teacher, std::int64_t sequences, std::int64_t length,
                 Objective the_objective, bool recompute, std::int64_t loss_block, DType dtype,
                 const SequenceParallel* sequence)
    : objective(std::move(the_objective)),
      student_spec_(student),
      teacher_spec_(teacher != nullptr ? std::make_unique<ModelSpec>(*teacher) : nullptr),
      sequences_(sequences),
      length_(length),
      loss_block_(loss_block),
      recompute_(recompute),
      dtype_(dtype),
      sequence_(sequence),
      arenas_(ArenaSet::measuring(Device())) {
  const Stream dry = Stream::dry(Device());
  build(arenas_, dry);
  run(dry, arenas_);
  models_.reset();
  arenas_ = arenas_.reserve();
  build(arenas_, Stream::cpu());
}

void TinyJob::build(ArenaSet& arenas, const Stream& stream) {
  models_ = std::make_unique<ModelSet>(student_spec_, teacher_spec_.get(), dtype_, arenas, stream);
  models_->student_parameters().allocate_gradients(arenas.gradients, [](const ParameterSpec&) { return true; });
  for (Parameter& p : models_->student_parameters().all()) p.trainable = true;
  batch_ = sequence_ == nullptr ? std::make_unique<HostBatch>(arenas.batch, arenas.batch, sequences_, length_)
                                : std::make_unique<HostBatch>(arenas.batch, arenas.batch, sequences_, length_,
                                                              sequence_->layout(), sequence_->rank());
  sums_.values = arenas.batch.allocate(DType::f64, {LossSums::count}, "sums");
}

void TinyJob::run(const Stream& stream, ArenaSet& arenas) {
  const Distiller distiller(models_->student(), models_->teacher(), loss_block_, recompute_);
  const Context c{stream, arenas.workspace, sequence_};
  models_->student_parameters().zero_gradients(stream);
  kernels::fill_zero(stream, sums_.values);
  const double weight = token_weight != 0 ? token_weight
                        : stream.is_dry() ? 1.0
                                          : 1.0 / static_cast<double>(batch_->count_unmasked());
  const TokenBatch batch = batch_->microbatch(0, sequences_);
  if (objective.aligns_mixers()) {
    distiller.align_through(c, objective, weight, sums_, batch, arenas.activations);
    return;
  }
  const auto scope = arenas.activations.scope();
  auto& [teacher_state, student_state] = microbatch_;
  const TeacherState* teacher = nullptr;
  if (objective.needs_teacher()) {
    distiller.begin_teacher(batch, objective, teacher_state, arenas.activations);
    distiller.forward_teacher(c, teacher_state);
    teacher = &teacher_state;
  }
  distiller.begin_student(batch, student_state, arenas.activations, true);
  distiller.forward_student(c, student_state, arenas.activations, true);
  distiller.finish_forward(c, objective, weight, sums_, teacher, student_state);
  distiller.backward_student(c, objective, weight, sums_, teacher, student_state);
}

void randomize(ParameterTable& table, std::uint64_t seed, const std::string& who) {
  for (Parameter& p : table.all()) {
    const RandomStream r(seed, who + p.spec.name);
    const bool is_norm = p.spec.name.ends_with("norm.weight");
    const double scale = p.spec.shape.rank() == 2 ? 1.0 / std::sqrt(static_cast<double>(p.spec.shape[1])) : 0.4;
    const std::int64_t n = p.value.numel();
    for (std::int64_t i = 0; i < n; ++i) {
      const double x = (is_norm ? 1.0 : 0.0) + scale * r.normal(static_cast<std::uint64_t>(i));
      if (p.value.dtype == DType::f64) {
        p.value.as<double>()[i] = x;
      } else {
        p.value.as<float>()[i] = static_cast<float>(x);
      }
    }
  }
}

void TinyJob::randomize(std::uint64_t seed) {
  testing::randomize(models_->student_parameters(), seed, "student ");
  if (auto* teacher = models_->teacher_parameters()) testing::randomize(*teacher, seed, "teacher ");
}

void TinyJob::fill_tokens(std::uint64_t seed, const std::vector<std::int64_t>& starts) {
  RandomStream r(seed, "tokens");
  const std::int64_t total = sequences_ * length_;
  std::vector<std::int32_t> tokens;
  for (std::int64_t t = 0; t < total; ++t) {
    tokens.push_back(static_cast<std::int32_t>(r.next_below(static_cast<std::uint64_t>(student_spec_.vocabulary))));
  }
  const auto begins = [&](std::int64_t t) { return std::find(starts.begin(), starts.end(), t) != starts.end(); };
  for (std::int64_t s = 0; s < sequences_; ++s) {
    const SequenceSpans out = batch_->spans(s);
    std::int32_t start = 0;
    for (std::int64_t i = 0; i < length_; ++i) {
      const std::int64_t t = s * length_ + i;
      const auto k = static_cast<std::size_t>(i);
      if (begins(t)) start = static_cast<std::int32_t>(i);
      out.tokens[k] = tokens[static_cast<std::size_t>(t)];
      out.labels[k] = t + 1 == total || begins(t + 1) ? masked_label : tokens[static_cast<std::size_t>(t + 1)];
      out.start[k] = start;
      out.positions[k] = static_cast<std::int32_t>(i) - start;
    }
  }
  batch_->cut(Stream::cpu());
}

double TinyJob::loss_and_gradients() {
  run(Stream::cpu(), arenas_);
  const auto tokens = static_cast<double>(batch_->count_unmasked());
  const double weight = token_weight != 0 ? token_weight : 1.0 / tokens;
  return report_losses(objective, sums_.values.as<double>(), student_spec_.layers(), tokens).total * tokens * weight;
}

double TinyJob::loss() { return loss_and_gradients(); }

}  // namespace deltapipe::testing
