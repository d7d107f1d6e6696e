#include "kernels/attention.h"

#include "kernels/dispatch.h"

namespace deltapipe::kernels {

DELTAPIPE_KERNEL(attention_forward)
DELTAPIPE_KERNEL(attention_backward)

namespace {

void check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o, const Tensor& lse,
                     const Tensor& start) {
  require(q.shape.rank() == 3, "attention: q is not [L, Hq, d]");
  require(k.shape.rank() == 3, "attention: k is not [Lk, Hkv, d]");
  require(k.dim(0) >= q.dim(0), "attention: fewer keys than queries");
  require(k.dim(1) > 0 && q.dim(1) % k.dim(1) == 0, "attention: query heads are not a multiple of key/value heads");
  check_tensor(k, {k.dim(0), k.dim(1), q.dim(2)}, q.dtype, "attention: k");
  check_tensor(v, k.shape, q.dtype, "attention: v");
  check_tensor(o, q.shape, q.dtype, "attention: o");
  check_tensor(lse, {q.dim(1), q.dim(0)}, accumulation_dtype(q.dtype), "attention: lse");
  check_tensor(start, {q.dim(0)}, DType::i32, "attention: start");
}

}  // namespace

void attention_forward(const Stream& stream, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& start,
                       float scale, const Tensor& o, const Tensor& lse, Arena& workspace) {
  check_attention(q, k, v, o, lse, start);
  DELTAPIPE_DISPATCH_WITH_WORKSPACE(stream, attention_forward, stream, q, k, v, start, scale, o, lse, workspace);
}

void attention_backward(const Stream& stream, const Tensor& d_o, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Tensor& o, const Tensor& lse, const Tensor& start, float scale, const Tensor& dq,
                        const Tensor& dk, const Tensor& dv, bool accumulate_kv, Arena& workspace) {
  check_attention(q, k, v, o, lse, start);
  check_tensor(d_o, q.shape, q.dtype, "attention_backward: d_o");
  check_tensor(dq, q.shape, q.dtype, "attention_backward: dq");
  check_tensor(dk, k.shape, q.dtype, "attention_backward: dk");
  check_tensor(dv, k.shape, q.dtype, "attention_backward: dv");
  DELTAPIPE_DISPATCH_WITH_WORKSPACE(stream, attention_backward, stream, d_o, q, k, v, o, lse, start, scale, dq, dk, dv,
                                    accumulate_kv, workspace);
}

}  // namespace deltapipe::kernels
