#include "train/run.h"

#include "checkpoints/hf_config.h"
#include "checkpoints/training_checkpoint.h"
#include "core/device_memory.h"
#include "core/error.h"
#include "core/file.h"
#include "core/log.h"
#include "core/parallel.h"
#include "core/random.h"
#include "core/trace.h"
#include "data/token_dataset.h"
#include "kernels/settings.h"
#include "train/mesh_checkpoint.h"
#include "train/metrics.h"
#include "train/signals.h"
#include "train/snapshot.h"
#include "train/trace_window.h"
#include "train/weight_source.h"

#include <fmt/format.h>
#include <sys/resource.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <thread>

namespace deltapipe {
namespace fs = std::filesystem;
namespace {

constexpr const char* lock_name = "lock";

/// The loop's own view of where it is.
struct Progress {
  std::int64_t step = 0;
  std::int64_t stage = 0;
  std::int64_t stage_step = 0;
  std::uint64_t tokens = 0;
  std::int64_t skipped = 0;
  std::int64_t skipped_in_a_row = 0;
};

TrainingState to_state(const Progress& p, const TrainingPlan& plan, std::uint64_t windows, std::int64_t updates) {
  const StageConfig& stage = plan.config.stages[static_cast<std::size_t>(p.stage)];
  const auto sequences = static_cast<std::uint64_t>(p.stage_step * stage.batch_sequences);
  TrainingState s;
  s.step = p.step;
  s.stage = p.stage;
  s.stage_step = p.stage_step;
  s.data_epoch = sequences / windows;
  s.data_position = sequences % windows;
  s.tokens_seen = p.tokens;
  s.skipped_steps = p.skipped;
  s.skipped_in_a_row = p.skipped_in_a_row;
  s.mesh = {plan.mesh.data, plan.mesh.pipeline, plan.mesh.sequence};
  s.seeds["run"] = static_cast<std::uint64_t>(plan.config.run.seed);
  s.values["optimizer_updates"] = static_cast<double>(updates);
  s.config_toml = to_toml(plan.config);
  return s;
}

Progress to_progress(const TrainingState& s, const TrainingPlan& plan, const std::string& where) {
  if (s.model_config != write_huggingface_config(plan.student, DType::f32)) {
    fail<ConfigError>("{} holds another model than the student of this configuration", where);
  }
  if (s.stage < 0 || static_cast<std::size_t>(s.stage) >= plan.config.stages.size()) {
    fail<ConfigError>("{} was written in stage {}, but the configuration has {} stages", where, s.stage,
                      plan.config.stages.size());
  }
  return {s.step, s.stage, s.stage_step, s.tokens_seen, s.skipped_steps, s.skipped_in_a_row};
}

/// Whether checkpoint `a` is of a later step than `b`, by their names: steps of nine digits follow those of eight.
bool is_later(const std::string& a, const std::string& b) { return a.size() != b.size() ? a.size() > b.size() : a > b; }

/// Checkpoints in the folder, whole or damaged, newest first.
std::vector<fs::path> checkpoints_in(const fs::path& folder) {
  std::vector<fs::path> found;
  std::error_code error;  // a folder that is not there holds none; one that cannot be read is told of when it is made
  fs::directory_iterator it(folder, error);
  for (; !error && it != fs::directory_iterator(); it.increment(error)) {
    if (it->path().filename().string().starts_with("step-")) found.push_back(it->path());
  }
  std::sort(found.begin(), found.end(), [](const fs::path& a, const fs::path& b) {
    return is_later(a.filename().string(), b.filename().string());
  });
  return found;
}

/// Those in the folder that --resume auto would prefer to the one of `step`, newest first.
std::vector<fs::path> checkpoints_after(const fs::path& folder, std::int64_t step) {
  std::vector<fs::path> found = checkpoints_in(folder);
  std::erase_if(found, [&](const fs::path& p) { return !is_later(p.filename().string(), checkpoint_name(step)); });
  return found;
}

/// The checkpoint to go on from, opened and verified; null when the run begins.
std::unique_ptr<CheckpointReader> open_checkpoint(const RunOptions& options, const fs::path& folder) {
  if (options.resume == "none") {
    if (!options.restart && !checkpoints_in(folder).empty()) {
      fail<UsageError>("{} already holds checkpoints; go on with --resume auto, or begin anew with --restart",
                       folder.string());
    }
    return nullptr;
  }
  if (options.resume != "auto") {
    auto chosen = std::make_unique<CheckpointReader>(find_checkpoint(options.resume));
    const std::vector<fs::path> later = checkpoints_after(folder, chosen->state().step);
    if (!options.restart && !later.empty()) {
      fail<UsageError>("{} is of a later step than {}, and --resume auto would go on from it; --restart removes such",
                       later.front().string(), chosen->folder().string());
    }
    return chosen;
  }
  if (options.restart) {
    fail<UsageError>("--restart begins anew, --resume auto goes on: give one of them, or --resume FOLDER");
  }
  const std::vector<fs::path> found = checkpoints_in(folder);
  for (const fs::path& checkpoint : found) {
    try {
      return std::make_unique<CheckpointReader>(checkpoint);
    } catch (const FormatError& e) {
      log::warn("checkpoint passed over: {}", e.what());
    }
  }
  if (found.empty()) return nullptr;
  fail<FormatError>("{} holds checkpoints, but none of them is whole; begin anew with --restart", folder.string());
}

/// Every stage reads the text in an order of its own.
std::uint64_t order_seed(const Config& config, const StageConfig& stage) {
  return RandomStream(static_cast<std::uint64_t>(config.run.seed), "data order " + stage.name).bits(0);
}

std::uint64_t total_tokens(const Config& config) {
  std::int64_t n = 0;
  for (const StageConfig& s : config.stages) n += stage_steps(s) * s.batch_sequences * s.sequence_length;
  return static_cast<std::uint64_t>(n);
}

/// Warns when a checkpoint was written under other settings that shape the weights.
void compare_configs(const Config& now, const TrainingState& state, const std::string& where) {
  Config then = parse_config(state.config_toml, where + "'s configuration", {});
  then.run.name = now.run.name;
  then.run.dir = now.run.dir;
  then.run.threads = now.run.threads;
  then.run.log_level = now.run.log_level;
  then.mesh = now.mesh;
  then.pipeline = now.pipeline;
  then.checkpoint = now.checkpoint;
  then.eval = now.eval;
  then.log = now.log;
  then.trace = now.trace;
  if (!(then == now)) {
    log::warn("the configuration is not the one that {} was written with; the run goes on with the new one", where);
  }
}

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

/// Text of rank 0 on every rank.
std::string broadcast_text(Communicator& world, const std::string& text) {
  constexpr std::int64_t most = 4096;  // longer than any path
  std::array<char, most> buffer{};
  text.copy(buffer.data(), buffer.size() - 1);
  world.broadcast(Stream::cpu(), Tensor(buffer.data(), DType::u8, {most}), 0, Purpose::control);
  return buffer.data();
}

std::uint64_t peak_rss_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<std::uint64_t>(usage.ru_maxrss) * 1024;  // Linux counts in KiB
}

/// What every rank's arenas were planned to hold, and what they held at most.
std::vector<RankMemoryUse> gather_memory(Communicator& world, const ArenaSet& planned, const ArenaSet& real) {
  const auto names = planned.all();
  const auto arenas = real.all();
  std::vector<std::uint64_t> own, all(2 * names.size() * static_cast<std::size_t>(world.size()));
  for (std::size_t i = 0; i < names.size(); ++i) {
    own.push_back(names[i]->peak());
    own.push_back(arenas[i]->peak());
  }
  const auto tensor = [](std::vector<std::uint64_t>& v) { return Tensor(v.data(), DType::u64, {std::ssize(v)}); };
  world.all_gather(Stream::cpu(), tensor(own), tensor(all), Purpose::control);
  std::vector<RankMemoryUse> list(static_cast<std::size_t>(world.size()));
  for (std::size_t i = 0; i < all.size(); i += 2) {
    list[i / (2 * names.size())].push_back({names[i / 2 % names.size()]->name(), all[i], all[i + 1]});
  }
  return list;
}

/// Sent by all ranks since the last call, for the metrics.
class TrafficMeter {
 public:
  explicit TrafficMeter(Mesh& mesh) : mesh_(mesh), workspace_(reserve_workspace(mesh)) {}

