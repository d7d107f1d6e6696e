// Times whole training steps of a configuration on random weights: tokens a second, MFU, memory against the plan, and
// where the time goes. A table, and JSON with --out. Runs under mpirun, too: a rank a GPU, or on CPU ranks.
#include "core/device_memory.h"
#include "core/log.h"
#include "core/parallel.h"
#include "core/trace.h"
#include "data/token_dataset.h"
#include "kernels/settings.h"
#include "plan/plan.h"
#include "tools/bench/report.h"
#include "tools/bench/step/activity_report.h"
#include "tools/bench/step/profile.h"
#include "tools/bench/step/random_weights.h"
#include "train/run.h"
#include "train/trace_window.h"

#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <numeric>

namespace deltapipe::bench {
namespace {

struct Options {
  std::string config, out, name, trace, commit = DELTAPIPE_COMMIT;
  std::vector<std::string> overrides;
  int steps = 20, warm_up = 3, profiled = 1, traced = 0;
};

struct Measured {
  std::vector<double> seconds, losses, gradient_norms;
  RankMemoryUse memory;
  std::vector<Activity> activities;  // of traced steps
  double start_seconds = 0;          // until the first step
  std::map<std::string, Share> operations, tasks;
  double update_seconds = 0;  // of a profiled step
};

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + std::ssize(values) / 2, values.end());
  return values[values.size() / 2];
}

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

Measured measure(const TrainingPlan& plan, MpiRuntime& runtime, Mesh& mesh, const StreamOwner& owner, Device device,
                 const Options& o, std::chrono::steady_clock::time_point start) {
  const Stream stream = owner.get();
  Measured m;
  m.memory.before = memory_in_use(device);
  const ArenaSet sizes = Trainer::measure(plan, mesh, device);
  m.memory.planned = sizes.peak_bytes();
  m.memory.planned_host = sizes.host.peak();
  const bool tells = mesh.rank() == 0;
  if (tells) std::printf("%s", sizes.table().c_str());
  std::fflush(stdout);
  ArenaSet arenas = sizes.reserve();
  Trainer trainer(plan, mesh, arenas, stream);
  if (ParameterTable* teacher = trainer.models().teacher_parameters()) fill_randomly(*teacher, stream);
  fill_randomly(trainer.models().student_parameters(), stream);
  trainer.begin_stage(0);
  trainer.optimizer().capture_weights(stream);
  const StageConfig& stage = plan.config.stages.front();
  const TokenDataset data(plan.config.data.train);
  const SequenceLoader loader(data, stage.sequence_length, 1, plan.config.data.isolate_documents);
  const auto tokens = static_cast<double>(stage.batch_sequences * stage.sequence_length);

  TraceConfig window;
  if (o.traced > 0) window.steps = {o.warm_up + o.steps - o.traced + 1, o.warm_up + o.steps};
  TraceWindow trace(window, runtime, mesh, stream, o.trace);
  m.start_seconds = seconds_since(start);
  for (int i = 0; i < o.warm_up + o.steps; ++i) {
    trace.before_step(i + 1);
    runtime.world().barrier(Stream::cpu());  // what it takes to begin a trace is no part of the first traced step
    const auto begin = std::chrono::steady_clock::now();
    trace::Span span("step", "step");
    const StepReport report = trainer.step(&loader, i);
    synchronize(stream);
    span.end();
    const double seconds = seconds_since(begin);
    if (trace::is_on()) {
      trace::settle(stream);
      m.activities.push_back(measure_activity(trace::events(), i + 1));
    }
    m.losses.push_back(report.losses.total);
    m.gradient_norms.push_back(report.gradient_norm);
    if (i >= o.warm_up) m.seconds.push_back(seconds);
    m.memory.in_use = std::max(m.memory.in_use, memory_in_use(device));
    if (!tells) continue;
    std::printf("step %2d%s  %.4f s  %6.0f tokens/s  loss %.5f  ce %.4f  kl %.4f  cosine %.4f  gradient %.4g%s\n",
                i + 1, i < o.warm_up ? " (warm-up)" : "", seconds, tokens / seconds, report.losses.total,
                report.losses.ce, report.losses.kl, report.losses.hidden_cosine, report.gradient_norm,
                report.applied ? "" : "  SKIPPED");
    std::fflush(stdout);
  }
  trace.finish();
  if (o.profiled > 0) {
    Profile profile(trainer.executor(), stream);
    for (int i = 0; i < o.profiled; ++i) {
      StepReport report = trainer.accumulate(&loader, o.warm_up + o.steps + i);
      synchronize(stream);
      const auto begin = std::chrono::steady_clock::now();
      trainer.update(report);
      synchronize(stream);
      m.update_seconds += seconds_since(begin);
    }
    m.operations = profile.operations();
    m.tasks = profile.tasks();
  }
  trainer.stop();
  return m;
}

