#include "cli/commands.h"
#include "cli/options.h"
#include "core/error.h"
#include "core/file.h"
#include "pipeline/timeline.h"
#include "plan/plan.h"
#include "train/run.h"

#include <fmt/format.h>

#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>

namespace deltapipe {
namespace {

struct Options {
  ConfigOptions config;
  int ranks = 0, nodes = 0, gpus_per_node = 0;  // 0: not given
  double tflops = 0, terabytes = 0, link_gigabytes = 0;
  std::string timeline, json;

  int job_size() const {
    if ((nodes > 0) != (gpus_per_node > 0)) fail<UsageError>("--nodes and --gpus-per-node need each other");
    return nodes > 0 ? nodes * gpus_per_node : ranks;
  }
  DeviceSpeed speed() const {
    DeviceSpeed s;
    if (tflops > 0 || terabytes > 0 || link_gigabytes > 0) s.name = "a device of the given rates";
    if (tflops > 0) s.compute.flops = tflops * 1e12;
    if (terabytes > 0) s.compute.bandwidth = terabytes * 1e12;
    if (link_gigabytes > 0) s.link_bytes_s = link_gigabytes * 1e9;
    return s;
  }
};

/// FILE.svg, or FILE-STAGE.svg where the recipe has several stages.
std::filesystem::path drawing_of(const RunPlan& plan, const StageTime& stage, const std::filesystem::path& file) {
  if (plan.times.size() == 1) return file;
  std::filesystem::path own = file;
  return own.replace_filename(fmt::format("{}-{}{}", file.stem().string(), stage.name, file.extension().string()));
}

void plan_run(const Options& o) {
  const int ranks = o.job_size();
  const Config config = o.config.load();
  log::configure(config.run.log_level, 0, 1);
  check_backend(config);
  const MeshShape mesh = plan_mesh(config, ranks);
  const PlannedModels models = read_planned_models(config);
  const TrainingPlan training =
      make_training_plan(config, models.student, models.teacher ? &*models.teacher : nullptr, mesh);
  const RunPlan plan = make_run_plan(training, o.speed());
  std::fputs(describe(plan).c_str(), stdout);
  if (!o.timeline.empty()) {
    for (const StageTime& stage : plan.times) {
      const std::string title = fmt::format("{}, {}", stage.name, stage.schedule);
      std::fputs(("\n" + pipeline::draw_text(stage.simulation, title, 110)).c_str(), stdout);
      const std::filesystem::path file = drawing_of(plan, stage, o.timeline);
      write_file_atomically(file, pipeline::draw_svg(stage.simulation, title));
      std::printf("drawn in %s\n", file.c_str());
    }
  }
  if (!o.json.empty()) write_file_atomically(o.json, to_json(plan));
}

}  // namespace

void add_plan_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "plan", "print what a run would take, without running it: mesh, layers, memory of every rank, time of a step");
  auto options = std::make_shared<Options>();
  options->config.add_to(*command);
  const CLI::Range any_ranks(1, 1 << 20);
  auto* ranks = command->add_option("--ranks", options->ranks, "ranks of the job (default: what the mesh asks for)")
                    ->check(any_ranks)
                    ->type_name("N");
  auto* nodes = command->add_option("--nodes", options->nodes, "hosts of the job, with --gpus-per-node")
                    ->check(any_ranks)
                    ->type_name("N");
  command->add_option("--gpus-per-node", options->gpus_per_node, "ranks on a host")
      ->check(CLI::Range(1, 1024))
      ->type_name("N");
  ranks->excludes(nodes);
  command
      ->add_option("--timeline", options->timeline,
                   "draw a step of every stage, as text and in FILE.svg (several stages: FILE-STAGE.svg)")
      ->type_name("FILE.svg");
  command->add_option("--json", options->json, "also write everything to this file")->type_name("FILE");
  const CLI::Range rate(1e-6, 1e9);
  command->add_option("--tflops", options->tflops, "time model: TFLOP/s that a device sustains (default: 500)")
      ->check(rate)
      ->type_name("X");
  command->add_option("--terabytes", options->terabytes, "time model: TB/s of its memory (default: 3)")
      ->check(rate)
      ->type_name("X");
  command->add_option("--link-gigabytes", options->link_gigabytes, "time model: GB/s to other ranks (default: 40)")
      ->check(rate)
      ->type_name("X");
  command->callback([options] { plan_run(*options); });
}

}  // namespace deltapipe
