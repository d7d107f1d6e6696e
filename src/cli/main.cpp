// deltapipe: distill a full-attention teacher into a KDA / NoPE hybrid student.

#include "cli/commands.h"
#include "comm/mpi_communicator.h"
#include "comm/mpi_runtime.h"
#include "core/error.h"

#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <memory>
#include <new>
#include <string>
#include <string_view>

namespace {

using Runtime = std::unique_ptr<deltapipe::MpiRuntime>;

/// Ranks that know of the error end MPI together, with the rank that has told of it; others would wait for this one:
/// they are ended, with the same code.
int end(Runtime& runtime, int code) {
  const bool together = runtime && runtime->failed_together();
  if (deltapipe::mpi_is_up() && !together) deltapipe::MpiRuntime::abort_all(code);
  runtime.reset();
  return code;
}

int report(Runtime& runtime, const std::string& message, int code) {
  std::fprintf(stderr, "error: %s\n", message.c_str());
  return end(runtime, code);
}

int report_bug(Runtime& runtime, const char* what) {
  return report(runtime, std::string(what) + " (a mistake inside deltapipe, not in its input)",
                deltapipe::InternalError("").exit_code());
}

/// All ranks have the same command line: one of them tells.
[[noreturn]] void fail_together(const std::string& message, const deltapipe::Launch& launch, Runtime& runtime) {
  if (launch.mpi) {
    runtime = std::make_unique<deltapipe::MpiRuntime>();
    runtime->together([&] { deltapipe::fail<deltapipe::UsageError>("{}", message); });
  }
  deltapipe::fail<deltapipe::UsageError>("{}", message);
}

[[noreturn]] void fail_usage(const CLI::App& app, const CLI::ParseError& e, const deltapipe::Launch& launch,
                             Runtime& runtime) {
  const auto unused = app.remaining();  // a wrong first word is no subcommand, and would go unnamed
  const bool unknown = app.get_subcommands().empty() && !unused.empty();
  const std::string message = (unknown ? "there is no subcommand '" + unused[0] + "'" : std::string(e.what())) +
                              "; --help lists what is accepted";
  fail_together(message, launch, runtime);
}

/// Parses the command line and runs its command.
void run(CLI::App& app, int argc, char** argv, Runtime& runtime) {
  const auto launch = deltapipe::detect_launch([](const char* name) { return std::getenv(name); });
  const std::string command = argc > 1 ? argv[1] : "";
  const bool known = !app.get_subcommands([&](const CLI::App* a) { return a->get_name() == command; }).empty();
  const bool asks = std::any_of(argv, argv + argc, [](const std::string_view a) { return a == "--help" || a == "-h"; });
  if (known && !asks && command != "train" && launch.ranks > 1) {
    fail_together(
        fmt::format("{} runs in one process, {} were started: start it without mpirun or srun", command, launch.ranks),
        launch, runtime);
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success&) {
    throw;  // --help, --version
  } catch (const CLI::ParseError& e) {
    fail_usage(app, e, launch, runtime);
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::signal(SIGXFSZ, SIG_IGN);  // a file that may not grow is an error to tell of and clean up after
  Runtime runtime;                // of a command that runs on many ranks
  CLI::App app("deltapipe: distill a full-attention teacher into a KDA / NoPE hybrid student");
  app.require_subcommand(1);
  app.set_version_flag("--version", DELTAPIPE_VERSION);
  app.footer("deltapipe SUBCOMMAND --help lists the options of one.");
  deltapipe::add_config_command(app);
  deltapipe::add_data_command(app);
  deltapipe::add_init_command(app);
  deltapipe::add_status_command(app);
  deltapipe::add_plan_command(app);
  deltapipe::add_train_command(app, runtime);
  deltapipe::add_eval_command(app);
  deltapipe::add_export_command(app);
  deltapipe::add_inspect_command(app);
  deltapipe::add_logits_command(app);
  deltapipe::add_generate_command(app);
  try {
    run(app, argc, argv, runtime);
    return 0;
  } catch (const CLI::Success& e) {
    return app.exit(e);
  } catch (const deltapipe::PeerError& e) {
    return end(runtime, e.exit_code());  // that rank has told
  } catch (const deltapipe::InternalError& e) {
    return report_bug(runtime, e.what());
  } catch (const deltapipe::Error& e) {
    return report(runtime, e.what(), e.exit_code());
  } catch (const std::bad_alloc&) {
    return report(runtime, "out of memory", deltapipe::MemoryError("").exit_code());
  } catch (const std::filesystem::filesystem_error& e) {
    return report(runtime, e.path1().string() + ": " + e.code().message(), deltapipe::IoError("").exit_code());
  } catch (const std::exception& e) {
    return report_bug(runtime, e.what());
  }
}
