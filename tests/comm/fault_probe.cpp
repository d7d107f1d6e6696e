// A job in which rank 1 goes wrong in the way named on the command line, with the main of a real program: print one
// line, end every rank. test_faults.sh looks at what comes of it.
#include "comm/mpi_runtime.h"

#include <chrono>
#include <csignal>
#include <cstdio>
#include <string_view>
#include <thread>

namespace {

using namespace deltapipe;

void run(MpiRuntime& runtime, std::string_view fault) {
  runtime.set_where("step 3");
  if (runtime.rank() == 1) {
    if (fault == "silent") std::this_thread::sleep_for(std::chrono::hours(1));
    if (fault == "killed") std::raise(SIGKILL);
    if (fault == "throws") fail<FormatError>("rank 1 has read a damaged file");
    if (fault == "leaves") return;  // ends well while the others go on
  }
  float x = 0;
  if (runtime.rank() == 0) {
    runtime.world().receive(Stream::cpu(), Tensor(&x, DType::f32, {1}), 1, Purpose::hidden_state);
  } else {
    runtime.world().barrier(Stream::cpu());
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    CommunicationSettings settings;
    settings.timeout_s = 3;
    MpiRuntime runtime(settings);
    run(runtime, argc > 1 ? argv[1] : "");
    return 0;
  } catch (const Error& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    MpiRuntime::abort_all(e.exit_code());
  }
}
