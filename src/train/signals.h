// SIGTERM, SIGINT and SIGUSR1 ask a run to finish its step, write a checkpoint and exit 0. A second one ends it at
// once.
#pragma once

namespace deltapipe {

/// Takes over the three signals for the rest of the process.
void install_stop_signals();
/// The first signal that asked to stop, 0 when none did.
int stop_signal();

}  // namespace deltapipe
