// Options that several subcommands share.
#pragma once

#include "core/config.h"

#include <CLI/CLI.hpp>

#include <cstdint>
#include <string>
#include <vector>

namespace deltapipe {

struct ConfigOptions {
  std::string file;
  std::vector<std::string> overrides;

  void add_to(CLI::App& command) {
    command.add_option("config", file, "configuration file (TOML)")->required()->type_name("FILE");
    add_overrides_to(command);
  }
  void add_overrides_to(CLI::App& command) {
    command.add_option("--set", overrides, "override a key: --set stage.0.learning_rate=1e-4 (repeatable)")
        ->type_name("KEY=VALUE")
        ->allow_extra_args(false);
  }
  Config load() const { return load_config(file, overrides); }
};

/// Token ids from --tokens 1,2,3 or --tokens-file FILE.
struct TokenOptions {
  std::string list, file;

  void add_to(CLI::App& command);
  bool given() const { return !list.empty() || !file.empty(); }
  /// Throws UsageError or IoError naming the first thing that is not a token id.
  std::vector<std::int64_t> read() const;
};

}  // namespace deltapipe
