#include "kernels/kda.h"

#include "kernels/dispatch.h"

namespace deltapipe::kernels {

DELTAPIPE_KERNEL(kda_records_bytes)
DELTAPIPE_KERNEL(kda_forward)
DELTAPIPE_KERNEL(kda_backward)
DELTAPIPE_KERNEL(kda_segment_map)
DELTAPIPE_KERNEL(kda_backward_map)
DELTAPIPE_KERNEL(kda_compose_maps)
DELTAPIPE_KERNEL(kda_apply_map)

namespace {

void check(const Tensor& t, const Shape& shape, DType dtype, const char* what) {
  check_shape(t, shape, what);
  check_dtype(t, dtype, what);
}

/// Shapes and dtypes of one call, taken from q and v.
struct Sizes {
  std::int64_t segments, length, heads, k, v;
  DType dtype, acc;

  Shape tokens_k() const { return {segments, length, heads, k}; }
  Shape tokens_v() const { return {segments, length, heads, v}; }
  Shape state() const { return {segments, heads, k, v}; }
};

Sizes check_inputs(const KdaInputs& in) {
  require(in.q.shape.rank() == 4, "kda: q is not [S, L, H, K]");
  require(in.v.shape.rank() == 4, "kda: v is not [S, L, H, V]");
  const Sizes n{
      in.q.dim(0), in.q.dim(1), in.q.dim(2), in.q.dim(3), in.v.dim(3), in.q.dtype, accumulation_dtype(in.q.dtype)};
  require(n.segments >= 1 && n.length >= 1 && n.heads >= 1 && n.k >= 1 && n.v >= 1, "kda: an empty dimension");
  check(in.k, n.tokens_k(), n.dtype, "kda: k");
  check(in.v, n.tokens_v(), n.dtype, "kda: v");
  check(in.f, n.tokens_k(), n.dtype, "kda: f");
  check(in.b, {n.segments, n.length, n.heads}, n.dtype, "kda: b");
  check(in.a_log, {n.heads}, n.acc, "kda: a_log");
  check(in.dt_bias, {n.heads, n.k}, n.acc, "kda: dt_bias");
  check(in.start, {n.segments, n.length}, DType::i32, "kda: start");
  if (!(in.gate_lower_bound <= 0)) fail<InternalError>("kda: gate_lower_bound {} is positive", in.gate_lower_bound);
  return n;
}

void check_records(const Stream& stream, const KdaInputs& inputs, const Tensor& records, const char* what) {
  if (records) check(records, {kda_records_bytes(stream, inputs)}, DType::u8, what);
}

void check_maps(const Tensor& m, const Tensor& e) {
  require(m.shape.rank() == 4 && m.dim(2) == m.dim(3), "kda: m is not [S, H, K, K]");
  require(m.dtype == DType::f32 || m.dtype == DType::f64, "kda: m is not in an accumulation dtype");
  require(e.shape.rank() == 4, "kda: e is not [S, H, K, V]");
  check(e, {m.dim(0), m.dim(1), m.dim(2), e.dim(3)}, m.dtype, "kda: e");
}

}  // namespace

std::int64_t kda_records_bytes(const Stream& stream, const KdaInputs& inputs) {
  check_inputs(inputs);
  return DELTAPIPE_CALL(stream, kda_records_bytes, stream, inputs);
}

void kda_forward(const Stream& stream, const KdaInputs& inputs, const Tensor& records, const Tensor& state_in,
                 const Tensor& o, const Tensor& state_out, Arena& workspace) {
  const Sizes n = check_inputs(inputs);
  check_records(stream, inputs, records, "kda_forward: records");
  if (state_in) check(state_in, n.state(), n.acc, "kda_forward: state_in");
  check(o, n.tokens_v(), n.dtype, "kda_forward: o");
  if (state_out) check(state_out, n.state(), n.acc, "kda_forward: state_out");
  DELTAPIPE_DISPATCH_WITH_WORKSPACE(stream, kda_forward, stream, inputs, records, state_in, o, state_out, workspace);
}

void kda_backward(const Stream& stream, const KdaInputs& inputs, const Tensor& records, const Tensor& state_in,
                  const Tensor& d_o, const Tensor& dstate_out, const KdaGradients& gradients, const Tensor& dstate_in,
                  Arena& workspace) {
  const Sizes n = check_inputs(inputs);
  check_records(stream, inputs, records, "kda_backward: records");
  if (state_in) check(state_in, n.state(), n.acc, "kda_backward: state_in");
  check(d_o, n.tokens_v(), n.dtype, "kda_backward: d_o");
  if (dstate_out) check(dstate_out, n.state(), n.acc, "kda_backward: dstate_out");
  check(gradients.dq, n.tokens_k(), n.dtype, "kda_backward: dq");
  check(gradients.dk, n.tokens_k(), n.dtype, "kda_backward: dk");
  check(gradients.dv, n.tokens_v(), n.dtype, "kda_backward: dv");
  check(gradients.df, n.tokens_k(), n.dtype, "kda_backward: df");
  check(gradients.db, {n.segments, n.length, n.heads}, n.dtype, "kda_backward: db");
  if (gradients.da_log) check(gradients.da_log, {n.heads}, n.acc, "kda_backward: da_log");
  if (gradients.ddt_bias) check(gradients.ddt_bias, {n.heads, n.k}, n.acc, "kda_backward: ddt_bias");
  if (dstate_in) check(dstate_in, n.state(), n.acc, "kda_backward: dstate_in");
  DELTAPIPE_DISPATCH_WITH_WORKSPACE(stream, kda_backward, stream, inputs, records, state_in, d_o, dstate_out, gradients,
                                    dstate_in, workspace);
}

void kda_segment_map(const Stream& stream, const KdaInputs& inputs, const Tensor& records, const Tensor& m,
                     const Tensor& e, Arena& workspace) {
  const Sizes n = check_inputs(inputs);
  check_records(stream, inputs, records, "kda_segment_map: records");
  check(m, {n.segments, n.heads, n.k, n.k}, n.acc, "kda_segment_map: m");
  check(e, n.state(), n.acc, "kda_segment_map: e");
  DELTAPIPE_DISPATCH_WITH_WORKSPACE(stream, kda_segment_map, stream, inputs, records, m, e, workspace);
}

void kda_backward_map(const Stream& stream, const KdaInputs& inputs, const Tensor& records, const Tensor& d_o,
                      const Tensor& e, Arena& workspace) {
  const Sizes n = check_inputs(inputs);
  check_records(stream, inputs, records, "kda_backward_map: records");
  check(d_o, n.tokens_v(), n.dtype, "kda_backward_map: d_o");
  check(e, n.state(), n.acc, "kda_backward_map: e");
  DELTAPIPE_DISPATCH_WITH_WORKSPACE(stream, kda_backward_map, stream, inputs, records, d_o, e, workspace);
}

void kda_compose_maps(const Stream& stream, const Tensor& m1, const Tensor& e1, const Tensor& m2, const Tensor& e2,
                      const Tensor& m_out, const Tensor& e_out) {
  check_maps(m1, e1);
  check(m2, m1.shape, m1.dtype, "kda_compose_maps: m2");
  check(e2, e1.shape, m1.dtype, "kda_compose_maps: e2");
  check(m_out, m1.shape, m1.dtype, "kda_compose_maps: m_out");
  check(e_out, e1.shape, m1.dtype, "kda_compose_maps: e_out");
  DELTAPIPE_DISPATCH(stream, kda_compose_maps, stream, m1, e1, m2, e2, m_out, e_out);
}

void kda_apply_map(const Stream& stream, const Tensor& m, bool transpose_m, const Tensor& state, const Tensor& e,
                   const Tensor& out) {
  check_maps(m, e);
  check(state, e.shape, m.dtype, "kda_apply_map: state");
  check(out, e.shape, m.dtype, "kda_apply_map: out");
  DELTAPIPE_DISPATCH(stream, kda_apply_map, stream, m, transpose_m, state, e, out);
}

}  // namespace deltapipe::kernels
