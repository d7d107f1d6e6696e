#include "core/error.h"
#include "pipeline/model_costs.h"
#include "train/patterns.h"
#include "train/trainer.h"

#include <fmt/format.h>

#include <utility>

namespace deltapipe {
namespace {

pipeline::ModelCosts costs_of(const TrainingPlan& plan, std::size_t i, const pipeline::Speed& speed = {}) {
  const StageConfig& s = plan.config.stages[i];
  pipeline::WorkOfMicrobatch work;
  work.tokens = s.microbatch_sequences * s.sequence_length / plan.mesh.sequence;
  work.sequence_length = s.sequence_length;
  work.recompute = plan.config.memory.recompute;
  work.trains_head_losses = plan.objectives[i].has_head_losses();
  return pipeline::estimate_costs(plan.student, plan.objectives[i].needs_teacher() ? plan.teacher_spec() : nullptr,
                                  work, speed);
}

/// Explicit, or by the costs of the last stage of the recipe: most of a run is there.
std::vector<LayerRange> make_partition(const TrainingPlan& plan) {
  const PipelineConfig& p = plan.config.pipeline;
  const int stages = static_cast<int>(p.chunks) * plan.mesh.pipeline;
  if (plan.student.layers() < stages) {
    fail<ConfigError>("mesh.pipeline = {} x pipeline.chunks = {} needs {} layers, the student has {}",
                      plan.mesh.pipeline, p.chunks, stages, plan.student.layers());
  }
  pipeline::Partition partition;
  if (p.layers.empty()) {
    partition =
        pipeline::partition_layers(pipeline::to_layer_costs(costs_of(plan, plan.config.stages.size() - 1)), stages);
  } else {
    partition = pipeline::partition_from_counts(p.layers, plan.student.layers(), stages);
  }
  std::vector<LayerRange> ranges;
  for (const pipeline::LayerRange& r : partition) ranges.push_back({r.begin, r.end});
  return ranges;
}

void check_mesh(const TrainingPlan& plan) {
  const MeshShape& mesh = plan.mesh;
  const PipelineConfig& p = plan.config.pipeline;
  if (p.chunks > 1 && mesh.pipeline == 1) {
    fail<ConfigError>("pipeline.chunks = {} needs mesh.pipeline of 2 or more; this job has 1", p.chunks);
  }
  if (p.schedule == PipelineSchedule::zero_bubble && mesh.pipeline == 1) {
    fail<ConfigError>("pipeline.schedule = \"zero_bubble\" needs mesh.pipeline of 2 or more; this job has 1");
  }
  const SequenceLayout layout(plan.layout(), mesh.sequence);
  const auto check_length = [&](std::int64_t tokens, const std::string& what) {
    if (mesh.sequence == 1) return;
    const std::int64_t halo = plan.student.has(Mixer::kda) ? plan.student.kda.conv_width - 1 : 1;
    if (tokens % layout.segments() != 0 || tokens / layout.segments() < halo) {
      fail<ConfigError>("{} = {}: with mesh.sequence = {} and mesh.layout = \"{}\" it must be a multiple of {}{}", what,
                        tokens, mesh.sequence, name_of(plan.layout()), layout.segments(),
                        tokens / layout.segments() < halo
                            ? fmt::format(" with segments of at least {} tokens, for the convolution", halo)
                            : "");
    }
  };
  for (std::size_t i = 0; i < plan.config.stages.size(); ++i) {
    const StageConfig& s = plan.config.stages[i];
    check_length(s.sequence_length, fmt::format("stage '{}': sequence_length", s.name));
    if (s.batch_sequences % (s.microbatch_sequences * mesh.data) != 0) {
      fail<ConfigError>(
          "stage '{}': batch_sequences = {} must be a multiple of microbatch_sequences x data ranks, {} x {}", s.name,
          s.batch_sequences, s.microbatch_sequences, mesh.data);
    }
  }
  if (!plan.config.data.validation.empty()) check_length(plan.evaluation_length(), "the evaluation's sequence_length");
}

pipeline::Schedule make_stage_schedule(const TrainingPlan& plan, std::size_t i) {
  pipeline::ScheduleRequest request;
  switch (plan.config.pipeline.schedule) {
    case PipelineSchedule::one_f_one_b: request.kind = pipeline::ScheduleKind::one_f_one_b; break;
    case PipelineSchedule::interleaved: request.kind = pipeline::ScheduleKind::interleaved; break;
    case PipelineSchedule::zero_bubble: request.kind = pipeline::ScheduleKind::zero_bubble; break;
  }
  if (plan.objectives[i].aligns_mixers()) request.kind = pipeline::ScheduleKind::align;
  request.ranks = plan.mesh.pipeline;
  request.chunks = plan.chunks();
  request.microbatches = plan.microbatches(i);
  request.kept_limit = static_cast<int>(plan.config.pipeline.kept_teacher);
  if (!plan.objectives[i].needs_teacher()) {
    request.teacher = pipeline::Teacher::none;
  } else if (plan.config.pipeline.teacher == TeacherTiming::ahead && plan.mesh.pipeline > 1) {
    request.teacher = pipeline::Teacher::ahead;
  } else {
    request.teacher = pipeline::Teacher::in_line;
  }
  return pipeline::make_schedule(request, plan.cost_model(i));
}

/// A pipeline stage has the same layers of both models.
void check_layers(const TrainingPlan& plan) {
  if (plan.mesh.pipeline == 1 || !plan.teacher) return;
  if (plan.teacher->layers() != plan.student.layers()) {
    fail<ConfigError>("mesh.pipeline = {} needs a teacher of as many layers as the student: {} and {}",
                      plan.mesh.pipeline, plan.teacher->layers(), plan.student.layers());
  }
  for (std::size_t i = 0; i < plan.objectives.size(); ++i) {
    for (const auto& [s, t] : plan.objectives[i].hidden_layers) {
      for (const LayerRange& r : plan.partition) {
        const bool has_s = s >= r.first && s < r.last, has_t = t >= r.first && t < r.last;
        if (has_s != has_t) {
          fail<ConfigError>(
              "stage '{}': hidden_layers compares student layer {} with teacher layer {}, which are on different "
              "stages "
              "of the pipeline; pipeline.layers can bring them together",
              plan.config.stages[i].name, s, t);
        }
      }
    }
  }
}

}  // namespace

bool TrainingPlan::trains(const ParameterSpec& parameter) const {
  for (std::size_t i = 0; i < config.stages.size(); ++i) {
    if (reaches(objectives[i], parameter, student) &&
        !matches_any(compile_patterns(config.stages[i].frozen), parameter.name)) {
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

LayoutKind TrainingPlan::layout() const {
  const bool zigzag = config.mesh.layout == SequenceCut::zigzag && mesh.sequence > 1;  // one rank cuts nothing
  return zigzag ? LayoutKind::zigzag : LayoutKind::contiguous;
}

std::vector<LayerRange> TrainingPlan::ranges_of(int pipeline_rank) const {
  std::vector<LayerRange> own;
  for (int c = 0; c < chunks(); ++c)
    own.push_back(partition[static_cast<std::size_t>(c * mesh.pipeline + pipeline_rank)]);
  return own;
}

int TrainingPlan::microbatches(std::size_t i) const {
  const StageConfig& s = config.stages[i];
  return static_cast<int>(s.batch_sequences / (s.microbatch_sequences * mesh.data));
}

double TrainingPlan::flops_per_token(std::size_t i) const {
  const auto frozen = compile_patterns(config.stages[i].frozen);
  return pipeline::model_flops_per_token(
      student, objectives[i].needs_teacher() ? teacher_spec() : nullptr, config.stages[i].sequence_length,
      [&](const ParameterSpec& p) { return reaches(objectives[i], p, student) && !matches_any(frozen, p.name); });
}

pipeline::CostModel TrainingPlan::cost_model(std::size_t i, const pipeline::Speed& speed) const {
  const pipeline::ModelCosts costs = costs_of(*this, i, speed);
  pipeline::Partition stages;
  std::vector<pipeline::StageCost> layers = costs.layers;
  const std::int64_t put_off = config.pipeline.put_off_layers;
  for (const LayerRange& r : partition) {
    stages.push_back({r.first, r.last});
    // Weights' gradients of the others come with those of their inputs.
    for (std::int64_t l = r.first + put_off; put_off > 0 && l < r.last; ++l) {
      pipeline::StageCost& c = layers[static_cast<std::size_t>(l)];
      c.backward_input_s += std::exchange(c.backward_weight_s, 0.0);
    }
  }
  return pipeline::make_cost_model(stages, layers, costs.embedding, costs.head);
}

TrainingPlan make_training_plan(const Config& config, const ModelSpec& student, const ModelSpec* teacher,
                                const MeshShape& mesh) {
  if (config.stages.empty()) fail<ConfigError>("nothing to train: the configuration has no [[stage]]");
  TrainingPlan plan{config, student, std::nullopt, {}, mesh, {}, {}};
  if (teacher != nullptr) plan.teacher = *teacher;
  for (const StageConfig& s : config.stages) plan.objectives.push_back(make_objective(s, student, teacher));
  const auto parameters = parameters_of(student);
  for (std::size_t i = 0; i < config.stages.size(); ++i) {
    const StageConfig& s = config.stages[i];
    const auto frozen = compile_patterns(s.frozen);
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
  check_mesh(plan);
  plan.partition = make_partition(plan);
  check_layers(plan);
  for (std::size_t i = 0; i < config.stages.size(); ++i) plan.schedules.push_back(make_stage_schedule(plan, i));
  return plan;
}

}  // namespace deltapipe