  std::vector<TrafficMetrics> measure() {
    std::array<double, 2 * entries> now{};
    for (std::size_t a = 0; a < axis_count; ++a) {
      for (std::size_t p = 0; p < purpose_count; ++p) {
        const Traffic& t = mesh_[static_cast<Axis>(a)].traffic(static_cast<Purpose>(p));
        now[2 * (a * purpose_count + p)] = static_cast<double>(t.messages);
        now[2 * (a * purpose_count + p) + 1] = static_cast<double>(t.bytes);
      }
    }
    std::array<double, 2 * entries> sent{};
    for (std::size_t i = 0; i < now.size(); ++i) sent[i] = now[i] - before_[i];
    before_ = now;
    mesh_[Axis::world].all_reduce_sum(Stream::cpu(), Tensor(sent.data(), DType::f64, {2 * entries}), Purpose::control,
                                      workspace_);
    std::vector<TrafficMetrics> list;
    for (std::size_t i = 0; i < entries; ++i) {
      if (sent[2 * i] == 0) continue;
      list.push_back({std::string(name_of(static_cast<Axis>(i / purpose_count))),
                      std::string(name_of(static_cast<Purpose>(i % purpose_count))), sent[2 * i], sent[2 * i + 1]});
    }
    return list;
  }

 private:
  static constexpr std::size_t entries = axis_count * purpose_count;

