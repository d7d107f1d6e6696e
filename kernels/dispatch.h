// How a contract in kernels/NAME.h reaches its implementations kernels/cpu/NAME.cpp and kernels/cuda/NAME.cu.
// kernels/NAME.cpp checks shapes once for both, then dispatches on the stream's device. Only kernels/NAME.cpp files
// include this header.
#pragma once

#include "core/stream.h"
#include "core/tensor.h"
#include "kernels/settings.h"

/// Declares cpu::name and cuda::name with the signature of the public kernels::name. Use inside deltapipe::kernels.
#define DELTAPIPE_KERNEL(name)  \
  namespace cpu {               \
  decltype(kernels::name) name; \
  }                             \
  namespace cuda {              \
  decltype(kernels::name) name; \
  }

#ifdef DELTAPIPE_CUDA
#define DELTAPIPE_CALL(stream, name, ...) (stream).device().is_cpu() ? cpu::name(__VA_ARGS__) : cuda::name(__VA_ARGS__)
#else
#define DELTAPIPE_CALL(stream, name, ...)             \
  (stream).device().is_cpu() ? cpu::name(__VA_ARGS__) \
                             : ::deltapipe::kernels::no_cuda<decltype(cpu::name(__VA_ARGS__))>(#name)
#endif

/// For operations without workspace: a dry stream ends here.
#define DELTAPIPE_DISPATCH(stream, name, ...)    \
  do {                                           \
    if (!(stream).is_dry()) {                    \
      const CallSpan span(stream, #name);        \
      DELTAPIPE_CALL(stream, name, __VA_ARGS__); \
    }                                            \
  } while (false)

/// For operations with workspace: the implementation takes its workspace, then returns when the stream is dry.
#define DELTAPIPE_DISPATCH_WITH_WORKSPACE(stream, name, ...) \
  do {                                                       \
    const CallSpan span(stream, #name);                      \
    DELTAPIPE_CALL(stream, name, __VA_ARGS__);               \
  } while (false)

namespace deltapipe::kernels {

/// Tells the observer of a call's beginning and end.
class CallSpan {
 public:
  CallSpan(const Stream& stream, const char* name)
      : stream_(stream), name_(call_observer != nullptr && !stream.is_dry() ? name : nullptr) {
    if (name_ != nullptr) call_observer(stream_, name_, true);
  }
  ~CallSpan() {
    if (name_ != nullptr) call_observer(stream_, name_, false);
  }
  CallSpan(const CallSpan&) = delete;
  CallSpan& operator=(const CallSpan&) = delete;

 private:
  const Stream& stream_;
  const char* name_;
};

template <class T>
[[noreturn]] T no_cuda(const char* name) {
  fail<InternalError>("{}: this binary was built without CUDA", name);
}

/// Throws InternalError unless `t` has the given shape; `what` is "operation: tensor".
inline void check_shape(const Tensor& t, const Shape& shape, const char* what) {
  if (!(t.shape == shape)) fail<InternalError>("{} is {}, expected {}", what, t.shape.str(), shape.str());
}
inline void check_dtype(const Tensor& t, DType dtype, const char* what) {
  if (t.dtype != dtype) fail<InternalError>("{} is {}, expected {}", what, name_of(t.dtype), name_of(dtype));
}
/// Shape and dtype in one line.
inline void check_tensor(const Tensor& t, const Shape& shape, DType dtype, const char* what) {
  check_shape(t, shape, what);
  check_dtype(t, dtype, what);
}

}  // namespace deltapipe::kernels
