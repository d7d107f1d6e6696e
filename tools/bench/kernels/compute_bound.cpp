// Operations made of matrix products, in the shapes of AFM-4.5B and its KDA student, bfloat16: linear layers,
// attention, KDA. Operations are counted as a training step's model FLOPs count them.
#include "kernels/attention.h"
#include "kernels/kda.h"
#include "kernels/linear.h"
#include "tools/bench/kernels/bench.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

namespace deltapipe::bench {
namespace {

constexpr std::int64_t hidden = 2560, heads = 20, kv_heads = 4, head_dim = 128, intermediate = 18432;
constexpr std::int64_t vocabulary = 128004, loss_rows = 2048;  // tokens of a logits block
constexpr DType model = DType::bf16;

double bytes_of(std::initializer_list<Tensor> tensors) {
  double sum = 0;
  for (const Tensor& t : tensors) sum += static_cast<double>(t.bytes());
  return sum;
}

/// `row`: elements of a row of the outputs.
void linear(Bench& b, const std::string& name, std::int64_t tokens, std::int64_t in, std::int64_t out,
            std::int64_t row) {
  const auto scope = b.scope();
  const Stream& s = b.stream();
  const Tensor x = b.normal(model, {tokens, in}), w = b.normal(model, {out, in}, 0.02);
  const Tensor y = b.normal(model, {tokens, row});
  const double flop = 2.0 * static_cast<double>(tokens) * static_cast<double>(in) * static_cast<double>(out);
  const std::string shape = std::to_string(tokens) + "x" + std::to_string(in) + "x" + std::to_string(out);
  b.measure("linear_forward " + name, shape, bytes_of({x, w, y}), flop,
            [&] { kernels::linear_forward(s, x, w, Tensor(), y); });
  b.measure("linear_backward_input " + name, shape, bytes_of({x, w, y}), flop,
            [&] { kernels::linear_backward_input(s, y, w, x, false, b.workspace()); });
  const Tensor dw = b.normal(DType::f32, {out, in});
  b.measure("linear_backward_weight " + name, shape, bytes_of({x, y, dw, dw}), flop,
            [&] { kernels::linear_backward_weight(s, y, x, dw, Tensor()); });
}

void linear(Bench& b, const std::string& name, std::int64_t tokens, std::int64_t in, std::int64_t out) {
  linear(b, name, tokens, in, out, out);
}

void attention(Bench& b, std::int64_t tokens, bool packed) {
  const auto scope = b.scope();
  const Stream& s = b.stream();
  const Shape queries{tokens, heads, head_dim}, keys{tokens, kv_heads, head_dim};
  const Tensor q = b.normal(model, queries), k = b.normal(model, keys), v = b.normal(model, keys);
  const Tensor o = b.normal(model, queries), d_o = b.normal(model, queries),
               lse = b.normal(DType::f32, {heads, tokens});
  const Tensor dq = b.empty(model, queries), dk = b.empty(model, keys), dv = b.empty(model, keys);
  constexpr std::int64_t document = 2048;
  std::vector<std::int32_t> starts(static_cast<std::size_t>(tokens), 0);
  double visible = 0;
  for (std::int64_t t = 0; t < tokens; ++t) {
    if (packed) starts[static_cast<std::size_t>(t)] = static_cast<std::int32_t>(t / document * document);
    visible += static_cast<double>(t - starts[static_cast<std::size_t>(t)] + 1);
  }
  const Tensor start(starts.data(), DType::i32, {tokens});
  const auto scale = static_cast<float>(1 / std::sqrt(static_cast<double>(head_dim)));
  const double flop = 4.0 * visible * static_cast<double>(heads * head_dim);
  const std::string shape = std::to_string(tokens) + (packed ? " documents of 2048" : " tokens");
  b.measure("attention_forward", shape, bytes_of({q, k, v, o}), flop,
            [&] { kernels::attention_forward(s, q, k, v, start, scale, o, lse, b.workspace()); });
  b.measure("attention_backward", shape, bytes_of({q, k, v, o, d_o, dq, dk, dv}), 2.5 * flop, [&] {
    kernels::attention_backward(s, d_o, q, k, v, o, lse, start, scale, dq, dk, dv, false, b.workspace());
  });
}

void kda(Bench& b, std::int64_t tokens) {
  const auto scope = b.scope();
  const Stream& s = b.stream();
  const Shape rows{1, tokens, heads, head_dim}, states{1, heads, head_dim, head_dim};
  kernels::KdaInputs in;
  in.q = b.normal(model, rows);
  in.k = b.normal(model, rows);
  in.v = b.normal(model, rows);
  in.f = b.normal(model, rows);
  in.b = b.normal(model, {1, tokens, heads});
  in.a_log = b.normal_around(2, DType::f32, {heads}, 0.5);  // gates as at the start of a training
  in.dt_bias = b.normal_around(-4, DType::f32, {heads, head_dim}, 0.5);
  in.start = b.integers({1, tokens}, 1);
  in.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(head_dim)));
  const Tensor o = b.empty(model, rows), d_o = b.normal(model, rows);
  // FLOP a token and head: 182,000 forward, 475,000 backward with recomputation (chunks of 64 tokens).
  const auto pairs = static_cast<double>(tokens * heads);
  const std::string shape = std::to_string(tokens) + " tokens";
  b.measure("kda_forward", shape, bytes_of({in.q, in.k, in.v, in.f, in.b, o}), 182e3 * pairs,
            [&] { kernels::kda_forward(s, in, Tensor(), Tensor(), o, Tensor(), b.workspace()); });
  kernels::KdaGradients g;
  g.dq = b.empty(model, rows);
  g.dk = b.empty(model, rows);
  g.dv = b.empty(model, rows);
  g.df = b.empty(model, rows);
  g.db = b.empty(model, {1, tokens, heads});
  g.da_log = b.normal(DType::f32, {heads});
  g.ddt_bias = b.normal(DType::f32, {heads, head_dim});
  b.measure("kda_backward", shape, bytes_of({in.q, in.k, in.v, in.f, in.b, d_o, g.dq, g.dk, g.dv, g.df, g.db}),
            475e3 * pairs,
            [&] { kernels::kda_backward(s, in, Tensor(), Tensor(), d_o, Tensor(), g, Tensor(), b.workspace()); });
}

}  // namespace

void measure_compute_bound(Bench& b, std::int64_t tokens) {
  linear(b, "up", tokens, hidden, intermediate);
  linear(b, "down", tokens, intermediate, hidden);
  linear(b, "q", tokens, hidden, hidden);
  linear(b, "k", tokens, hidden, kv_heads * head_dim);
  linear(b, "gate inner", tokens, hidden, head_dim);
  linear(b, "gate", tokens, head_dim, hidden);
  linear(b, "beta", tokens, hidden, heads);
  linear(b, "head", std::min(tokens, loss_rows), hidden, vocabulary,
         kernels::linear_row(b.stream(), model, vocabulary));
  attention(b, tokens, false);
  attention(b, tokens, true);
  kda(b, tokens);
}

}  // namespace deltapipe::bench