  /// What the sum over all ranks takes, whatever their number.
  static Arena reserve_workspace(Mesh& mesh) {
    Arena measured = Arena::measuring("traffic workspace");
    std::array<double, 2 * entries> sent{};
    mesh[Axis::world].all_reduce_sum(Stream::dry({}), Tensor(sent.data(), DType::f64, {2 * entries}), Purpose::control,
                                     measured);
    return Arena("traffic workspace", measured.peak());
  }

  Mesh& mesh_;
  Arena workspace_;
  std::array<double, 2 * entries> before_{};
};

class TrainingRun {
 public:
  TrainingRun(const Config& config, const RunOptions& options, MpiRuntime& runtime)
      : config_(config),
        runtime_(runtime),
        folder_(run_dir(config.run)),
        checkpoints_(folder_ / "checkpoints"),
        restart_(options.restart),
        device_(choose_device(config, runtime)),
        stream_(device_) {
    open_resumed(options);
    MeshShape shape;
    runtime_.together([&] {
      shape = MeshShape{static_cast<int>(config.mesh.data), static_cast<int>(config.mesh.pipeline),
                        static_cast<int>(config.mesh.sequence)}
                  .resolve(runtime_.size());
      train_data_.emplace(config.data.train);
      sources_ = open_models(config, static_cast<std::int64_t>(train_data_->vocabulary()));
      plan_ =
          make_training_plan(config, sources_.student, sources_.teacher ? &sources_.teacher->spec() : nullptr, shape);
      check_vocabulary(*train_data_, config.data.train);
      if (!config.data.validation.empty()) {
        validation_data_.emplace(config.data.validation);
        check_vocabulary(*validation_data_, config.data.validation);
        validation_.emplace(*validation_data_, plan_.evaluation_length(), config.data.isolate_documents);
      }
      for (const StageConfig& s : config.stages) {
        loaders_.emplace_back(*train_data_, s.sequence_length, order_seed(config, s), config.data.isolate_documents);
      }
      if (resume_from_) {
        const std::string where = resume_from_->folder().string();
        first_ = to_progress(resume_from_->state(), plan_, where);
        if (is_first()) compare_configs(config_, resume_from_->state(), where);
      }
    });
    mesh_.emplace(runtime_, shape, device_);
  }

