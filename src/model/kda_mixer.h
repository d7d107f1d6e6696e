// Kimi Delta Attention as a token mixer: projections, short convolutions, the KDA operation with its gate and norms,
// gated output norm, output projection. Source: Kimi Linear (2025) and flash-linear-attention's KimiDeltaAttention.
#pragma once

#include "core/token_batch.h"
#include "kernels/kda.h"
#include "model/context.h"
#include "model/linear.h"
#include "model/parameters.h"
#include "model/spec.h"

#include <array>
#include <string>

namespace deltapipe {

class KdaMixer {
 public:
  /// Kept from forward to backward; W = heads * head_dim, R = gate rank. Order of q, k, v in the arrays.
  struct Saved {
    std::array<Tensor, 3> projected;  // [T, W] before the convolution
    std::array<Tensor, 3> convolved;  // [T, W] after convolution and SiLU
    Tensor f_inner, f;                // [T, R], [T, W]: decay gate
    Tensor g_inner, g;                // [T, R], [T, W]: output gate
    Tensor b;                         // [T, H]: beta logits
    Tensor o;                         // [T, W]: output of the KDA operation
    Tensor normed;                    // [T, W]: after the gated norm
    Tensor rstd;                      // [T, H]
    // Under sequence parallelism: rows before each segment, the segments' maps, the states that enter them.
    std::array<Tensor, 3> halo;  // [S, conv_width - 1, W]
    Tensor map;                  // [S, H, head_dim, head_dim], accumulation dtype
    Tensor state_in;             // [S, H, head_dim, head_dim], accumulation dtype
  };

  /// `prefix` ends in "self_attn.".
  KdaMixer(const ModelSpec& spec, ParameterTable& parameters, const std::string& prefix);

  void forward(const Context& c, const TokenBatch& batch, const Tensor& h, const Tensor& out, Saved& saved,
               Arena& keep) const;
  void backward(const Context& c, const TokenBatch& batch, const Tensor& d_out, const Tensor& h, const Saved& saved,
                const Tensor& dh) const;

 private:
  kernels::KdaInputs inputs(const TokenBatch& batch, const Saved& saved) const;
  Tensor convolution_weight(int i) const;

  KdaSpec spec_;
  float norm_eps_;
  std::array<Linear, 3> projections_;
  std::array<Parameter*, 3> convolutions_;
  Linear f_inner_, f_, g_inner_, g_, b_, o_;
  Parameter *a_log_, *dt_bias_, *o_norm_;
};

}  // namespace deltapipe
