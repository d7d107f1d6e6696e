#include "cli/commands.h"
#include "cli/options.h"

#include <cstdio>
#include <memory>

namespace deltapipe {

void add_config_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("config", "print the whole configuration with every default, as TOML");
  auto options = std::make_shared<ConfigOptions>();
  options->add_to(*command);
  command->callback([options] { std::fputs(to_toml(options->load()).c_str(), stdout); });
}

}  // namespace deltapipe
