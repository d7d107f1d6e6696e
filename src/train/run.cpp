#include "train/run.h"

#include "checkpoints/hf_config.h"
#include "checkpoints/training_checkpoint.h"
#include "core/error.h"
#include "core/file.h"
#include "core/log.h"
#include "core/parallel.h"
#include "core/random.h"
#include "data/token_dataset.h"
#include "distill/student_init.h"
#include "train/metrics.h"
#include "train/signals.h"
#include "train/snapshot.h"

#include <fmt/format.h>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstring>

namespace deltapipe {
namespace fs = std::filesystem;
namespace {

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

/// Checkpoints in the folder, whole or damaged, newest first.
std::vector<fs::path> checkpoints_in(const fs::path& folder) {
  std::vector<fs::path> found;
  std::error_code error;  // a folder that is not there holds none; one that cannot be read is told of when it is made
  fs::directory_iterator it(folder, error);
  for (; !error && it != fs::directory_iterator(); it.increment(error)) {
    if (it->path().filename().string().starts_with("step-")) found.push_back(it->path());
  }
  std::sort(found.begin(), found.end(), [](const fs::path& a, const fs::path& b) {
    const std::string x = a.filename().string(), y = b.filename().string();
    return x.size() != y.size() ? x.size() > y.size() : x > y;  // steps of nine digits follow those of eight
  });
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
  if (options.restart) fail<UsageError>("--restart begins anew, --resume goes on: give one of them");
  if (options.resume != "auto") return std::make_unique<CheckpointReader>(find_checkpoint(options.resume));
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
  then.checkpoint = now.checkpoint;
  then.eval = now.eval;
  then.log = now.log;
  if (!(then == now)) {
    log::warn("the configuration is not the one that {} was written with; the run goes on with the new one", where);
  }
}

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

std::uint64_t peak_rss_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<std::uint64_t>(usage.ru_maxrss) * 1024;  // Linux counts in KiB
}

class TrainingRun {
 public:
  TrainingRun(const Config& config, const RunOptions& options)
      : config_(config),
        folder_(run_dir(config.run)),
        checkpoints_(folder_ / "checkpoints"),
        restart_(options.restart),
        resume_from_(open_checkpoint(options, checkpoints_)),
        train_data_(config.data.train),
        sources_(open_models(config, static_cast<std::int64_t>(train_data_.vocabulary()))),
        plan_(make_training_plan(config, sources_.student, sources_.teacher ? &sources_.teacher->spec() : nullptr)) {
    check_vocabulary(train_data_, config.data.train);
    if (!config.data.validation.empty()) {
      validation_data_.emplace(config.data.validation);
      check_vocabulary(*validation_data_, config.data.validation);
      validation_.emplace(*validation_data_, plan_.evaluation_length(), config.data.isolate_documents);
    }
    for (const StageConfig& s : config.stages) {
      loaders_.emplace_back(train_data_, s.sequence_length, order_seed(config, s), config.data.isolate_documents);
    }
    if (resume_from_) {
      const std::string where = resume_from_->folder().string();
      first_ = to_progress(resume_from_->state(), plan_, where);
      compare_configs(config_, resume_from_->state(), where);
    }
  }

  RunResult run() {
    const ArenaSet measured = Trainer::measure(plan_, Device());
    log::info("student {}: {:.2f} M parameters; memory:\n{}", plan_.student.model_type,
              static_cast<double>(count_parameters(plan_.student)) / 1e6, measured.table());
    make_writable_folder(folder_);
    if (restart_) remove_checkpoints();
    write_file_atomically(folder_ / "config.toml", to_toml(config_));
    ArenaSet arenas = measured.reserve();
    Trainer trainer(plan_, arenas, Stream::cpu());
    if (sources_.teacher) {
      for (Parameter& p : trainer.models().teacher_parameters()->all()) sources_.teacher->load(p.spec, p.value);
    }
    const bool resumed = resume_from_ != nullptr;
    begin(trainer);
    Progress at = first_;
    MetricsFile metrics(folder_ / "metrics.jsonl", resumed ? at.step : -1);
    CheckpointWriter writer(checkpoints_, static_cast<int>(config_.checkpoint.keep));

    const auto begin_time = std::chrono::steady_clock::now();
    if (!resumed) evaluate(trainer, metrics, at);
    ConsoleProgress console(total_tokens(config_), at.tokens);

    std::int64_t saved_step = resumed ? at.step : -1;
    const auto save = [&] {
      const auto windows = loaders_[static_cast<std::size_t>(at.stage)].windows();
      const auto slices = snapshot_slices(trainer.models().student_parameters(), trainer.optimizer());
      TrainingState state = to_state(at, plan_, windows, trainer.optimizer().updates());
      state.model_config = write_huggingface_config(plan_.student, DType::f32);
      writer.write(state, slices);
      saved_step = at.step;
    };
    for (const auto stages = static_cast<std::int64_t>(config_.stages.size()); at.stage < stages;) {
      const StageConfig& stage = config_.stages[static_cast<std::size_t>(at.stage)];
      const std::int64_t steps = stage_steps(stage);
      while (at.stage_step < steps && stop_signal() == 0) {
        step(trainer, at, stage, metrics, console);
        const bool stage_ends = at.stage_step == steps;
        if (stage_ends || is_due(config_.eval.every_steps, at.step)) evaluate(trainer, metrics, at);
        if (is_due(config_.checkpoint.every_steps, at.step)) save();
      }
      if (stop_signal() != 0 || at.stage + 1 == stages) break;
      ++at.stage;
      at.stage_step = 0;
      trainer.begin_stage(static_cast<std::size_t>(at.stage));
    }
    if (saved_step != at.step) save();
    writer.wait();
    if (stop_signal() != 0) {
      log::warn("stopped by signal {} ({}) after step {}; go on with --resume auto", stop_signal(),
                strsignal(stop_signal()), at.step);
    }
    const RunResult result{at.step, at.tokens, at.skipped, stop_signal(), seconds_since(begin_time), peak_rss_bytes()};
    metrics.write_end(result);
    return result;
  }

