#include "core/parallel.h"

#include <omp.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>

namespace deltapipe {

void set_num_threads(int threads, int processes) {
  if (threads <= 0) {
    cpu_set_t set;
    CPU_ZERO(&set);
    threads = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    // A launcher that bound its processes has given each its own cores; otherwise they share.
    const auto online = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
    if (threads * processes > online) threads = std::max(1, online / processes);
  }
  omp_set_num_threads(threads);
}

int num_threads() { return omp_get_max_threads(); }

}  // namespace deltapipe