void print_shares(const char* title, const std::map<std::string, Share>& shares, int steps) {
  std::vector<std::pair<std::string, Share>> list(shares.begin(), shares.end());
  std::sort(list.begin(), list.end(), [](const auto& a, const auto& b) { return a.second.seconds > b.second.seconds; });
  const double sum =
      std::accumulate(list.begin(), list.end(), 0.0, [](double s, const auto& x) { return s + x.second.seconds; });
  std::printf("%s, ms a step (a step with waits around each: %.1f)\n", title, 1e3 * sum / steps);
  for (const auto& [name, share] : list) {
    std::printf("  %-26s %9.2f  %5.1f %%  %6ld calls\n", name.c_str(), 1e3 * share.seconds / steps,
                100 * share.seconds / sum, share.calls / steps);
  }
}

nlohmann::ordered_json in_milliseconds(const std::map<std::string, Share>& shares, int steps) {
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  for (const auto& [name, share] : shares) json[name] = 1e3 * share.seconds / steps;
  return json;
}

void run(const Options& o, int argc, char** argv) {
  const auto start = std::chrono::steady_clock::now();
  const Config config = load_config(o.config, o.overrides);
  log::configure(log::Level::warn, 0, 1);
  CommunicationSettings settings;
  settings.timeout_s = config.mesh.timeout_s;
  MpiRuntime runtime(settings);
  check_backend(config);
  kernels::settings().deterministic = config.run.deterministic;
  set_num_threads(runtime.own_cores());
  const MeshShape shape = MeshShape{static_cast<int>(config.mesh.data), static_cast<int>(config.mesh.pipeline),
                                    static_cast<int>(config.mesh.sequence)}
                              .resolve(runtime.size());
  const PlannedModels models = read_planned_models(config);
  const TrainingPlan plan =
      make_training_plan(config, models.student, models.teacher ? &*models.teacher : nullptr, shape);
  const Device device = choose_device(config, runtime);
  const StreamOwner stream(device);
  Mesh mesh(runtime, shape, device);
  const Measured m = measure(plan, runtime, mesh, stream, device, o, start);
  const auto ranks = gather_ranks(runtime, describe_rank(mesh, m.memory, m.activities));
  if (runtime.rank() != 0) return;

  const StageConfig& stage = config.stages.front();
  const auto tokens = static_cast<double>(stage.batch_sequences * stage.sequence_length);
  const double step_s = median(m.seconds), rate = tokens / step_s;
  const double flops = plan.flops_per_token(0);
  const double mfu = device.is_cuda() ? rate * flops / (runtime.size() * pipeline::h100_peak_flops) : 0;
  if (o.profiled > 0) {
    print_shares("operations", m.operations, o.profiled);
    print_shares("tasks", m.tasks, o.profiled);
    std::printf("update %.2f ms\n", 1e3 * m.update_seconds / o.profiled);
  }
  const double gib = 1 << 30;
  const auto in_gib = [&](std::size_t bytes) { return static_cast<double>(bytes) / gib; };
  const double peak = in_gib(m.memory.in_use), planned = in_gib(m.memory.planned);
  std::printf("started in %.1f s\n", m.start_seconds);
  const nlohmann::ordered_json summary = o.traced > 0 ? summarize(plan, ranks) : nlohmann::ordered_json::object();
  if (o.traced > 0) std::printf("%s", to_table(summary, ranks).c_str());
  std::printf("%s: %s, %d rank(s): median of %zu steps %.4f s, %.0f tokens/s, MFU %.1f %% (%.2f GFLOP a token)\n",
              o.name.c_str(), describe_device(device).c_str(), runtime.size(), m.seconds.size(), step_s, rate,
              100 * mfu, flops * 1e-9);
  if (device.is_cuda()) {
    std::printf("memory: %.2f GiB in use at most (%.2f before), %.2f planned, %+.1f %%; host %.2f GiB\n", peak,
                in_gib(m.memory.before), planned, 100 * (peak / planned - 1), in_gib(m.memory.planned_host));
  }
  std::printf("loss %.5f -> %.5f\n", m.losses.front(), m.losses.back());
  if (o.out.empty()) return;
  nlohmann::ordered_json json = begin_report("step", describe_device(device), o.commit, argc, argv);
  nlohmann::ordered_json row{
      {"config", o.name},
      {"ranks", runtime.size()},
      {"mesh", {{"data", shape.data}, {"pipeline", shape.pipeline}, {"sequence", shape.sequence}}},
      {"schedule", plan.schedules.front().name},
      {"microbatches", plan.microbatches(0)},
      {"tokens_per_second", rate},
      {"step_seconds", step_s},
      {"mfu", mfu},
      {"model_flops_per_token", flops},
      {"peak_bytes", m.memory.in_use},
      {"planned_bytes", m.memory.planned},
      {"bytes_before", m.memory.before},
      {"start_seconds", m.start_seconds},
      {"all_step_seconds", m.seconds},
      {"losses", m.losses},
      {"gradient_norms", m.gradient_norms},
      {"profiled_operations_ms", in_milliseconds(m.operations, o.profiled)},
      {"profiled_tasks_ms", in_milliseconds(m.tasks, o.profiled)},
      {"traced_steps", o.traced}};
  row.update(summary);
  row["each_rank"] = ranks;
  json["rows"] = nlohmann::ordered_json::array({row});
  write_report(o.out, json);
}

}  // namespace
}  // namespace deltapipe::bench

