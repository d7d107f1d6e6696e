// The order of work on streams. Work is done when its call returns, but a device does it later: so every stream, event
// and the host keep a clock of what they come after, and work that touches the same memory as other work without coming
// after it is refused. Copies between devices and page-locked memory show the host what a device would let it see.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace deltapipe::stand_in {

/// By stream: how much of its work has been done before.
using Clock = std::vector<std::uint32_t>;

enum class Access { read, write, unknown };

/// Memory that a piece of work touches; of a kernel's argument only the first byte is known.
struct Use {
  const void* begin;
  std::size_t bytes;
  Access access;
};

/// Who gives it: copies and messages touch all of their memory, in a way that is known.
enum class Work { kernel, transfer };

/// Gives `stream` a piece of work. False, said, when it does not come after other work that it conflicts with. `what`
/// lives as long as the process.
bool queue(const char* what, cudaStream_t stream, std::span<const Use> uses, Work work);

/// A copy between memory of any kind, given to `stream` and made; what the host sees of it in page-locked memory, it
/// sees when it knows that the copy is done. False as above.
bool queue_copy(const char* what, cudaStream_t stream, void* to, const void* from, std::size_t bytes);

Clock clock_of(cudaStream_t stream);
void wait_for(cudaStream_t stream, const Clock& clock);

/// The host knows that all of this is done. False, said, when memory was changed while a copy from it was under way.
bool host_waits_for(const Clock& clock);
bool host_waits_for_all();
/// What is under way to or from page-locked memory that begins there is done now.
void settle_host_memory(const void* begin, std::size_t bytes);

/// This thread has given work to a stream. What only watches streams learns nothing for the others.
bool thread_gives_work();

}  // namespace deltapipe::stand_in
