// What the parts of the stand-in for the CUDA libraries share: device memory that the host cannot touch, checks of
// addresses against it, streams, and how a call is refused. See README.md.
#pragma once

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <utility>

/// Of a function of the CUDA libraries that the stand-in defines: the rest of the library stays hidden.
#define STAND_IN extern "C" __attribute__((visibility("default")))

namespace deltapipe::stand_in {

/// Over all state of the stand-in; taken by every call that reads or changes it.
std::recursive_mutex& mutex();

/// Prints why a call is refused, and with DELTAPIPE_STAND_IN_STACK in the environment from where it came; aborts with
/// DELTAPIPE_STAND_IN_ABORT. This thread's error strings end with the message until its next refusal.
void say_refusal(const std::string& message);
const std::string& last_refusal();

/// Refuses with `code`, to be returned to the caller.
template <class Code, class... Arguments>
Code refuse(Code code, fmt::format_string<Arguments...> format, Arguments&&... arguments) {
  say_refusal(fmt::format(format, std::forward<Arguments>(arguments)...));
  return code;
}

/// An error string with the reason of this thread's last refusal, valid until the thread asks for the next.
const char* with_refusal(const char* text);

/// The environment's value of `name`, or `otherwise`.
long setting(const char* name, long otherwise);
/// DELTAPIPE_STAND_IN_LOG: launches, products and attention are printed.
bool logs();

// Devices.

int device_count();
/// This thread's.
int current_device();

// Device memory: a range of addresses a device, which the host cannot touch, and behind each the memory that the
// stand-in's copies use.

/// Null when the device is full.
void* allocate_on(int device, std::size_t bytes);
/// False when no allocation begins there.
bool release(const void* memory);
std::size_t bytes_free(int device);
std::size_t bytes_of_a_device();

/// In some device's range, allocated or not.
bool is_on_device(const void* address);
/// In the part of a device's range that holds or has held allocations.
bool was_ever_used(const void* address);
/// The device of the allocation that holds the address, or ends there; -1 for any other address.
int device_of(const void* address);
/// The memory behind a checked device address; a host address is its own.
std::byte* behind(const void* address);
/// memset of a checked device range.
void fill(void* memory, int value, std::size_t bytes);
/// "device 0, 96 bytes into one of 4096", "host memory", "device memory that is not allocated"
std::string describe(const void* address);

/// Whether all `bytes` lie in one live allocation; otherwise says so: `what` is "cudaMemcpy: source".
bool is_device_range(const void* begin, std::size_t bytes, const std::string& what);
/// Whether nothing of the range is device memory; otherwise says so.
bool is_host_range(const void* begin, std::size_t bytes, const std::string& what);

// Host memory that a device may use: page-locked.

bool is_page_locked(const void* address);

// Streams.

/// A live one, or one of CUDA's own; otherwise says so.
bool is_stream(cudaStream_t stream, const char* call);
/// The same, and of the current device, as launches demand.
bool is_stream_of_current_device(cudaStream_t stream, const char* call);

/// Waits for the legacy default stream, and that one for it; of a live stream.
bool is_blocking(cudaStream_t stream);
int device_of_stream(cudaStream_t stream);

/// Sets this thread's last CUDA error, unless it is success, and returns it.
cudaError_t finish(cudaError_t status);

}  // namespace deltapipe::stand_in
