#include "cli/commands.h"
#include "cli/options.h"
#include "comm/mpi_runtime.h"
#include "core/error.h"
#include "core/log.h"
#include "train/run.h"

#include <algorithm>
#include <exception>
#include <memory>
#include <string>

#include <xxhash.h>

namespace deltapipe {
namespace {

/// Before anything else: a mesh that needs a launcher says so.
void check_world(const Config& config, int ranks) {
  const MeshConfig& m = config.mesh;
  const std::int64_t wanted =
      std::max<std::int64_t>(m.data, 1) * std::max<std::int64_t>(m.pipeline, 1) * std::max<std::int64_t>(m.sequence, 1);
  if (ranks == 1 && wanted > 1) {
    fail<ConfigError>(
        "mesh.data = {} x mesh.pipeline = {} x mesh.sequence = {} needs {} ranks, but this is one process: "
        "start it with mpirun -n {} (see launch/)",
        m.data, m.pipeline, m.sequence, wanted, wanted);
  }
}

}  // namespace

void add_train_command(CLI::App& app, std::unique_ptr<MpiRuntime>& started) {
  CLI::App* command = app.add_subcommand("train", "run all stages of a configuration");
  auto options = std::make_shared<ConfigOptions>();
  auto run = std::make_shared<RunOptions>();
  options->add_to(*command);
  command
      ->add_option("--resume", run->resume,
                   "go on: auto (from the newest whole checkpoint, if any) or a checkpoint's folder")
      ->type_name("auto|none|FOLDER");
  command->add_flag("--restart", run->restart,
                    "begin anew, and remove the checkpoints in the run's folder; with --resume FOLDER those of later "
                    "steps");
  command->callback([options, run, &started] {
    Config config;
    std::exception_ptr error;  // told when there are ranks to tell
    try {
      config = options->load();
    } catch (const Error&) {
      error = std::current_exception();
    }
    CommunicationSettings settings;
    settings.timeout_s = config.mesh.timeout_s;
    started = std::make_unique<MpiRuntime>(settings);
    MpiRuntime& runtime = *started;
    runtime.together([&] {
      if (error) std::rethrow_exception(error);
    });
    log::configure(config.run.log_level, runtime.rank(), runtime.size());
    runtime.together([&] { check_world(config, runtime.size()); });
    const std::string text = to_toml(config);
    runtime.agree(DELTAPIPE_VERSION, XXH3_64bits(text.data(), text.size()));
    const RunResult result = run_training(config, *run, runtime);
    if (runtime.rank() != 0) return;
    log::info("{} after {} steps, {} tokens, {} skipped steps; checkpoints in {}",
              result.stopped_by_signal == 0 ? "finished" : "stopped", result.steps, result.tokens, result.skipped,
              (run_dir(config.run) / "checkpoints").string());
  });
}

}  // namespace deltapipe
