// deltapipe: distill a full-attention teacher into a KDA / NoPE hybrid student.

#include "cli/commands.h"
#include "comm/mpi_communicator.h"
#include "comm/mpi_runtime.h"
#include "core/error.h"

#include <CLI/CLI.hpp>

#include <cstdio>
#include <exception>
#include <filesystem>
#include <new>
#include <string>

namespace {

/// Where other ranks would wait for this one they are ended, with the same code.
int end(int code) {
  if (deltapipe::mpi_is_up()) deltapipe::MpiRuntime::abort_all(code);
  return code;
}

int report(const std::string& message, int code) {
  std::fprintf(stderr, "error: %s\n", message.c_str());
  return end(code);
}

int report_bug(const char* what) {
  return report(std::string(what) + " (a mistake inside deltapipe, not in its input)",
                deltapipe::InternalError("").exit_code());
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("deltapipe: distill a full-attention teacher into a KDA / NoPE hybrid student");
  app.require_subcommand(1);
  app.set_version_flag("--version", DELTAPIPE_VERSION);
  app.footer("deltapipe SUBCOMMAND --help lists the options of one.");
  deltapipe::add_config_command(app);
  deltapipe::add_data_command(app);
  deltapipe::add_init_command(app);
  deltapipe::add_plan_command(app);
  deltapipe::add_status_command(app);
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
    const auto unused = app.remaining();  // a wrong first word is no subcommand, and would go unnamed
    const bool unknown = app.get_subcommands().empty() && !unused.empty();
    return report((unknown ? "there is no subcommand '" + unused[0] + "'" : std::string(e.what())) +
                      "; --help lists what is accepted",
                  deltapipe::UsageError("").exit_code());
  } catch (const deltapipe::PeerError& e) {
    return end(e.exit_code());  // that rank has told
  } catch (const deltapipe::InternalError& e) {
    return report_bug(e.what());
  } catch (const deltapipe::Error& e) {
    return report(e.what(), e.exit_code());
  } catch (const std::bad_alloc&) {
    return report("out of memory", deltapipe::MemoryError("").exit_code());
  } catch (const std::filesystem::filesystem_error& e) {
    return report(e.path1().string() + ": " + e.code().message(), deltapipe::IoError("").exit_code());
  } catch (const std::exception& e) {
    return report_bug(e.what());
  }
}
