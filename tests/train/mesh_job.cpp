#include "tests/train/mesh_job.h"

#include "core/host_staging.h"
#include "core/random.h"
#include "distill/student_init.h"
#include "kernels/elementwise.h"

#include <fmt/format.h>

#include <cmath>

namespace deltapipe::testing {
namespace {

constexpr std::int64_t vocabulary = 61;

/// Wide heads and a large epsilon: rows near zero would blow up rounding in the norms behind them, on one rank as on
/// many. So float32 differs from float64 by less than 5e-6 of any gradient tensor.
ModelSpec teacher_spec(bool llama, std::int64_t layers, bool large) {
  ModelSpec s;
  s.model_type = llama ? "llama" : "arcee";
  s.vocabulary = vocabulary;
  s.hidden = large ? 128 : 64;
  s.intermediate = large ? 192 : 96;
  s.heads = 2;
  s.kv_heads = 1;
  s.head_dim = large ? 64 : 32;
  s.max_positions = 4096;
  s.norm_eps = 1e-3;
  s.tied_embeddings = llama;
  s.mlp = llama ? Mlp::gated_silu : Mlp::squared_relu;
  s.rope = {.theta = 10000.0, .factor = 20.0, .original_max_positions = 64};
  s.mixers.assign(static_cast<std::size_t>(layers), Mixer::rope);
  return s;
}

StudentConfig student_config(const std::string& student) {
  StudentConfig c;
  c.mixers = {"kda", "kda", "kda", "nope"};
  if (student == "kda") c.mixers = {"kda"};
  if (student == "llama") c.mixers = {"kda", "rope"};
  c.kda.gate_rank = 8;
  return c;
}

/// Matrices N(0, 1 / inputs), norms near 1; what layers add to the hidden state is scaled down, as in deep models.
void fill(const ParameterSpec& p, const Tensor& out) {
  const RandomStream r(11, "teacher " + p.name);
  const bool is_norm = p.name.ends_with("norm.weight");
  double scale = p.shape.rank() == 2 ? 1.0 / std::sqrt(static_cast<double>(p.shape[1])) : 0.1;
  if (p.name.ends_with("o_proj.weight") || p.name.ends_with("down_proj.weight")) scale *= 0.4;
  for (std::int64_t i = 0; i < out.numel(); ++i) {
    const double x = (is_norm ? 1.0 : 0.0) + scale * r.normal(static_cast<std::uint64_t>(i));
    if (out.dtype == DType::f64) {
      out.as<double>()[i] = x;
    } else {
      out.as<float>()[i] = static_cast<float>(x);
    }
  }
}

Config config_of(const MeshCase& c, DType dtype) {
  const std::string losses =
      c.aligns ? "mixer_mse = 1.0" : "ce = 0.2\nkl = 0.5\njsd = 0.2\nhidden_cosine = 0.5\nhidden_mse = 0.05";
  const std::string text = fmt::format(
      "[run]\ndevice = '{}'\ndtype = '{}'\n[teacher]\npath = '-'\n[data]\ntrain = '-'\nvalidation = '-'\n"
      "[mesh]\nlayout = '{}'\n[pipeline]\nschedule = '{}'\nchunks = {}\nteacher = '{}'\n"
      "[memory]\nrecompute = {}\nloss_block_tokens = 40\n[eval]\ntokens = 480\n"
      "[[stage]]\nname = 's'\nsteps = {}\nsequence_length = {}\nbatch_sequences = 8\nlearning_rate = 1e-3\n"
      "schedule = 'constant'\n{}\n[stage.loss]\n{}\n",
      c.device.is_cuda() ? "cuda" : "cpu", name_of(dtype), name_of(c.layout), c.schedule, c.chunks, c.teacher,
      c.recompute, mesh_job_steps, c.length, c.aligns ? "" : "temperature = 2.0", losses);
  return parse_config(text, "mesh_job.toml");
}

TrainingPlan plan_of(const MeshCase& c, DType dtype, std::int64_t layers) {
  const ModelSpec teacher = teacher_spec(c.student == "llama", layers, c.large || c.device.is_cuda());
  return make_training_plan(config_of(c, dtype), make_student_spec(student_config(c.student), &teacher, 0), &teacher,
                            c.shape);
}

void append(std::vector<double>& to, const Tensor& t) {
  const std::size_t begin = to.size();
  to.resize(begin + static_cast<std::size_t>(t.numel()));
  kernels::copy_cast(Stream::cpu(), t, Tensor(to.data() + begin, DType::f64, t.shape));
}

/// fill() for a weight of any dtype on any device.
void fill_parameter(const Stream& stream, Parameter& p, HostStaging& staging) {
  const DType dtype = accumulation_dtype(p.value.dtype);
  std::vector<std::byte> memory(static_cast<std::size_t>(p.value.numel()) * size_of(dtype));
  const Tensor values(memory.data(), dtype, p.value.shape);
  fill(p.spec, values);
  staging.write(stream, p.value, [&](const Tensor& host) { kernels::copy_cast(Stream::cpu(), values, host); });
}

/// Rounds to what bfloat16 holds, but for weights that are never held in it.
void round_weights(ParameterTable& parameters) {
  for (Parameter& p : parameters.all()) {
    if (p.spec.keep_float32) continue;
    std::vector<BFloat16> rounded(static_cast<std::size_t>(p.value.numel()));
    const Tensor narrow(rounded.data(), DType::bf16, p.value.shape);
    kernels::copy_cast(Stream::cpu(), p.value, narrow);
    kernels::copy_cast(Stream::cpu(), narrow, p.value);
  }
}

}  // namespace

std::string MeshCase::name() const {
  return fmt::format("{}{}, data {} x pipeline {} x sequence {} ({}), {} x {}, teacher {}{}", student,
                     aligns ? ", alignment" : "", shape.data, shape.pipeline, shape.sequence, name_of(layout), schedule,
                     chunks, teacher, recompute ? ", recompute" : "");
}

MeshJob::MeshJob(const MeshCase& which, Mesh& mesh, DType dtype, std::int64_t layers, const Change& change)
    : mesh_(mesh), plan_(plan_of(which, dtype, layers)), stream_(which.device) {
  if (change) change(plan_);
  // Documents of 1 to 150 tokens: they begin, end and go on at cuts of segments and sequences.
  write_dataset(folder_ / "tokens.h5", {"tiny", "none", vocabulary, -1, 22}, random_documents(5, 200, 150, vocabulary));
  data_ = std::make_unique<TokenDataset>(folder_ / "tokens.h5");
  loader_ = std::make_unique<SequenceLoader>(*data_, which.length, 1, true);
  validation_ = std::make_unique<WindowReader>(*data_, which.length, true);
  arenas_ = Trainer::measure(plan_, mesh_, which.device).reserve();
  trainer_ = std::make_unique<Trainer>(plan_, mesh_, arenas_, stream());
  ModelSet& models = trainer_->models();
  HostStaging staging;
  for (Parameter& p : models.teacher_parameters()->all()) fill_parameter(stream(), p, staging);
  init_student_from_teacher(student_config(which.student), 3, *plan_.teacher, fill, plan_.student,
                            models.student_parameters(), stream());
  if (which.rounded) {
    round_weights(*models.teacher_parameters());
    round_weights(models.student_parameters());
  }
  trainer_->optimizer().capture_weights(stream());
  trainer_->begin_stage(0);
}

std::vector<std::vector<double>> MeshJob::collect(const std::function<Tensor(const Optimizer::State&)>& part) {
  std::vector<std::vector<double>> all;
  Arena workspace("collect", std::size_t{1} << 24);
  HostStaging staging;
  for (const ParameterSpec& p : parameters_of(plan_.student)) {
    std::vector<double>& values = all.emplace_back(static_cast<std::size_t>(p.shape.numel()), 0.0);
    for (const Optimizer::State& s : trainer_->optimizer().state()) {
      if (s.parameter->spec.name != p.name || !trainer_->owns(p)) continue;
      std::vector<double> own;
      append(own, staging.read(stream(), part(s)));
      std::copy(own.begin(), own.end(), values.begin() + s.begin);
    }
    mesh_[Axis::world].all_reduce_sum(Stream::cpu(), Tensor(values.data(), DType::f64, {p.shape.numel()}),
                                      Purpose::control, workspace);
  }
  return all;
}

std::vector<std::vector<double>> MeshJob::gradients() {
  return collect([](const Optimizer::State& s) { return s.gradient(); });
}

std::vector<std::vector<double>> MeshJob::weights() {
  return collect([](const Optimizer::State& s) { return s.master; });
}

std::vector<std::string> MeshJob::names() const {
  std::vector<std::string> list;
  for (const ParameterSpec& p : parameters_of(plan_.student)) list.push_back(p.name);
  return list;
}

}  // namespace deltapipe::testing
