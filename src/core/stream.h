// Stream: where operations run and in which order. On the CPU an operation has finished when its call returns; on CUDA
// it is queued. A dry stream runs nothing: operations still check their shapes and take their workspace, so that one
// dry step measures what a real step needs (see core/arena.h).
#pragma once

#include "core/tensor.h"

namespace deltapipe {

class Stream {
 public:
  static Stream cpu() { return Stream({}, nullptr, false); }
  static Stream dry(Device device) { return Stream(device, nullptr, true); }
  /// `native` is a cudaStream_t that outlives this object.
  static Stream cuda(int index, void* native) { return Stream({Device::Kind::cuda, index}, native, false); }

  Device device() const { return device_; }
  bool is_dry() const { return dry_; }
  void* native() const { return native_; }

 private:
  Stream(Device device, void* native, bool dry) : device_(device), native_(native), dry_(dry) {}
  Device device_;
  void* native_;
  bool dry_;
};

}  // namespace deltapipe
