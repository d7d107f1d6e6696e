#include "train/trainer.h"

#include "core/error.h"
#include "kernels/elementwise.h"
#include "train/lr_schedule.h"

#include <algorithm>
#include <cmath>

namespace deltapipe {
namespace {

std::vector<std::regex> compile(const std::vector<std::string>& patterns) {
  std::vector<std::regex> list;
  for (const std::string& p : patterns) list.emplace_back(p);
  return list;
}

bool matches_any(const std::vector<std::regex>& patterns, const std::string& name) {
  return std::any_of(patterns.begin(), patterns.end(), [&](const std::regex& r) { return std::regex_search(name, r); });
}

/// Whether a stage's losses reach this parameter: alignment ends at the mixers.
bool reaches(const Objective& objective, const ParameterSpec& p, const ModelSpec& student) {
  if (!objective.aligns_mixers()) return true;
  return p.layer >= 0 && p.layer < student.layers() &&
         (p.name.find(".self_attn.") != std::string::npos || p.name.ends_with(".input_layernorm.weight"));
}

LrKind kind_of(LearningRateSchedule s) {
  switch (s) {
    case LearningRateSchedule::cosine: return LrKind::cosine;
    case LearningRateSchedule::constant: return LrKind::constant;
    case LearningRateSchedule::linear: return LrKind::linear;
  }
  return LrKind::constant;
}

ModelSet make_models(const TrainingPlan& plan, ArenaSet& arenas, const Stream& stream) {
  ModelSet models(plan.student, plan.teacher_spec(), compute_dtype(plan.config.run), arenas, stream);
  models.student_parameters().allocate_gradients(arenas.gradients,
                                                 [&](const ParameterSpec& p) { return plan.trains(p); });
  return models;
}

/// Stages follow each other, so their batches share memory: room for the largest, a view for each.
std::vector<HostBatch> make_batches(const std::vector<StageConfig>& stages, Arena& arena) {
  std::vector<HostBatch> list;
  std::size_t most = 0;
  for (const StageConfig& s : stages) {
    Arena measuring = Arena::measuring("batch");
    HostBatch(measuring, s.batch_sequences, s.sequence_length);
    most = std::max(most, measuring.peak());
  }
  for (const StageConfig& s : stages) {
    const auto scope = arena.scope();
    list.emplace_back(arena, s.batch_sequences, s.sequence_length);
  }
  if (most > 0) arena.allocate(DType::u8, {static_cast<std::int64_t>(most)}, "batch");
  return list;
}

}  // namespace

bool TrainingPlan::trains(const ParameterSpec& parameter) const {
  for (std::size_t i = 0; i < config.stages.size(); ++i) {
    if (reaches(objectives[i], parameter, student) && !matches_any(compile(config.stages[i].frozen), parameter.name)) {
      return true;
    }
  }
  return false;
}

std::int64_t TrainingPlan::evaluation_length() const {
  return config.eval.sequence_length != 0 ? config.eval.sequence_length : config.stages.back().sequence_length;
}

std::int64_t TrainingPlan::total_steps() const {
  std::int64_t n = 0;
  for (const StageConfig& s : config.stages) n += stage_steps(s);
  return n;
}

TrainingPlan make_training_plan(const Config& config, const ModelSpec& student, const ModelSpec* teacher) {
  if (config.stages.empty()) fail<ConfigError>("nothing to train: the configuration has no [[stage]]");
  TrainingPlan plan{config, student, std::nullopt, {}};
  if (teacher != nullptr) plan.teacher = *teacher;
  for (const StageConfig& s : config.stages) plan.objectives.push_back(make_objective(s, student, teacher));
  const auto parameters = parameters_of(student);
  for (std::size_t i = 0; i < config.stages.size(); ++i) {
    const StageConfig& s = config.stages[i];
    const auto frozen = compile(s.frozen);
    const bool any = std::any_of(parameters.begin(), parameters.end(), [&](const ParameterSpec& p) {
      return reaches(plan.objectives[i], p, student) && !matches_any(frozen, p.name);
    });
    if (!any) fail<ConfigError>("stage '{}' trains nothing: its frozen patterns match every parameter", s.name);
    for (const std::string& pattern : s.frozen) {
      const std::regex r(pattern);
      if (std::none_of(parameters.begin(), parameters.end(),
                       [&](const ParameterSpec& p) { return std::regex_search(p.name, r); })) {
        fail<ConfigError>("stage '{}': frozen pattern '{}' matches no parameter of the student", s.name, pattern);
      }
    }
  }
  return plan;
}

Trainer::Trainer(const TrainingPlan& plan, ArenaSet& arenas, const Stream& stream)
    : plan_(plan),
      arenas_(arenas),
      context_{stream, arenas.workspace},
      models_(make_models(plan, arenas, stream)),
      optimizer_(plan.config.optimizer, models_.student_parameters(), arenas.optimizer),
      distiller_(models_.student(), models_.teacher(), plan.config.memory.loss_block_tokens,
                 plan.config.memory.recompute),
      batches_(make_batches(plan.config.stages, arenas.batch)),
      sums_{arenas.batch.allocate(DType::f64, {LossSums::count}, "loss sums")},
      evaluation_(plan_.evaluation_length(), arenas.batch) {}

void Trainer::begin_stage(std::size_t stage) {
  stage_ = stage;
  const auto frozen = compile(plan_.config.stages[stage].frozen);
  for (Parameter& p : models_.student_parameters().all()) {
    p.trainable = p.gradient_memory && reaches(plan_.objectives[stage], p.spec, plan_.student) &&
                  !matches_any(frozen, p.spec.name);
  }
  optimizer_.reset(context_.stream);
}

StepReport Trainer::step(const SequenceLoader* loader, std::int64_t stage_step) {
  const StageConfig& stage = plan_.config.stages[stage_];
  const Objective& objective = plan_.objectives[stage_];
  const HostBatch& batch = batches_[stage_];
  const bool dry = context_.stream.is_dry();
  std::int64_t tokens = 1;
  if (!dry) {
    const std::int64_t first = stage_step * stage.batch_sequences;
    for (std::int64_t i = 0; i < stage.batch_sequences; ++i) {
      loader->fill(static_cast<std::uint64_t>(first + i), batch.spans(i));
    }
    tokens = std::max<std::int64_t>(batch.count_unmasked(), 1);
  }
  const double token_weight = 1.0 / static_cast<double>(tokens);

  models_.student_parameters().zero_gradients(context_.stream);
  kernels::fill_zero(context_.stream, sums_.values);
  for (std::int64_t begin = 0; begin < stage.batch_sequences; begin += stage.microbatch_sequences) {
    distiller_.train(context_, batch.microbatch(begin, begin + stage.microbatch_sequences), objective, token_weight,
                     sums_, microbatch_, arenas_.activations);
    if (dry) break;  // all microbatches need the same memory
  }

  StepReport report;
  report.learning_rate = learning_rate(kind_of(stage.schedule), stage_step, stage_steps(stage), stage.warmup,
                                       stage.learning_rate, stage.final_learning_rate);
  if (!dry) {
    report.losses =
        report_losses(objective, sums_.values.as<double>(), plan_.student.layers(), static_cast<double>(tokens));
    if (!std::isfinite(report.losses.total)) {
      report.gradient_norm = std::nan("");
      return report;
    }
  }
  const Optimizer::Result result = optimizer_.step(context_, report.learning_rate);
  report.gradient_norm = result.gradient_norm;
  report.applied = result.applied;
  return report;
}

DivergenceResult Trainer::evaluate(const WindowReader* reader) {
  return evaluation_.run(context_, distiller_, models_.teacher() != nullptr, reader, plan_.config.eval.tokens,
                         arenas_.activations);
}

ArenaSet Trainer::measure(const TrainingPlan& plan, Device device) {
  ArenaSet arenas = ArenaSet::measuring(device);
  Trainer trainer(plan, arenas, Stream::dry(device));
  for (std::size_t i = 0; i < plan.config.stages.size(); ++i) {
    trainer.begin_stage(i);
    trainer.step(nullptr, 0);
  }
  if (!plan.config.data.validation.empty()) trainer.evaluate(nullptr);
  return arenas;
}

}  // namespace deltapipe
