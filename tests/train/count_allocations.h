// Counts what the program's own code takes from the heap, on all threads.
#pragma once

#include <cstdint>

namespace deltapipe::testing {

/// Uses of operator new in this process so far, and calls of malloc and its relatives from the executable itself.
/// What libgomp and OpenBLAS take for themselves is not counted: some of their versions fetch and return a few bytes in
/// every small product or parallel region.
std::int64_t heap_allocations();

}  // namespace deltapipe::testing
