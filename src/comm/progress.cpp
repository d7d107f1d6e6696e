#include "comm/progress.h"

#include <algorithm>
#include <chrono>

namespace deltapipe {

void Progress::advance_all() {
  require(std::this_thread::get_id() == thread_, "communication on another thread than MPI's (MPI_THREAD_FUNNELED)");
  for (Operation* operation : operations_) operation->advance();
}

bool Progress::wait_until(const std::function<bool()>& done) {
  using Clock = std::chrono::steady_clock;
  constexpr std::chrono::microseconds eager{50};  // a message on its way arrives within; a sleep costs as much
  constexpr std::chrono::microseconds shortest{1}, longest{200};
  constexpr std::chrono::seconds suspended{1};  // no turn of this loop takes as long unless the process stood still
  const auto begin = Clock::now();
  auto deadline = begin + std::chrono::duration<double>(settings_.timeout_s);
  auto pause = shortest;
  for (auto last = begin;;) {
    advance_all();
    if (done()) return true;
    const auto now = Clock::now();
    if (now - last > suspended) deadline += now - last;
    last = now;
    if (now - begin < eager) {
      std::this_thread::yield();
      continue;
    }
    if (now >= deadline) return false;
    std::this_thread::sleep_for(pause);
    pause = std::min(2 * pause, longest);
  }
}

}  // namespace deltapipe
