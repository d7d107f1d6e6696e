#include "model/inference.h"

#include "core/device_memory.h"
#include "core/error.h"
#include "core/host_staging.h"
#include "kernels/elementwise.h"

namespace deltapipe {

void final_hidden_states(const Context& c, const Transformer& model, const TokenBatch& batch, const Tensor& x) {
  const auto scope = c.workspace.scope();
  const Tensor rstd = c.workspace.allocate(accumulation_dtype(x.dtype), {x.dim(0)}, "final norm rstd");
  model.embed(c, batch, x);
  model.run_blocks(c, batch, x, [](std::int64_t, const Tensor&) {});
  model.final_norm(c, x, x, rstd);
}

HostLogits::HostLogits(const Stream& stream, const Tensor& logits) {
  const DType dtype = accumulation_dtype(logits.dtype);
  memory_.resize(static_cast<std::size_t>(logits.numel()) * size_of(dtype));
  tensor_ = Tensor(memory_.data(), dtype, logits.shape);
  HostStaging staging;
  kernels::copy_cast(Stream::cpu(), staging.read(stream, logits), tensor_);
}

std::vector<std::int64_t> argmax_rows(const Stream& stream, const Tensor& logits_there) {
  const HostLogits here(stream, logits_there);
  const Tensor& logits = here.tensor();
  std::vector<std::int64_t> best(static_cast<std::size_t>(logits.dim(0)));
  const auto find = [&]<class T>(const T* z) {
    const std::int64_t n = logits.dim(1);
    for (std::size_t r = 0; r < best.size(); ++r) {
      const T* row = z + static_cast<std::int64_t>(r) * n;
      best[r] = std::max_element(row, row + n) - row;
    }
  };
  if (logits.dtype == DType::f64) {
    find(logits.as<double>());
  } else {
    find(logits.as<float>());
  }
  return best;
}

PromptBatch::PromptBatch(std::span<const std::int64_t> tokens, std::int64_t vocabulary) {
  if (tokens.empty()) fail<UsageError>("no tokens given");
  for (const std::int64_t t : tokens) {
    if (t < 0 || t >= vocabulary) {
      fail<FormatError>("token {} at position {} is outside the vocabulary of {}", t, tokens_.size(), vocabulary);
    }
    positions_.push_back(static_cast<std::int32_t>(tokens_.size()));
    tokens_.push_back(static_cast<std::int32_t>(t));
  }
  labels_.assign(tokens_.size(), -1);
  start_.assign(tokens_.size(), 0);
}

TokenBatch PromptBatch::batch(const Context& c) const {
  const auto n = static_cast<std::int64_t>(tokens_.size());
  const auto tensor = [](const std::vector<std::int32_t>& v, Shape shape) {
    return Tensor(const_cast<std::int32_t*>(v.data()), DType::i32, shape);
  };
  TokenBatch batch{1,
                   n,
                   tensor(tokens_, {n}),
                   tensor(labels_, {n}),
                   tensor(start_, {1, n}),
                   tensor(positions_, {n}),
                   tensor(start_, {1, n})};
  if (c.stream.device().is_cpu()) return batch;
  for (Tensor* t : {&batch.tokens, &batch.labels, &batch.start, &batch.positions}) {
    const Tensor there = c.workspace.allocate(DType::i32, t->shape, "prompt");
    copy(c.stream, *t, there);
    *t = there;
  }
  return batch;
}

std::vector<std::int64_t> generate_greedily(const Context& c, const Transformer& model,
                                            std::span<const std::int64_t> prompt, std::int64_t count) {
  std::vector<std::int64_t> text(prompt.begin(), prompt.end());
  for (std::int64_t i = 0; i < count; ++i) {
    const PromptBatch input(text, model.spec().vocabulary);
    const auto scope = c.workspace.scope();
    const auto n = static_cast<std::int64_t>(text.size());
    const Tensor x = c.workspace.allocate(model.dtype(), {n, model.spec().hidden}, "hidden state");
    const Tensor logits = c.workspace.allocate(model.dtype(), {1, model.spec().vocabulary}, "logits");
    final_hidden_states(c, model, input.batch(c), x);
    model.head().forward(c, x.rows(n - 1, n), logits);
    text.push_back(c.stream.is_dry() ? 0 : argmax_rows(c.stream, logits)[0]);
  }
  return {text.end() - count, text.end()};
}

}  // namespace deltapipe