  RunResult run() {
    std::optional<ArenaSet> arenas;
    std::optional<Trainer> maybe_trainer;
    ArenaSet measured = ArenaSet::measuring(device_);
    runtime_.together([&] {
      measured = Trainer::measure(plan_, *mesh_, device_);
      tell_memory(measured);
      if (is_first()) {
        make_writable_folder(folder_);
        if (!lock_) lock_folder();
        if (restart_) remove_checkpoints();
        write_file_atomically(folder_ / "config.toml", to_toml(config_));
      }
      arenas = measured.reserve();
      Trainer& trainer = maybe_trainer.emplace(plan_, *mesh_, *arenas, stream());
      if (sources_.teacher) load_weights(*sources_.teacher, *trainer.models().teacher_parameters(), stream());
    });
    Trainer& trainer = *maybe_trainer;
    const bool resumed = resume_from_ != nullptr;
    begin(trainer);
    Progress at = first_;
    std::optional<MetricsFile> metrics;
    runtime_.together([&] {
      if (is_first()) metrics.emplace(folder_ / "metrics.jsonl", resumed ? at.step : -1);
    });
    MeshCheckpointWriter writer(runtime_, checkpoints_, static_cast<int>(config_.checkpoint.keep));

    const auto begin_time = std::chrono::steady_clock::now();
    if (!resumed) evaluate(trainer, metrics, at);
    ConsoleProgress console(total_tokens(config_), at.tokens);
    traffic_.emplace(*mesh_);
    TraceWindow trace(config_.trace, runtime_, *mesh_, stream(), folder_ / "trace.json");

    std::int64_t saved_step = resumed ? at.step : -1;
    const auto save = [&] {
      const auto windows = loaders_[static_cast<std::size_t>(at.stage)].windows();
      const auto slices = snapshot_slices(
          trainer.models().student_parameters(), trainer.optimizer(),
          [&](const ParameterSpec& p) { return trainer.owns(p); }, (*mesh_)[Axis::data_sequence].rank() == 0);
      TrainingState state = to_state(at, plan_, windows, trainer.optimizer().updates());
      state.model_config = write_huggingface_config(plan_.student, DType::f32);
      runtime_.set_where(fmt::format("the checkpoint of step {}", at.step));
      writer.write(state, slices, stream());
      saved_step = at.step;
    };
    try {
      for (const auto stages = static_cast<std::int64_t>(config_.stages.size()); at.stage < stages;) {
        const StageConfig& stage = config_.stages[static_cast<std::size_t>(at.stage)];
        const std::int64_t steps = stage_steps(stage);
        while (at.stage_step < steps && !asked_to_stop(writer)) {
          trace.before_step(at.step + 1);
          step(trainer, at, stage, metrics, console);
          const bool stage_ends = at.stage_step == steps;
          if (stage_ends || is_due(config_.eval.every_steps, at.step)) evaluate(trainer, metrics, at);
          if (is_due(config_.checkpoint.every_steps, at.step)) save();
        }
        if (signal_ != 0 || at.stage + 1 == stages) break;
        ++at.stage;
        at.stage_step = 0;
        trainer.begin_stage(static_cast<std::size_t>(at.stage));
      }
    } catch (...) {
      if (runtime_.failed_together()) finish_quietly(writer);
      throw;
    }
    trainer.stop();
    if (saved_step != at.step) save();
    writer.finish();
    trace.finish();
    if (signal_ != 0 && is_first()) {
      log::warn("stopped by signal {} ({}) after step {}; go on with --resume auto", signal_, strsignal(signal_),
                at.step);
    }
    RunResult result{at.step, at.tokens, at.skipped, signal_, seconds_since(begin_time), peak_rss_bytes(), 0, {}};
    result.device_bytes = memory_in_use(device_);
    result.memory = gather_memory(runtime_.world(), measured, *arenas);
    if (metrics) metrics->write_end(result);
    return result;
  }

 private:
  static bool is_due(std::int64_t every, std::int64_t step) { return every > 0 && step % every == 0; }

  bool is_first() const { return runtime_.rank() == 0; }

  /// Rank 0 chooses and checks the checkpoint, files and all; the others read what it chose.
  void open_resumed(const RunOptions& options) {
    runtime_.together([&] {
      if (!is_first()) return;
      if (fs::exists(folder_ / lock_name)) lock_folder();
      resume_from_ = open_checkpoint(options, checkpoints_);
    });
    const std::string chosen =
        broadcast_text(runtime_.world(), resume_from_ ? fs::absolute(resume_from_->folder()).string() : "");
    runtime_.together([&] {
      if (is_first() || chosen.empty()) return;
      resume_from_ = std::make_unique<CheckpointReader>(chosen, CheckpointReader::Verify::on_use);
    });
  }

