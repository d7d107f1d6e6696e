// Every operation that is bound by memory, in the shapes of AFM-4.5B and its KDA student, bfloat16.
#include "kernels/activation.h"
#include "kernels/adamw.h"
#include "kernels/distill_loss.h"
#include "kernels/elementwise.h"
#include "kernels/embedding.h"
#include "kernels/gated_rms_norm.h"
#include "kernels/hidden_loss.h"
#include "kernels/linear.h"
#include "kernels/reduce.h"
#include "kernels/rms_norm.h"
#include "kernels/rope.h"
#include "kernels/short_conv.h"
#include "tools/bench/kernels/bench.h"

#include <array>
#include <cmath>
#include <span>
#include <string>

namespace deltapipe::bench {
namespace {

constexpr std::int64_t hidden = 2560, heads = 20, head_dim = 128, intermediate = 18432, vocabulary = 128004;
constexpr std::int64_t loss_rows = 2048;  // tokens of a logits block
constexpr DType model = DType::bf16;

double bytes_of(std::initializer_list<Tensor> tensors) {
  double sum = 0;
  for (const Tensor& t : tensors) sum += static_cast<double>(t.bytes());
  return sum;
}

void elementwise(Bench& b, std::int64_t tokens) {
  const auto scope = b.scope();
  const Stream& s = b.stream();
  const Tensor x = b.normal(model, {tokens, hidden}), y = b.normal(model, {tokens, hidden});
  b.measure("add", x.shape.str(), bytes_of({x, y, y}), 0, [&] { kernels::add(s, x, y, y); });
  const Tensor f = b.normal(DType::f32, {tokens, hidden});
  b.measure("copy_cast to float32", x.shape.str(), bytes_of({x, f}), 0, [&] { kernels::copy_cast(s, x, f); });
  b.measure("copy_cast to bfloat16", x.shape.str(), bytes_of({x, f}), 0, [&] { kernels::copy_cast(s, f, x); });
  b.measure("copy_cast same type", x.shape.str(), bytes_of({x, y}), 0, [&] { kernels::copy_cast(s, x, y); });
  b.measure("scale_in_place", f.shape.str(), bytes_of({f, f}), 0, [&] { kernels::scale_in_place(s, 1.0, f); });
}

void activations(Bench& b, std::int64_t tokens) {
  const auto scope = b.scope();
  const Stream& s = b.stream();
  const Shape shape{tokens, intermediate};
  const Tensor x = b.normal(model, shape), y = b.empty(model, shape), dy = b.normal(model, shape);
  b.measure("squared_relu_forward", shape.str(), bytes_of({x, y}), 0, [&] { kernels::squared_relu_forward(s, x, y); });
  b.measure("squared_relu_backward", shape.str(), bytes_of({dy, x, y}), 0,
            [&] { kernels::squared_relu_backward(s, dy, x, y); });
  b.measure("gated_silu_forward", shape.str(), bytes_of({x, dy, y}), 0,
            [&] { kernels::gated_silu_forward(s, x, dy, y); });
  const Tensor up = b.normal(model, shape), dup = b.empty(model, shape);
  b.measure("gated_silu_backward", shape.str(), bytes_of({dy, x, up, y, dup}), 0,
            [&] { kernels::gated_silu_backward(s, dy, x, up, y, dup); });
}

void norms(Bench& b, std::int64_t tokens) {
  const auto scope = b.scope();
  const Stream& s = b.stream();
  const Tensor x = b.normal(model, {tokens, hidden}), w = b.normal(model, {hidden}), dy = b.normal(model, x.shape);
  const Tensor y = b.empty(model, x.shape), dx = b.normal(model, x.shape), rstd = b.empty(DType::f32, {tokens});
  const Tensor dw = b.normal(DType::f32, {hidden});
  b.measure("rms_norm_forward", x.shape.str(), bytes_of({x, y}), 0,
            [&] { kernels::rms_norm_forward(s, x, w, 1e-5f, y, rstd); });
  kernels::rms_norm_forward(s, x, w, 1e-5f, y, rstd);
  b.measure("rms_norm_backward", x.shape.str(), bytes_of({dy, x, dx}), 0,
            [&] { kernels::rms_norm_backward(s, dy, x, w, rstd, Tensor(), dx, dw, b.workspace()); });
  b.measure("rms_norm_backward +=", x.shape.str(), bytes_of({dy, x, dx, dx}), 0,
            [&] { kernels::rms_norm_backward(s, dy, x, w, rstd, dx, dx, dw, b.workspace()); });
  {
    const auto inner = b.scope();
    const Tensor h = b.normal(model, x.shape), sum = b.empty(model, x.shape);
    b.measure("add_rms_norm_forward", x.shape.str(), bytes_of({x, h, sum, y}), 0,
              [&] { kernels::add_rms_norm_forward(s, x, h, w, 1e-5f, sum, y, rstd); });
    b.measure("rms_norm_backward + residual", x.shape.str(), bytes_of({dy, x, h, dx}), 0,
              [&] { kernels::rms_norm_backward(s, dy, x, w, rstd, h, dx, dw, b.workspace()); });
  }

  const Shape by_head{tokens, heads, head_dim};
  const Tensor hx = x.view(by_head), hdy = dy.view(by_head), hy = y.view(by_head), hdx = dx.view(by_head);
  const Tensor gate = b.normal(model, by_head), dgate = b.empty(model, by_head), hw = b.normal(model, {head_dim});
  const Tensor hr = b.empty(DType::f32, {tokens, heads}), hdw = b.normal(DType::f32, {head_dim});
  b.measure("gated_rms_norm_forward", by_head.str(), bytes_of({hx, gate, hy, hr}), 0,
            [&] { kernels::gated_rms_norm_forward(s, hx, gate, hw, 1e-5f, hy, hr); });
  kernels::gated_rms_norm_forward(s, hx, gate, hw, 1e-5f, hy, hr);
  b.measure("gated_rms_norm_backward", by_head.str(), bytes_of({hdy, hx, gate, hr, hdx, dgate}), 0,
            [&] { kernels::gated_rms_norm_backward(s, hdy, hx, gate, hw, hr, hdx, dgate, hdw, b.workspace()); });
}

void tokens_and_positions(Bench& b, std::int64_t tokens) {
  const auto scope = b.scope();
  const Stream& s = b.stream();
  const Tensor ids = b.integers({tokens}, vocabulary), table = b.normal(model, {vocabulary, hidden});
  const Tensor x = b.normal(model, {tokens, hidden}), dtable = b.normal(DType::f32, {vocabulary, hidden});
  b.measure("embedding_forward", x.shape.str(), bytes_of({x, x}), 0,
            [&] { kernels::embedding_forward(s, ids, table, x); });
  // The rows of the table that are read and written: of uniformly drawn tokens, most are different.
  const double rows =
      static_cast<double>(vocabulary) * (1 - std::exp(-static_cast<double>(tokens) / static_cast<double>(vocabulary)));
  b.measure("embedding_backward", x.shape.str(), bytes_of({x}) + rows * hidden * 8, 0,
            [&] { kernels::embedding_backward(s, x, ids, dtable); });
  // Few different tokens, so that a block adds many rows, as of frequent words.
  const Tensor few = b.integers({tokens}, 64);
  b.measure("embedding_backward", x.shape.str() + ", 64 tokens", bytes_of({x}) + 64.0 * hidden * 8, 0,
            [&] { kernels::embedding_backward(s, x, few, dtable); });
  const Tensor q = x.view({tokens, heads, head_dim}), frequencies = b.normal(DType::f32, {head_dim / 2});
  const Tensor positions = b.integers({tokens}, tokens);
  b.measure("rope_forward", q.shape.str(), bytes_of({q, q}), 0,
            [&] { kernels::rope_forward(s, q, positions, frequencies, 1.3f, q); });
}

void convolutions(Bench& b, std::int64_t tokens) {
  const auto scope = b.scope();
  const Stream& s = b.stream();
  const Shape shape{1, tokens, hidden};
  const Tensor start = b.integers({1, tokens}, 1);
  std::array<kernels::ShortConv, 3> forward;  // of q, k and v
  std::array<kernels::ShortConvGradient, 3> backward;
  for (std::size_t i = 0; i < 3; ++i) {
    const Tensor x = b.normal(model, shape), w = b.normal(model, {hidden, 4}), y = b.empty(model, shape);
    forward[i] = {.x = x, .w = w, .halo = {}, .y = y};
    backward[i] = {.dy = b.normal(model, shape),
                   .x = x,
                   .w = w,
                   .halo = {},
                   .dx = y,
                   .dw = b.normal(DType::f32, {hidden, 4}),
                   .dhalo = {}};
  }
  const double bytes = bytes_of({forward[0].x});
  for (const std::size_t n : {1, 3}) {
    const std::string shapes = shape.str() + (n == 1 ? "" : " of q, k and v");
    b.measure("short_conv_forward", shapes, 2 * bytes * static_cast<double>(n), 0,
              [&] { kernels::short_conv_forward(s, std::span(forward).first(n), start); });
    b.measure("short_conv_backward", shapes, 3 * bytes * static_cast<double>(n), 0,
              [&] { kernels::short_conv_backward(s, std::span(backward).first(n), start, b.workspace()); });
  }
}

void losses(Bench& b, std::int64_t tokens) {
  const auto scope = b.scope();
  const Stream& s = b.stream();
  const Tensor sums = b.empty(DType::f64, {kernels::LossSum::count});
  kernels::fill_zero(s, sums);
  {
    const auto inner = b.scope();
    const Tensor x = b.normal(model, {tokens, hidden}), t = b.normal(model, x.shape, 1.1);
    const Tensor dx = b.normal(model, x.shape), labels = b.integers({tokens}, vocabulary);
    const auto run = [&](const Tensor& gradient) {
      kernels::hidden_loss(s, x, t, labels, 1e-5, 0, gradient, sums.rows(0, 2), b.workspace());
    };
    b.measure("hidden_loss", x.shape.str(), bytes_of({x, t, dx, dx}), 0, [&] { run(dx); });
    b.measure("hidden_loss, no gradient", x.shape.str(), bytes_of({x, t}), 0, [&] { run(Tensor()); });
  }
  const Tensor labels = b.integers({loss_rows}, vocabulary);
  const Tensor zs = b.normal(model, {loss_rows, kernels::linear_row(s, model, vocabulary)}, 3),
               zt = b.normal(model, zs.shape, 3);
  const auto run = [&](const kernels::DistillWeights& w, const Tensor& teacher, bool gradient) {
    kernels::distill_loss(s, w, zs, teacher, labels, 1e-5, gradient, sums, b.workspace(), vocabulary);
  };
  const kernels::DistillWeights recipe{.ce = 0.2f, .kl = 0.2f, .temperature = 2};
  kernels::DistillWeights other = recipe, all = recipe;
  other.temperature = 1.5f;
  all.reverse_kl = all.jsd = all.tvd = 0.1f;
  // The gradient takes the place of the student's logits: every call gets them anew.
  const Tensor logits = b.empty(model, zs.shape);
  kernels::copy_cast(s, zs, logits);
  const auto renew = [&] { kernels::copy_cast(s, logits, zs); };
  b.measure(
      "distill_loss, T 2", zs.shape.str(), bytes_of({zs, zt, zs}), 0, [&] { run(recipe, zt, true); }, renew);
  b.measure(
      "distill_loss, T 1.5", zs.shape.str(), bytes_of({zs, zt, zs}), 0, [&] { run(other, zt, true); }, renew);
  b.measure(
      "distill_loss, all losses", zs.shape.str(), bytes_of({zs, zt, zs}), 0, [&] { run(all, zt, true); }, renew);
  b.measure("distill_loss, no gradient", zs.shape.str(), bytes_of({zs, zt}), 0, [&] { run(recipe, zt, false); });
  b.measure(
      "distill_loss, no teacher", zs.shape.str(), bytes_of({zs, zs}), 0, [&] { run({.ce = 1}, Tensor(), true); },
      renew);
}

void optimizer(Bench& b) {
  const auto scope = b.scope();
  const Stream& s = b.stream();
  const Shape shape{intermediate * hidden};
  const Tensor w = b.normal(DType::f32, shape), g = b.normal(DType::f32, shape), m = b.normal(DType::f32, shape, 0.1);
  const Tensor v = b.empty(DType::f32, shape), param = b.empty(model, shape), out = b.empty(DType::f64, {1});
  kernels::fill_zero(s, v);
  kernels::fill_zero(s, out);
  b.measure("adamw", shape.str(), bytes_of({w, w, m, m, v, v, g, param}), 0,
            [&] { kernels::adamw(s, {.learning_rate = 1e-5}, w, g, m, v, param); });
  const Tensor bm = b.normal(model, shape, 0.1), bv = b.empty(model, shape);
  kernels::fill_zero(s, bv);
  b.measure("adamw_bfloat16", shape.str(), bytes_of({param, param, bm, bm, bv, bv, g}), 0,
            [&] { kernels::adamw_bfloat16(s, {.learning_rate = 1e-5}, {.seed = 1}, param, g, bm, bv); });
  b.measure("sum_of_squares", shape.str(), bytes_of({g}), 0,
            [&] { kernels::sum_of_squares(s, g, out, b.workspace()); });
  const Tensor small = g.rows(0, hidden);
  b.measure("sum_of_squares", small.shape.str(), bytes_of({small}), 0,
            [&] { kernels::sum_of_squares(s, small, out, b.workspace()); });
}

}  // namespace

void measure_memory_bound(Bench& bench, std::int64_t tokens) {
  elementwise(bench, tokens);
  activations(bench, tokens);
  norms(bench, tokens);
  tokens_and_positions(bench, tokens);
  convolutions(bench, tokens);
  losses(bench, tokens);
  optimizer(bench);
}

}  // namespace deltapipe::bench
