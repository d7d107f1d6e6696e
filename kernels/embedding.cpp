#include "kernels/embedding.h"

#include "kernels/dispatch.h"

namespace deltapipe::kernels {

DELTAPIPE_KERNEL(embedding_forward)
DELTAPIPE_KERNEL(embedding_backward)

void embedding_forward(const Stream& stream, const Tensor& tokens, const Tensor& table, const Tensor& out) {
  require(tokens.shape.rank() == 1, "embedding_forward: tokens is not [T]");
  check_dtype(tokens, DType::i32, "embedding_forward: tokens");
  require(table.shape.rank() == 2, "embedding_forward: table is not [N, D]");
  check_tensor(out, {tokens.dim(0), table.dim(1)}, table.dtype, "embedding_forward: out");
  DELTAPIPE_DISPATCH(stream, embedding_forward, stream, tokens, table, out);
}

void embedding_backward(const Stream& stream, const Tensor& dout, const Tensor& tokens, const Tensor& dtable) {
  require(tokens.shape.rank() == 1, "embedding_backward: tokens is not [T]");
  check_dtype(tokens, DType::i32, "embedding_backward: tokens");
  require(dtable.shape.rank() == 2, "embedding_backward: dtable is not [N, D]");
  check_dtype(dtable, accumulation_dtype(dout.dtype), "embedding_backward: dtable");
  check_shape(dout, {tokens.dim(0), dtable.dim(1)}, "embedding_backward: dout");
  DELTAPIPE_DISPATCH(stream, embedding_backward, stream, dout, tokens, dtable);
}

}  // namespace deltapipe::kernels
