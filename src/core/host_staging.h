// Host memory for tensors that are on a device, on their way from or to files and code that works on the host. Not for
// steps: every call waits for its copy.
#pragma once

#include "core/device_memory.h"

#include <cstddef>
#include <memory>

namespace deltapipe {

class HostStaging {
 public:
  /// fill(host) writes a tensor of t's dtype and shape in host memory, which then becomes t: t itself where it is in
  /// host memory. `stream` is of t's device.
  template <class F>
  void write(const Stream& stream, const Tensor& t, const F& fill) {
    if (t.device.is_cpu()) {
      fill(t);
      return;
    }
    const Tensor host = room_for(t);
    fill(host);
    copy(stream, host, t);
    synchronize(stream);
  }

  /// t after all work queued on `stream`: t itself where it is in host memory, else a copy that lasts until the next
  /// call.
  Tensor read(const Stream& stream, const Tensor& t) {
    if (t.device.is_cpu()) {
      synchronize(stream);
      return t;
    }
    const Tensor host = room_for(t);
    copy(stream, t, host);
    synchronize(stream);
    return host;
  }

 private:
  Tensor room_for(const Tensor& t) {
    if (t.bytes() > capacity_) {
      memory_.reset();
      memory_ = std::make_unique_for_overwrite<std::byte[]>(t.bytes());
      capacity_ = t.bytes();
    }
    return {memory_.get(), t.dtype, t.shape};
  }

  std::unique_ptr<std::byte[]> memory_;
  std::size_t capacity_ = 0;
};

}  // namespace deltapipe
