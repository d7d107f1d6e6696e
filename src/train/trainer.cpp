#include "train/trainer.h"

#include "core/device_memory.h"
#include "core/error.h"
#include "core/trace.h"
#include "kernels/elementwise.h"
#include "train/lr_schedule.h"
#include "train/patterns.h"

#include <algorithm>
#include <cmath>
#include <functional>

namespace deltapipe {
namespace {

constexpr std::string_view embedding_name = "model.embed_tokens.weight";

LrKind kind_of(LearningRateSchedule s) {
  switch (s) {
    case LearningRateSchedule::cosine: return LrKind::cosine;
    case LearningRateSchedule::constant: return LrKind::constant;
    case LearningRateSchedule::linear: return LrKind::linear;
  }
  return LrKind::constant;
}

ModelSet make_models(const TrainingPlan& plan, const Mesh& mesh, ArenaSet& arenas, const Stream& stream) {
  ModelSet models(plan.student, plan.teacher_spec(), compute_dtype(plan.config.run), arenas, stream,
                  plan.ranges_of(mesh.coordinate().pipeline));
  models.student_parameters().allocate_gradients(
      arenas.gradients, [&](const ParameterSpec& p) { return plan.trains(p); },
      mesh.shape().data * mesh.shape().sequence);
  return models;
}

pipeline::Stages make_stages(const TrainingPlan& plan, Mesh& mesh, const ModelSet& models) {
  std::vector<Distiller> chunks;
  for (std::size_t i = 0; i < models.chunks(); ++i) {
    chunks.emplace_back(models.student_chunk(i), models.teacher_chunk(i), plan.config.memory.loss_block_tokens,
                        plan.config.memory.recompute);
  }
  return pipeline::Stages(mesh[Axis::pipeline], std::move(chunks));
}

/// Tasks as spans of a trace, in the time of whoever runs them. One rank's tasks follow each other.
void trace_tasks(pipeline::Executor& executor, const Stream& stream) {
  executor.observer = [stream, begin_ns = std::int64_t{0}, mark = trace::no_mark](const pipeline::Task& task,
                                                                                  bool begins) mutable {
    if (!trace::is_on()) return;
    if (begins) {
      mark = trace::mark(stream);
      begin_ns = trace::now_ns();
      return;
    }
    trace::Event event;
    event.category = "task";
    event.name = pipeline::name_of(task.kind);
    event.microbatch = task.microbatch;
    event.chunk = task.chunk;
    event.step_offset = task.step_offset;
    if (trace::is_marking(stream)) {
      trace::record(event, mark, stream);
      return;
    }
    event.begin_ns = begin_ns;
    event.end_ns = trace::now_ns();
    trace::record(event);
  };
}

}  // namespace

Trainer::Trainer(const TrainingPlan& plan, Mesh& mesh, ArenaSet& arenas, const Stream& stream)
    : plan_(plan),
      mesh_(mesh),
      arenas_(arenas),
      sequence_(mesh.shape().sequence == 1 ? std::nullopt
                                           : std::make_optional<SequenceParallel>(mesh[Axis::sequence], plan.layout())),
      context_{stream, arenas.workspace, sequence_ ? &*sequence_ : nullptr, nullptr},
      models_(make_models(plan, mesh, arenas, stream)),
      optimizer_(plan.config.optimizer, models_.student_parameters(), arenas.optimizer,
                 {{mesh[Axis::data_sequence].rank(), mesh[Axis::data_sequence].size()},
                  static_cast<std::uint64_t>(plan.config.run.seed),
                  plan.config.memory.optimizer == OptimizerPlace::host ? &arenas.host : nullptr}),
      exchange_(models_.student_parameters(), mesh[Axis::data_sequence], arenas.communication),
      stages_(make_stages(plan, mesh, models_)),
      works_(make_works()),
      totals_(arenas.batch.allocate(DType::f64, {LossSums::count + 1}, "loss sums")),
      host_totals_(stream.device().is_cpu()
                       ? totals_
                       : arenas.staging().allocate(DType::f64, {LossSums::count + 1}, "loss sums, host")),
      sums_{totals_.rows(0, LossSums::count)},
      evaluation_(plan_.evaluation_length(), arenas.staging(), arenas.batch,
                  SequenceLayout(plan.layout(), mesh.shape().sequence), mesh.coordinate().sequence) {
  if (!stream.is_dry()) stages_.connect();
}

std::vector<Trainer::StageWork> Trainer::make_works() {
  std::vector<StageWork> works;
  const SequenceLayout layout(plan_.layout(), mesh_.shape().sequence);
  // Stages follow each other in the same memory: each takes its own from where the first began.
  struct Shared {
    Arena& arena;
    std::size_t begin = arena.used(), most = begin;
    void see() { most = std::max(most, arena.used()); }
    void keep() {
      if (most > begin) arena.allocate(DType::u8, {static_cast<std::int64_t>(most - begin)}, "batches");
    }
  };
  const bool on_device = !arenas_.batch.device().is_cpu();
  Shared batch{arenas_.batch}, staging{arenas_.staging()};
  for (std::size_t i = 0; i < plan_.config.stages.size(); ++i) {
    const StageConfig& s = plan_.config.stages[i];
    const auto batch_scope = batch.arena.scope(), staging_scope = staging.arena.scope(),
               activation_scope = arenas_.activations.scope(), communication_scope = arenas_.communication.scope();
    mark_trainable(i);  // what a microbatch keeps for weights' gradients depends on it
    const pipeline::Schedule& schedule = plan_.schedules[i];
    std::vector<HostBatch> batches;
    const bool ahead = schedule.teacher == pipeline::Teacher::ahead;
    for (int n = 0; n < (ahead ? 2 : 1); ++n) {
      batches.emplace_back(staging.arena, batch.arena, s.batch_sequences / mesh_.shape().data, s.sequence_length,
                           layout, mesh_.coordinate().sequence);
    }
    const pipeline::Executor::Job job{plan_.objectives[i], s.microbatch_sequences, plan_.config.memory.recompute,
                                      plan_.config.pipeline.put_off_layers};
    pipeline::Executor executor(stages_, schedule, job, batches.front(), context_.sequence, arenas_.activations,
                                arenas_.communication);
    trace_tasks(executor, context_.stream);
    if (exchange_.has_peers()) {
      executor.gradients_complete = [this](std::int64_t layer) {
        // A part alone cannot be summed: sum_gradients() adds the other one first.
        const bool waits = layer == embedding_layer && embedding_is_apart();
        if (!waits) exchange_.start_sum(context_.stream, layer);
      };
    }
    batch.see();
    staging.see();
    works.push_back({std::move(batches), std::move(executor), {-1, -1}});
  }
  batch.keep();
  if (on_device) staging.keep();
  return works;
}

bool Trainer::owns(const ParameterSpec& parameter) const {
  const bool tied = plan_.student.tied_embeddings && parameter.name == embedding_name;
  return !tied || mesh_.coordinate().pipeline == 0;
}

void Trainer::mark_trainable(std::size_t stage) {
  const auto frozen = compile_patterns(plan_.config.stages[stage].frozen);
  for (Parameter& p : models_.student_parameters().all()) {
    p.trainable = p.gradient_memory && reaches(plan_.objectives[stage], p.spec, plan_.student) &&
                  !matches_any(frozen, p.spec.name);
  }
  exchange_.select();
}

void Trainer::begin_stage(std::size_t stage) {
  stage_ = stage;
  mark_trainable(stage);
  optimizer_.reset(context_.stream);
}

/// The batch of a step, read from the data set unless it is in memory already.
HostBatch& Trainer::load(const SequenceLoader* loader, std::int64_t stage_step) {
  StageWork& work = works_[stage_];
  const auto i = static_cast<std::size_t>(stage_step) % work.batches.size();
  HostBatch& batch = work.batches[i];
  if (work.loaded[i] == stage_step || context_.stream.is_dry()) return batch;
  const std::int64_t first =
      stage_step * plan_.config.stages[stage_].batch_sequences + mesh_.coordinate().data * batch.sequences();
  for (std::int64_t k = 0; k < batch.sequences(); ++k) {
    loader->fill(static_cast<std::uint64_t>(first + k), batch.spans(k));
  }
  batch.cut(context_.stream);
  work.loaded[i] = stage_step;
  return batch;
}

/// Every rank's part of the gradients -> the whole batch's, each rank its shard. Most sums have been started by then.
void Trainer::sum_gradients() {
  const Stream& stream = context_.stream;
  ParameterTable& parameters = models_.student_parameters();
  Communicator& along = mesh_[Axis::pipeline];
  const int last = along.size() - 1;
  if (embedding_is_apart() && (along.rank() == 0 || along.rank() == last)) {
    // Embedding and head each add their part; both ranks then hold the same sum and make the same update.
    if (const Tensor own = parameters.at(embedding_name).gradient()) {
      const auto scope = context_.workspace.scope();
      const Tensor theirs = context_.workspace.allocate(own.dtype, own.shape, "tied embedding's other gradient");
      const int peer = last - along.rank();
      constexpr int tag = pipeline::message_kinds;  // hidden states of the next step may be under way between the two
      const std::array<Transfer, 1> send{{{peer, own, tag}}}, receive{{{peer, theirs, tag}}};
      along.exchange(stream, send, receive, Purpose::gradients);
      kernels::add_in_place(stream, theirs, own);
    }
  }
  exchange_.finish_sums(stream);
}

void Trainer::gather_weights(bool all_stages) {
  const Stream& stream = context_.stream;
  const auto taken = [&](const Parameter& p, std::size_t bucket) {
    return p.gradient_memory && p.bucket == bucket && (all_stages || p.trainable);
  };
  // Through the gradients' memory: what it held has been used.
  const auto fill = [&](std::size_t bucket) {
    for (const Optimizer::State& s : optimizer_.state()) {
      if (taken(*s.parameter, bucket)) kernels::copy_cast(stream, s.value(), s.gradient());
    }
  };
  const auto take = [&](std::size_t bucket) {
    for (const Parameter& p : models_.student_parameters().all()) {
      if (taken(p, bucket)) kernels::copy_cast(stream, p.gradient_memory, p.value);
    }
  };
  exchange_.gather(stream, all_stages, std::ref(fill), std::ref(take));
}

StepReport Trainer::step(const SequenceLoader* loader, std::int64_t stage_step) {
  StepReport report = accumulate(loader, stage_step);
  update(report);
  return report;
}

StepReport Trainer::accumulate(const SequenceLoader* loader, std::int64_t stage_step) {
  const StageConfig& stage = plan_.config.stages[stage_];
  const Objective& objective = plan_.objectives[stage_];
  StageWork& work = works_[stage_];
  const bool dry = context_.stream.is_dry();
  const std::int64_t steps = stage_steps(stage);
  trace::Span loading("data", "load batch");
  const HostBatch& batch = load(loader, stage_step);
  const bool goes_on = work.executor.looks_ahead() && stage_step + 1 < steps;
  const HostBatch* next = goes_on ? &load(loader, stage_step + 1) : nullptr;
  loading.end();
  double tokens = dry ? 1.0 : static_cast<double>(batch.count_unmasked());
  mesh_[Axis::data].all_reduce_sum(context_.stream, Tensor(&tokens, DType::f64, {1}), Purpose::control,
                                   context_.workspace);
  tokens = std::max(tokens, 1.0);

  trace::Span clearing("optimizer", "zero gradients", context_.stream);
  models_.student_parameters().zero_gradients(context_.stream);
  kernels::fill_zero(context_.stream, totals_);
  clearing.end();
  work.executor.run(context_, {&batch, next, 1.0 / tokens, sums_});
  trace::Span summing("optimizer", "gradient sum", context_.stream);
  sum_gradients();
  summing.end();
  trace::Span measuring("optimizer", "gradient norm", context_.stream);
  const std::string_view counted_elsewhere =
      mesh_.coordinate().pipeline > 0 && plan_.student.tied_embeddings ? embedding_name : std::string_view();
  optimizer_.add_squared_norm(context_, totals_.rows(LossSums::count, LossSums::count + 1), counted_elsewhere);
  mesh_[Axis::world].all_reduce_sum(context_.stream, totals_, Purpose::control, context_.workspace);
  measuring.end();

  StepReport report;
  report.learning_rate = learning_rate(kind_of(stage.schedule), stage_step, steps, stage.warmup, stage.learning_rate,
                                       stage.final_learning_rate);
  if (!dry) {
    copy(context_.stream, totals_, host_totals_);
    synchronize(context_.stream);
    trace::settle(context_.stream);
    const double* totals = host_totals_.as<double>();
    report.losses = report_losses(objective, totals, plan_.student.layers(), tokens);
    report.gradient_norm = std::sqrt(totals[LossSums::count]);
  }
  return report;
}

void Trainer::update(StepReport& report) {
  if (!std::isfinite(report.losses.total)) return;
  trace::Span updating("optimizer", "update", context_.stream);
  report.applied = optimizer_.apply(context_, report.gradient_norm, report.learning_rate).applied;
  updating.end();
  const trace::Span gathering("optimizer", "weight gather", context_.stream);
  if (report.applied) gather_weights(false);
}

void Trainer::stop() { works_[stage_].executor.stop(context_); }

DivergenceResult Trainer::evaluate(const WindowReader* reader) {
  // What the teacher did ahead stays where it is.
  const auto scope = arenas_.activations.scope();
  const std::size_t kept = works_[stage_].executor.teacher_bytes();
  if (kept > 0) arenas_.activations.allocate(DType::u8, {static_cast<std::int64_t>(kept)}, "teacher states, kept");
  return evaluation_.run(context_, stages_, mesh_, reader, plan_.config.eval.tokens, arenas_.activations);
}

ArenaSet Trainer::measure(const TrainingPlan& plan, Mesh& mesh, Device device) {
  ArenaSet arenas = ArenaSet::measuring(device);
  Trainer trainer(plan, mesh, arenas, Stream::dry(device));
  for (std::size_t i = 0; i < plan.config.stages.size(); ++i) {
    trainer.begin_stage(i);
    trainer.step(nullptr, 0);
    if (!plan.config.data.validation.empty()) trainer.evaluate(nullptr);
  }
  return arenas;
}

}  // namespace deltapipe