  /// Two jobs in one folder would spoil each other's files. A job that was killed may take a moment to be gone.
  void lock_folder() {
    lock_.emplace(folder_ / lock_name);
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(config_.mesh.timeout_s / 2);
    for (bool told = false; !lock_->try_hold(); told = true) {
      if (!told) log::warn("{} is in use by another job; waiting for its end", folder_.string());
      if (std::chrono::steady_clock::now() > end) {
        fail<UsageError>("{} is in use by another job: end that one, or name another run.dir", folder_.string());
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
    }
  }

  void tell_memory(const ArenaSet& measured) const {
    const MeshShape& m = plan_.mesh;
    std::string layers;
    for (const LayerRange& r : plan_.partition)
      layers += fmt::format("{}{}-{}", layers.empty() ? "" : ", ", r.first, r.last - 1);
    if (m.size() > 1) {
      log::info("{} ranks: data {} x pipeline {} x sequence {} ({}); layers of the stages: {}", m.size(), m.data,
                m.pipeline, m.sequence, name_of(plan_.layout()), layers);
    }
    log::info("student {}: {:.2f} M parameters; memory{}:\n{}", plan_.student.model_type,
              static_cast<double>(count_parameters(plan_.student)) / 1e6, m.size() > 1 ? " of rank 0" : "",
              measured.table());
  }

  /// Whether any rank was signalled, the same answer on all; on the way, a checkpoint that all ranks have written is
  /// finished.
  bool asked_to_stop(MeshCheckpointWriter& writer) {
    std::array<std::int32_t, 2> own{stop_signal(), writer.is_done() ? 1 : 0};
    std::vector<std::int32_t> all(2 * static_cast<std::size_t>(runtime_.size()), 0);
    std::copy(own.begin(), own.end(), all.begin());
    if (runtime_.size() > 1) {
      runtime_.world().all_gather(Stream::cpu(), Tensor(own.data(), DType::i32, {2}),
                                  Tensor(all.data(), DType::i32, {2 * runtime_.size()}), Purpose::control);
    }
    bool all_done = true;
    for (std::size_t i = 0; i < all.size(); i += 2) {
      if (signal_ == 0) signal_ = all[i];
      all_done = all_done && all[i + 1] != 0;
    }
    if (all_done && runtime_.size() > 1) writer.finish();
    return signal_ != 0;
  }

  /// On the way out with an error of all ranks: the checkpoint under way is a good one still. Should it fail as well,
  /// it is gone, and the first error is the one to tell.
  static void finish_quietly(MeshCheckpointWriter& writer) {
    try {
      writer.finish();
    } catch (const Error&) {
    }
  }

  void check_vocabulary(const TokenDataset& data, const std::string& path) const {
    const auto vocabulary = static_cast<std::int64_t>(data.vocabulary());
    if (vocabulary > plan_.student.vocabulary) {
      fail<ConfigError>("{} has a vocabulary of {}, but the model's is {}", path, vocabulary, plan_.student.vocabulary);
    }
  }

  /// All of the run's folder, or those of later steps than the one to go on from.
  void remove_checkpoints() const {
    const auto unwanted = resume_from_ ? checkpoints_after(checkpoints_, first_.step) : std::vector{checkpoints_};
    for (const fs::path& folder : unwanted) {
      std::error_code error;
      fs::remove_all(folder, error);
      if (error) fail<IoError>("cannot remove {}: {}", folder.string(), error.message());
    }
  }

  Stream stream() const { return stream_.get(); }

  /// Weights, moments and trainable parameters of the first step.
  void begin(Trainer& trainer) {
    trainer.begin_stage(static_cast<std::size_t>(first_.stage));
    runtime_.together([&] {
      ParameterTable& parameters = trainer.models().student_parameters();
      if (resume_from_) {
        restore_snapshot(*resume_from_, parameters, trainer.optimizer(), stream());
      } else {
        init_student_weights(config_, sources_, parameters, stream());
        trainer.optimizer().capture_weights(stream());
      }
    });
    if (!resume_from_) return;
    trainer.gather_weights(true);
    log::info("resumed from {} at step {}", resume_from_->folder().string(), first_.step);
    resume_from_.reset();
  }

  void step(Trainer& trainer, Progress& at, const StageConfig& stage, std::optional<MetricsFile>& metrics,
            ConsoleProgress& console) {
    const auto begin = std::chrono::steady_clock::now();
    const auto index = static_cast<std::size_t>(at.stage);
    runtime_.set_where(fmt::format("step {}", at.step + 1));
    StepMetrics m;
    trace::Span span("step", "step");
    m.report = trainer.step(&loaders_[index], at.stage_step);
    span.end();
    const std::int64_t tokens = stage.batch_sequences * stage.sequence_length;
    ++at.step;
    ++at.stage_step;
    at.tokens += static_cast<std::uint64_t>(tokens);
    if (m.report.applied) {
      at.skipped_in_a_row = 0;
    } else {
      ++at.skipped;
      ++at.skipped_in_a_row;
    }
    m.step = at.step;
    m.stage = stage.name;
    m.stage_step = at.stage_step;
    m.tokens_seen = at.tokens;
    m.skipped = at.skipped;
    m.seconds = seconds_since(begin);
    m.tokens_per_second = static_cast<double>(tokens) / m.seconds;
    if (device_.is_cuda()) {
      m.mfu = m.tokens_per_second * plan_.flops_per_token(index) / (runtime_.size() * pipeline::h100_peak_flops);
    }
    if (runtime_.size() > 1) m.traffic = traffic_->measure();
    runtime_.together([&] {
      if (metrics) metrics->write(m);
    });
    if (is_first() && (at.step % config_.log.every_steps == 0 || !m.report.applied)) {
      log::info("{}", console.line(m, stage_steps(stage), plan_.objectives[index]));
    }
    if (at.skipped_in_a_row >= config_.optimizer.max_skipped_steps) {
      runtime_.together([&] {
        fail<NumericError>("loss or gradient was not finite in {} steps in a row, the last one step {} of stage '{}'",
                           at.skipped_in_a_row, at.stage_step, stage.name);
      });
    }
  }

  void evaluate(Trainer& trainer, std::optional<MetricsFile>& metrics, const Progress& at) {
    if (!validation_) return;
    runtime_.set_where(fmt::format("the evaluation after step {}", at.step));
    const trace::Span span("evaluation", "evaluation");
    const DivergenceResult result = trainer.evaluate(&*validation_);
    const std::string& stage = config_.stages[static_cast<std::size_t>(at.stage)].name;
    runtime_.together([&] {
      if (metrics) metrics->write_evaluation(at.step, stage, result);
    });
    log::info("held out, step {}: {}", at.step, result.line());
  }

  Config config_;
  MpiRuntime& runtime_;
  fs::path folder_, checkpoints_;
  bool restart_;
  Device device_;
  StreamOwner stream_;                             // where this rank computes
  std::optional<FileLock> lock_;                   // rank 0's
  std::unique_ptr<CheckpointReader> resume_from_;  // until its content is in memory; null: the run begins
  std::optional<TokenDataset> train_data_;
  ModelSources sources_;
  TrainingPlan plan_;
  std::optional<Mesh> mesh_;
  std::optional<TrafficMeter> traffic_;
  int signal_ = 0;  // that some rank was sent
  std::optional<TokenDataset> validation_data_;
  std::optional<WindowReader> validation_;
  std::vector<SequenceLoader> loaders_;
  Progress first_;  // where this process begins
};

}  // namespace

RunResult run_training(const Config& config, const RunOptions& options, MpiRuntime& runtime) {
  runtime.together([&] {
    check_backend(config);
    if (config.data.train.empty()) fail<ConfigError>("nothing to train on: data.train is empty");
  });
  set_num_threads(config.run.threads != 0 ? static_cast<int>(config.run.threads) : runtime.own_cores());
  kernels::settings().deterministic = config.run.deterministic;
  install_stop_signals();
  return TrainingRun(config, options, runtime).run();
}

}  // namespace deltapipe
