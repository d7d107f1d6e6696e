// The contract of kernels/kda.h on CUDA: bf16 tensors, fp32 parameters and states, K = V = 64 or 128.
#include "kernels/kda.h"

#include "kernels/cuda/common.h"
#include "kernels/cuda/kda_kernels.h"

#include <limits>

namespace deltapipe::kernels::cuda {

decltype(kernels::kda_records_bytes) kda_records_bytes;
decltype(kernels::kda_forward) kda_forward;
decltype(kernels::kda_backward) kda_backward;
decltype(kernels::kda_segment_map) kda_segment_map;
decltype(kernels::kda_backward_map) kda_backward_map;
decltype(kernels::kda_compose_maps) kda_compose_maps;
decltype(kernels::kda_apply_map) kda_apply_map;

namespace {

kda::Problem problem(const KdaInputs& in, const char* call) {
  if (in.q.dtype != DType::bf16) {
    fail<InternalError>("{}: inputs are {}, on CUDA they must be bfloat16", call, name_of(in.q.dtype));
  }
  if (in.q.dim(3) != in.v.dim(3) || !kda::supports(static_cast<int>(in.q.dim(3)))) {
    fail<InternalError>("{}: K {} and V {}, on CUDA both must be 64 or both 128", call, in.q.dim(3), in.v.dim(3));
  }
  const std::int64_t chunks = in.q.dim(0) * in.q.dim(2) * ((in.q.dim(1) + 63) / 64);
  if (chunks > std::numeric_limits<int>::max() || in.q.dim(1) > std::numeric_limits<int>::max() - 64) {
    fail<InternalError>("{}: {} is too large", call, in.q.shape.str());
  }
  return {.q = bits(in.q),
          .k = bits(in.k),
          .v = bits(in.v),
          .f = bits(in.f),
          .b = bits(in.b),
          .a_log = in.a_log.as<float>(),
          .dt_bias = in.dt_bias.as<float>(),
          .start = in.start.as<std::int32_t>(),
          .scale = in.scale,
          .gate_lower_bound = in.gate_lower_bound,
          .segments = static_cast<int>(in.q.dim(0)),
          .length = static_cast<int>(in.q.dim(1)),
          .heads = static_cast<int>(in.q.dim(2)),
          .head_dim = static_cast<int>(in.q.dim(3))};
}

/// The caller's records, or memory for them.
void* records_of(const Tensor& records, const kda::Problem& p, Arena& workspace) {
  return records ? records.data : take_workspace(workspace, kda::records_bytes(p), "KDA records");
}

}  // namespace

std::int64_t kda_records_bytes(const Stream& /*stream*/, const KdaInputs& inputs) {
  return static_cast<std::int64_t>(kda::records_bytes(problem(inputs, "kda_records_bytes")));
}

void kda_forward(const Stream& stream, const KdaInputs& inputs, const Tensor& records, const Tensor& state_in,
                 const Tensor& o, const Tensor& state_out, Arena& workspace) {
  const kda::Problem p = problem(inputs, "kda_forward");
  const auto scope = workspace.scope();
  void* memory = records_of(records, p, workspace);
  if (stream.is_dry()) return;
  check(
      kda::forward(p, memory, static_cast<bool>(records), floats(state_in), bits(o), floats(state_out), native(stream)),
      "kda_forward");
}

void kda_backward(const Stream& stream, const KdaInputs& inputs, const Tensor& records, const Tensor& state_in,
                  const Tensor& d_o, const Tensor& dstate_out, const KdaGradients& gradients, const Tensor& dstate_in,
                  Arena& workspace) {
  const kda::Problem p = problem(inputs, "kda_backward");
  const auto scope = workspace.scope();
  void* kept = records_of(records, p, workspace);
  void* memory = take_workspace(workspace, kda::backward_workspace(p), "KDA workspace");
  if (stream.is_dry()) return;
  const kda::Gradients out{bits(gradients.dq), bits(gradients.dk),       bits(gradients.dv),        bits(gradients.df),
                           bits(gradients.db), floats(gradients.da_log), floats(gradients.ddt_bias)};
  check(kda::backward(p, kept, static_cast<bool>(records), floats(state_in), bits(d_o), floats(dstate_out), out,
                      floats(dstate_in), memory, native(stream)),
        "kda_backward");
}

void kda_segment_map(const Stream& stream, const KdaInputs& inputs, const Tensor& records, const Tensor& m,
                     const Tensor& e, Arena& workspace) {
  const kda::Problem p = problem(inputs, "kda_segment_map");
  const auto scope = workspace.scope();
  void* kept = records_of(records, p, workspace);
  if (stream.is_dry()) return;
  check(kda::segment_map(p, kept, floats(m), floats(e), native(stream)), "kda_segment_map");
}

void kda_backward_map(const Stream& stream, const KdaInputs& inputs, const Tensor& records, const Tensor& d_o,
                      const Tensor& e, Arena& workspace) {
  const kda::Problem p = problem(inputs, "kda_backward_map");
  const auto scope = workspace.scope();
  void* kept = records_of(records, p, workspace);
  if (stream.is_dry()) return;
  check(kda::backward_map(p, kept, bits(d_o), floats(e), native(stream)), "kda_backward_map");
}

void kda_compose_maps(const Stream& stream, const Tensor& m1, const Tensor& e1, const Tensor& m2, const Tensor& e2,
                      const Tensor& m_out, const Tensor& e_out) {
  const int n = static_cast<int>(m1.dim(0) * m1.dim(1)), k = static_cast<int>(m1.dim(2));
  const float* second = m2.as<float>();
  check(kda::multiply_add(n, k, k, second, false, m1.as<float>(), nullptr, m_out.as<float>(), native(stream)),
        "kda_compose_maps");
  check(kda::multiply_add(n, k, static_cast<int>(e1.dim(3)), second, false, e1.as<float>(), e2.as<float>(),
                          e_out.as<float>(), native(stream)),
        "kda_compose_maps");
}

void kda_apply_map(const Stream& stream, const Tensor& m, bool transpose_m, const Tensor& state, const Tensor& e,
                   const Tensor& out) {
  const int n = static_cast<int>(m.dim(0) * m.dim(1)), k = static_cast<int>(m.dim(2));
  check(kda::multiply_add(n, k, static_cast<int>(e.dim(3)), m.as<float>(), transpose_m, state.as<float>(),
                          e.as<float>(), out.as<float>(), native(stream)),
        "kda_apply_map");
}

}  // namespace deltapipe::kernels::cuda
