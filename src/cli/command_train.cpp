#include "cli/commands.h"
#include "cli/options.h"
#include "core/log.h"
#include "train/run.h"

#include <memory>

namespace deltapipe {

void add_train_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("train", "run all stages of a configuration");
  auto options = std::make_shared<ConfigOptions>();
  auto run = std::make_shared<RunOptions>();
  options->add_to(*command);
  command
      ->add_option("--resume", run->resume,
                   "go on: auto (from the newest whole checkpoint, if any) or a checkpoint's folder")
      ->type_name("auto|none|FOLDER");
  command->add_flag("--restart", run->restart, "begin anew, and remove the checkpoints in the run's folder");
  command->callback([options, run] {
    const Config config = options->load();
    log::configure(config.run.log_level, 0, 1);
    const RunResult result = run_training(config, *run);
    log::info("{} after {} steps, {} tokens, {} skipped steps; checkpoints in {}",
              result.stopped_by_signal == 0 ? "finished" : "stopped", result.steps, result.tokens, result.skipped,
              (run_dir(config.run) / "checkpoints").string());
  });
}

}  // namespace deltapipe
