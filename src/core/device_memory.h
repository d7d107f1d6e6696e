// Memory of a device, copies between devices, and the order of work on them. The same calls serve the CPU, where they
// run at once, and CUDA, where they are queued on a stream; a binary built without CUDA has the CPU's half and says so
// when asked for the other. Nothing here waits for a device except what is named synchronize, and the copies of memory
// that is not page-locked (see copy).
#pragma once

#include "core/stream.h"
#include "core/tensor.h"

#include <cstddef>
#include <string>

namespace deltapipe {

/// "cpu", "cuda:1"
std::string name_of(Device device);

/// Whether this binary was built with CUDA.
bool built_with_cuda();

/// CUDA devices that this process sees; 0 without CUDA, whether in the binary or in the machine.
int cuda_device_count();

/// "NVIDIA H100 80GB HBM3"; "cpu".
std::string describe_device(Device device);

/// Makes `device` the one that this thread's CUDA calls address. Nothing for the CPU. Throws UsageError when there is
/// no such device.
void set_device(Device device);

/// `bytes` > 0 of uninitialised memory, aligned to 256 bytes. Throws MemoryError that names `purpose`, the size, the
/// device and what it has free.
void* allocate_memory(Device device, std::size_t bytes, const std::string& purpose);
void release_memory(Device device, void* memory, std::size_t bytes) noexcept;

/// Bytes of the device's memory that are taken, by whatever process, CUDA's own included; 0 for the CPU.
std::size_t memory_in_use(Device device);

/// Bytes of memory that the device has; 0 for the CPU.
std::size_t memory_size(Device device);

/// Page-locks host memory, so that copies to and from CUDA devices run beside other work. Does nothing, and returns
/// false, where there is no CUDA device. Throws MemoryError when the system refuses.
bool page_lock(void* memory, std::size_t bytes, const std::string& purpose);
void page_unlock(void* memory) noexcept;

/// to = from: one dtype and number of elements, any two devices; queued on `stream`, which is CUDA's when one of them
/// is. Between CUDA and host memory that is not page-locked the call may wait for the copy.
void copy(const Stream& stream, const Tensor& from, const Tensor& to);

/// `rows` runs of `width` bytes that begin `from_pitch` and `to_pitch` bytes apart, both in memory of the stream's
/// device.
void copy_rows(const Stream& stream, std::size_t rows, std::size_t width, const void* from, std::size_t from_pitch,
               void* to, std::size_t to_pitch);

/// Returns when everything queued on `stream` has been done. Throws InternalError for a fault on the device.
void synchronize(const Stream& stream);

/// Owns a queue of a device. On the CPU it owns nothing and its stream is Stream::cpu().
class StreamOwner {
 public:
  /// `urgent` streams' kernels start before those of others that wait: for communication beside compute.
  explicit StreamOwner(Device device, bool urgent = false);
  ~StreamOwner();
  StreamOwner(StreamOwner&& other) noexcept;
  StreamOwner& operator=(StreamOwner&& other) noexcept;
  StreamOwner(const StreamOwner&) = delete;
  StreamOwner& operator=(const StreamOwner&) = delete;

  Stream get() const { return device_.is_cpu() ? Stream::cpu() : Stream::cuda(device_.index, native_); }

 private:
  Device device_;
  void* native_ = nullptr;
};

/// A point in a stream's work, where another stream or the host can meet it. On the CPU it has always been reached.
class Event {
 public:
  /// One that `times` tells when it was reached, at some cost to the device.
  explicit Event(Device device, bool times = false);
  ~Event();
  Event(Event&& other) noexcept;
  Event& operator=(Event&& other) noexcept;
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  /// The point is the end of what `stream` has been given so far. May be recorded anew.
  void record(const Stream& stream);
  /// What `stream` is given from here on starts after the point.
  void make_wait(const Stream& stream) const;
  /// True when the point has been reached, or was never recorded. Throws InternalError for a fault on the device.
  bool reached() const;
  void synchronize() const;
  /// Seconds from `earlier` to this one, both reached and of the kind that times; 0 on the CPU. In float32
  /// milliseconds: to a microsecond over ten seconds.
  double seconds_since(const Event& earlier) const;

 private:
  Device device_;
  void* native_ = nullptr;
};

}  // namespace deltapipe
