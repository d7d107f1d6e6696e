#include "checkpoints/training_checkpoint.h"
#include "cli/commands.h"
#include "cli/options.h"

#include <cstdint>
#include <cstdio>
#include <memory>

namespace deltapipe {
namespace {

/// One line, for people and for the scripts that decide whether to start a job again:
///   finished|unfinished STEPS_DONE/STEPS_OF_ALL_STAGES CHECKPOINT      the checkpoint is "-" when there is none
void print_status(const Config& config) {
  std::int64_t total = 0;
  for (const StageConfig& s : config.stages) total += stage_steps(s);
  std::int64_t done = 0;
  bool finished = false;
  const auto checkpoint = newest_checkpoint(run_dir(config.run) / "checkpoints");
  if (checkpoint) {
    const TrainingState state = read_state(*checkpoint);
    done = state.step;
    const auto last = static_cast<std::int64_t>(config.stages.size()) - 1;
    finished = last >= 0 && state.stage == last && state.stage_step >= stage_steps(config.stages.back());
  }
  std::printf("%s %lld/%lld %s\n", finished ? "finished" : "unfinished", static_cast<long long>(done),
              static_cast<long long>(total), checkpoint ? checkpoint->c_str() : "-");
}

}  // namespace

void add_status_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("status", "how far the run of a configuration is, by its newest checkpoint");
  auto options = std::make_shared<ConfigOptions>();
  options->add_to(*command);
  command->callback([options] { print_status(options->load()); });
}

}  // namespace deltapipe
