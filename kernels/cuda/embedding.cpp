// The contract of kernels/embedding.h on CUDA. A token outside the table gives a row of NaN and no gradient.
#include "kernels/embedding.h"

#include "kernels/cuda/launches.h"
#include "kernels/cuda/typed.h"

namespace deltapipe::kernels::cuda {

decltype(kernels::embedding_forward) embedding_forward;
decltype(kernels::embedding_backward) embedding_backward;

void embedding_forward(const Stream& stream, const Tensor& tokens, const Tensor& table, const Tensor& out) {
  const char* call = "embedding_forward";
  for_type(table.dtype, call, [&]<class T>() {
    check(embedding_forward<T>(tokens.as<std::int32_t>(), pointer<T>(table, call), pointer<T>(out, call), tokens.dim(0),
                               table.dim(0), table.dim(1), native(stream)),
          call);
  });
}

void embedding_backward(const Stream& stream, const Tensor& dout, const Tensor& tokens, const Tensor& dtable) {
  const char* call = "embedding_backward";
  to_int(tokens.dim(0), call);
  for_type(dout.dtype, call, [&]<class T>() {
    check(embedding_backward<T>(pointer<T>(dout, call), tokens.as<std::int32_t>(), floats(dtable), tokens.dim(0),
                                dtable.dim(0), dtable.dim(1), native(stream)),
          call);
  });
}

}  // namespace deltapipe::kernels::cuda
