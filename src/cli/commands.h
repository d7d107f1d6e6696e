// One function a subcommand: it adds the subcommand to the program and runs it from its callback. Callbacks throw the
// typed errors of core/error.h; main turns them into one line and an exit status.
#pragma once

#include <memory>

namespace CLI {
class App;
}

namespace deltapipe {

class MpiRuntime;

void add_config_command(CLI::App& app);
void add_data_command(CLI::App& app);
void add_init_command(CLI::App& app);
void add_status_command(CLI::App& app);
void add_plan_command(CLI::App& app);
/// The callback makes `runtime`, which outlives it: what the command throws is told while the other ranks wait.
void add_train_command(CLI::App& app, std::unique_ptr<MpiRuntime>& runtime);
void add_eval_command(CLI::App& app);
void add_export_command(CLI::App& app);
void add_inspect_command(CLI::App& app);
void add_logits_command(CLI::App& app);
void add_generate_command(CLI::App& app);

}  // namespace deltapipe