 private:
  static bool is_due(std::int64_t every, std::int64_t step) { return every > 0 && step % every == 0; }

  void check_vocabulary(const TokenDataset& data, const std::string& path) const {
    const auto vocabulary = static_cast<std::int64_t>(data.vocabulary());
    if (vocabulary > plan_.student.vocabulary) {
      fail<ConfigError>("{} has a vocabulary of {}, but the model's is {}", path, vocabulary, plan_.student.vocabulary);
    }
  }

  void remove_checkpoints() const {
    std::error_code error;
    fs::remove_all(checkpoints_, error);
    if (error) fail<IoError>("cannot remove {}: {}", checkpoints_.string(), error.message());
  }

  /// Weights, moments and trainable parameters of the first step.
  void begin(Trainer& trainer) {
    trainer.begin_stage(static_cast<std::size_t>(first_.stage));
    if (!resume_from_) {
      init_student_weights(config_, sources_, trainer.models().student_parameters());
      trainer.optimizer().capture_weights(Stream::cpu());
      return;
    }
    restore_snapshot(*resume_from_, trainer.models().student_parameters(), trainer.optimizer());
    log::info("resumed from {} at step {}", resume_from_->folder().string(), first_.step);
    resume_from_.reset();
  }

  void step(Trainer& trainer, Progress& at, const StageConfig& stage, MetricsFile& metrics, ConsoleProgress& console) {
    const auto begin = std::chrono::steady_clock::now();
    const auto index = static_cast<std::size_t>(at.stage);
    StepMetrics m;
    m.report = trainer.step(&loaders_[index], at.stage_step);
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
    metrics.write(m);
    if (at.step % config_.log.every_steps == 0 || !m.report.applied) {
      log::info("{}", console.line(m, stage_steps(stage), plan_.objectives[index]));
    }
    if (at.skipped_in_a_row >= config_.optimizer.max_skipped_steps) {
      fail<NumericError>("loss or gradient was not finite in {} steps in a row, the last one step {} of stage '{}'",
                         at.skipped_in_a_row, at.stage_step, stage.name);
    }
  }

  void evaluate(Trainer& trainer, MetricsFile& metrics, const Progress& at) {
    if (!validation_) return;
    const DivergenceResult result = trainer.evaluate(&*validation_);
    const std::string& stage = config_.stages[static_cast<std::size_t>(at.stage)].name;
    metrics.write_evaluation(at.step, stage, result);
    log::info("held out, step {}: {}", at.step, result.line());
  }

  Config config_;
  fs::path folder_, checkpoints_;
  bool restart_;
  std::unique_ptr<CheckpointReader> resume_from_;  // until its content is in memory; null: the run begins
  TokenDataset train_data_;
  ModelSources sources_;
  TrainingPlan plan_;
  std::optional<TokenDataset> validation_data_;
  std::optional<WindowReader> validation_;
  std::vector<SequenceLoader> loaders_;
  Progress first_;  // where this process begins
};

}  // namespace

ModelSources open_models(const Config& config, std::int64_t data_vocabulary) {
  ModelSources s;
  if (!config.teacher.path.empty()) {
    s.teacher = std::make_unique<HuggingFaceFolder>(config.teacher.path);
    s.teacher->verify();
  }
  if (config.student.init == StudentInit::folder) {
    s.student_folder = std::make_unique<HuggingFaceFolder>(config.student.path);
    s.student_folder->verify();
    s.student = s.student_folder->spec();
  } else {
    s.student = make_student_spec(config.student, s.teacher ? &s.teacher->spec() : nullptr, data_vocabulary);
  }
  return s;
}

void init_student_weights(const Config& config, const ModelSources& sources, ParameterTable& parameters) {
  const auto seed = static_cast<std::uint64_t>(config.run.seed);
  switch (config.student.init) {
    case StudentInit::folder:
      for (Parameter& p : parameters.all()) sources.student_folder->load(p.spec, p.value);
      return;
    case StudentInit::random: init_student_randomly(config.student, seed, parameters); return;
    case StudentInit::teacher:
      init_student_from_teacher(
          config.student, seed, sources.teacher->spec(),
          [&](const ParameterSpec& p, const Tensor& out) { sources.teacher->load(p, out); }, sources.student,
          parameters);
      return;
  }
}

RunResult run_training(const Config& config, const RunOptions& options) {
  if (config.run.device != DeviceChoice::cpu) fail<ConfigError>("run.device is \"cuda\", but this binary is CPU-only");
  if (compute_dtype(config.run) == DType::bf16) fail<ConfigError>("run.dtype \"bfloat16\" needs run.device = \"cuda\"");
  if (config.optimizer.state != StateDType::float32) {
    fail<ConfigError>("optimizer.state \"bfloat16\" needs run.device = \"cuda\"");
  }
  if (config.memory.optimizer != OptimizerPlace::device) {
    fail<ConfigError>("memory.optimizer \"host\" needs run.device = \"cuda\": on the CPU everything is in host memory");
  }
  if (config.data.train.empty()) fail<ConfigError>("nothing to train on: data.train is empty");
  set_num_threads(static_cast<int>(config.run.threads));
  install_stop_signals();
  return TrainingRun(config, options).run();
}

}  // namespace deltapipe
