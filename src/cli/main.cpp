// deltapipe: distill a full-attention teacher into a KDA / NoPE hybrid student.

#include "cli/commands.h"
#include "core/error.h"

#include <CLI/CLI.hpp>

#include <cstdio>
#include <exception>
#include <new>

namespace {

int report(const char* message, int code) {
  std::fprintf(stderr, "error: %s\n", message);
  return code;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("deltapipe: distill a full-attention teacher into a KDA / NoPE hybrid student");
  app.require_subcommand(1);
  app.set_version_flag("--version", DELTAPIPE_VERSION);
  deltapipe::add_config_command(app);
  deltapipe::add_data_command(app);
  deltapipe::add_init_command(app);
  deltapipe::add_train_command(app);
  deltapipe::add_eval_command(app);
  deltapipe::add_export_command(app);
  deltapipe::add_inspect_command(app);
  deltapipe::add_logits_command(app);
  deltapipe::add_generate_command(app);
  try {
    app.parse(argc, argv);
    return 0;
  } catch (const CLI::Success& e) {
    return app.exit(e);  // --help, --version
  } catch (const CLI::ParseError& e) {
    return report(e.what(), deltapipe::UsageError("").exit_code());
  } catch (const deltapipe::Error& e) {
    return report(e.what(), e.exit_code());
  } catch (const std::bad_alloc&) {
    return report("out of memory", deltapipe::MemoryError("").exit_code());
  } catch (const std::exception& e) {
    return report(e.what(), deltapipe::InternalError("").exit_code());
  }
}