int main(int argc, char** argv) {
  using namespace deltapipe;
  bench::Options o;
  CLI::App app("Times whole training steps of a configuration, on random weights.");
  app.add_option("config", o.config, "configuration (TOML); of its stages the first")->required();
  app.add_option("--set", o.overrides, "override a key")->allow_extra_args(false);
  app.add_option("--steps", o.steps, "steps timed, of which the median counts")->check(CLI::PositiveNumber);
  app.add_option("--warm-up", o.warm_up, "steps before them")->check(CLI::NonNegativeNumber);
  app.add_option("--profiled", o.profiled, "steps after them with a wait around every operation")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--traced", o.traced, "of the steps timed, the last ones that are traced: bubble, communication")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--trace", o.trace, "file for their trace (default: trace.json)");
  app.add_option("--name", o.name, "what to call the row (default: the configuration's run.name)");
  app.add_option("--out", o.out, "JSON file to write");
  app.add_option("--commit", o.commit, "commit to name in the JSON file");
  CLI11_PARSE(app, argc, argv);
  if (o.name.empty()) o.name = o.config;
  if (o.trace.empty()) o.trace = "trace.json";
  o.traced = std::min(o.traced, o.steps);
  try {
    bench::run(o, argc, argv);
    return 0;
  } catch (const Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    MpiRuntime::abort_all(error.exit_code());
  }
}
