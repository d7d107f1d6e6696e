#include "plan/plan.h"

#include "checkpoints/hf_config.h"
#include "checkpoints/hf_import.h"
#include "core/error.h"
#include "data/token_dataset.h"
#include "distill/student_init.h"
#include "kernels/settings.h"

#include <algorithm>

namespace deltapipe {
namespace fs = std::filesystem;
namespace {

ModelSpec read_spec(const fs::path& folder) {
  try {
    return read_huggingface_config(folder / "config.json");
  } catch (const FormatError&) {
    std::error_code ignored;
    const bool has_weights = fs::exists(folder / "model.safetensors", ignored) ||
                             fs::exists(folder / "model.safetensors.index.json", ignored);
    if (!has_weights) throw;
  }
  return HuggingFaceFolder(folder).spec();
}

RankMemory measure_rank(const TrainingPlan& plan, int rank) {
  const bool cuda = plan.config.run.device == DeviceChoice::cuda;
  const Device device{cuda ? Device::Kind::cuda : Device::Kind::cpu, 0};
  Mesh mesh(plan.mesh, rank, device);
  const ArenaSet measured = Trainer::measure(plan, mesh, device);
  RankMemory memory{rank, mesh.coordinate(), {}, measured.host.peak()};
  for (const Arena* a : measured.all()) memory.arenas.emplace_back(a->name(), a->peak());
  return memory;
}

std::size_t bytes_of(const RankMemory& memory, std::string_view arena) {
  const auto it =
      std::find_if(memory.arenas.begin(), memory.arenas.end(), [&](const auto& a) { return a.first == arena; });
  require(it != memory.arenas.end(), "plan: no arena of that name");
  return it->second;
}

double seconds_of_update(const RunPlan& plan) {
  const MeshShape& mesh = plan.training.mesh;
  const double peers = mesh.data * mesh.sequence;
  double longest = 0;
  for (const RankMemory& m : plan.memory) {
    const auto gradients = static_cast<double>(bytes_of(m, "gradients"));
    const auto states = static_cast<double>(bytes_of(m, "optimizer"));
    const double sent = 2 * gradients * (peers - 1) / peers;
    longest =
        std::max(longest, sent / plan.device.link_bytes_s + (gradients + 2 * states) / plan.device.compute.bandwidth);
  }
  return longest;
}

StageTime time_of_stage(const RunPlan& plan, std::size_t i, double update_s) {
  const TrainingPlan& training = plan.training;
  const StageConfig& s = training.config.stages[i];
  const pipeline::Schedule& schedule = training.schedules[i];
  pipeline::CostModel cost = training.cost_model(i, plan.device.compute);
  const std::int64_t tokens = s.microbatch_sequences * s.sequence_length / training.mesh.sequence;
  const auto hidden_state = static_cast<double>(tokens * training.student.hidden) *
                            static_cast<double>(size_of(compute_dtype(training.config.run)));
  cost.message_s = hidden_state / plan.device.link_bytes_s;
  cost.update_s = update_s;
  StageTime time;
  time.name = s.name;
  time.steps = stage_steps(s);
  time.tokens = s.batch_sequences * s.sequence_length;
  time.schedule = schedule.name;
  time.simulation = simulate(schedule, cost);
  return time;
}

}  // namespace

std::size_t RankMemory::total() const {
  std::size_t bytes = 0;
  for (const auto& [name, peak] : arenas) bytes += peak;
  return bytes;
}

MeshShape plan_mesh(const Config& config, int ranks) {
  const MeshShape asked{static_cast<int>(config.mesh.data), static_cast<int>(config.mesh.pipeline),
                        static_cast<int>(config.mesh.sequence)};
  if (ranks > 0) return asked.resolve(ranks);
  return {std::max(asked.data, 1), std::max(asked.pipeline, 1), std::max(asked.sequence, 1)};
}

PlannedModels read_planned_models(const Config& config) {
  PlannedModels models;
  if (!config.teacher.path.empty()) models.teacher = read_spec(config.teacher.path);
  if (config.student.init == StudentInit::folder) {
    models.student = read_spec(config.student.path);
    return models;
  }
  std::int64_t vocabulary = 0;
  if (config.student.init == StudentInit::random && config.student.model.vocabulary == 0) {
    vocabulary = static_cast<std::int64_t>(TokenDataset(config.data.train).vocabulary());
  }
  models.student = make_student_spec(config.student, models.teacher ? &*models.teacher : nullptr, vocabulary);
  return models;
}

RunPlan make_run_plan(const TrainingPlan& training, const DeviceSpeed& device) {
  kernels::settings().deterministic = training.config.run.deterministic;  // workspaces depend on it
  RunPlan plan{training, device, {}, {}, {}};
  double sum = 0;
  const std::size_t last = training.config.stages.size() - 1;
  for (const pipeline::StageCost& c : training.cost_model(last, device.compute).stages) {
    const double student =
        training.objectives[last].aligns_mixers() ? c.align_s : c.forward_s + c.backward_input_s + c.backward_weight_s;
    plan.stage_shares.push_back(c.teacher_forward_s + student);
    sum += plan.stage_shares.back();
  }
  for (double& share : plan.stage_shares) share /= sum;
  for (int rank = 0; rank < training.mesh.size(); ++rank) plan.memory.push_back(measure_rank(training, rank));
  const double update_s = seconds_of_update(plan);
  for (std::size_t i = 0; i <= last; ++i) plan.times.push_back(time_of_stage(plan, i, update_s));
  return plan;
}

}  // namespace deltapipe
