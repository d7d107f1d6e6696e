// `deltapipe data`: text to a token dataset, one token a byte.
#pragma once

namespace CLI {
class App;
}

namespace deltapipe {

/// Adds the subcommand. Its callback does the work, prints the counts and throws our errors.
void add_data_command(CLI::App& app);

}  // namespace deltapipe
