#include "train/signals.h"

#include <csignal>
#include <initializer_list>

namespace deltapipe {
namespace {

volatile std::sig_atomic_t received = 0;

extern "C" void on_stop(int signal) {
  if (received != 0) {
    std::signal(signal, SIG_DFL);
    std::raise(signal);
    return;
  }
  received = signal;
}

}  // namespace

void install_stop_signals() {
  struct sigaction action {};
  action.sa_handler = on_stop;
  sigemptyset(&action.sa_mask);
  action.sa_flags = SA_RESTART;
  for (const int s : {SIGTERM, SIGINT, SIGUSR1}) sigaction(s, &action, nullptr);
}

int stop_signal() { return received; }

}  // namespace deltapipe
