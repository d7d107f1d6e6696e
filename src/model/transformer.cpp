#include "model/transformer.h"

#include "core/host_staging.h"
#include "kernels/embedding.h"
#include "kernels/rms_norm.h"
#include "model/rope.h"

namespace deltapipe {
namespace {

RotaryTable make_rotary_table(const ModelSpec& spec, DType dtype, Arena& constants, const Stream& stream) {
  RotaryTable table;
  if (!spec.has(Mixer::rope)) return table;
  const std::vector<double> frequencies = rope_inverse_frequencies(spec.rope, spec.head_dim);
  table.inverse_frequencies =
      constants.allocate(accumulation_dtype(dtype), {spec.head_dim / 2}, "rotary inverse frequencies");
  table.attention_factor = static_cast<float>(rope_attention_factor(spec.rope));
  if (stream.is_dry()) return table;
  HostStaging().write(stream, table.inverse_frequencies, [&](const Tensor& host) {
    for (std::size_t i = 0; i < frequencies.size(); ++i) {
      if (host.dtype == DType::f64) {
        host.as<double>()[i] = frequencies[i];
      } else {
        host.as<float>()[i] = static_cast<float>(frequencies[i]);
      }
    }
  });
  return table;
}

}  // namespace

Transformer::Transformer(const ModelSpec& spec, const LayerRange& range, ParameterTable& parameters, Arena& constants,
                         const Stream& stream)
    : spec_(spec),
      range_(range),
      dtype_(parameters.dtype()),
      rotary_(make_rotary_table(spec, parameters.dtype(), constants, stream)) {
  if (has_embedding()) embedding_ = &parameters.at("model.embed_tokens.weight");
  if (has_head()) {
    norm_ = &parameters.at("model.norm.weight");
    head_ = Linear(parameters.at(spec.tied_embeddings ? "model.embed_tokens.weight" : "lm_head.weight"));
  }
  blocks_.reserve(static_cast<std::size_t>(range.size()));
  for (std::int64_t l = range.first; l < range.last; ++l) blocks_.emplace_back(spec_, parameters, l, &rotary_);
}

void Transformer::embed(const Context& c, const TokenBatch& batch, const Tensor& x) const {
  require(has_embedding(), "Transformer::embed: these layers have no embedding");
  kernels::embedding_forward(c.stream, batch.tokens, embedding_->value, x);
}

void Transformer::embed_backward(const Context& c, const TokenBatch& batch, const Tensor& dx) const {
  if (const Tensor dw = embedding_->gradient()) kernels::embedding_backward(c.stream, dx, batch.tokens, dw);
}

void Transformer::final_norm(const Context& c, const Tensor& x, const Tensor& y, const Tensor& rstd) const {
  require(has_head(), "Transformer::final_norm: these layers have no final norm");
  kernels::rms_norm_forward(c.stream, x, norm_->value, static_cast<float>(spec_.norm_eps), y, rstd);
}

void Transformer::final_norm_backward(const Context& c, const Tensor& dy, const Tensor& x, const Tensor& rstd,
                                      const Tensor& dx) const {
  kernels::rms_norm_backward(c.stream, dy, x, norm_->value, rstd, Tensor(), dx, norm_->gradient(), c.workspace);
}

}  // namespace deltapipe
