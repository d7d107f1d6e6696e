// One transformer block: x + mixer(norm(x)), then that plus mlp(norm(that)).
#pragma once

#include "core/token_batch.h"
#include "model/attention.h"
#include "model/context.h"
#include "model/kda_mixer.h"
#include "model/mlp.h"
#include "model/parameters.h"
#include "model/spec.h"

#include <optional>

namespace deltapipe {

class Block {
 public:
  /// Kept from forward to backward beside the block's input.
  struct Saved {
    Tensor mixer_in, mixer_rstd;  // norm(x) [T, D], [T]
    Attention::Saved attention;   // whichever of the two the layer has
    KdaMixer::Saved kda;
    Tensor middle;            // x + mixer(norm(x)) [T, D]
    Tensor mlp_in, mlp_rstd;  // norm(middle)
    MlpLayer::Saved mlp;
  };

  Block(const ModelSpec& spec, ParameterTable& parameters, std::int64_t layer, const RotaryTable* rotary);

  /// x [T, D] -> y [T, D]; y may alias x when no backward follows. `saved` comes from `keep`. `mixer_out` [T, D], when
  /// given, receives mixer(norm(x)).
  void forward(const Context& c, const TokenBatch& batch, const Tensor& x, const Tensor& y, Saved& saved, Arena& keep,
               const Tensor& mixer_out = {}) const;
  /// dx [T, D] from dy [T, D]; dx may alias dy. Weight gradients are added.
  void backward(const Context& c, const TokenBatch& batch, const Tensor& dy, const Tensor& x, const Saved& saved,
                const Tensor& dx) const;
  /// The same from x alone: runs forward again in the workspace.
  void backward_recomputing(const Context& c, const TokenBatch& batch, const Tensor& dy, const Tensor& x,
                            const Tensor& dx) const;

  /// The mixer by itself, for alignment with the teacher: out = mixer(norm(x)).
  void mixer_forward(const Context& c, const TokenBatch& batch, const Tensor& x, const Tensor& out, Saved& saved,
                     Arena& keep) const;
  /// Adds the gradients of the mixer's weights (and its norm's); the gradient of x is not wanted.
  void mixer_backward(const Context& c, const TokenBatch& batch, const Tensor& d_out, const Tensor& x,
                      const Saved& saved) const;

 private:
  void run_mixer_backward(const Context& c, const TokenBatch& batch, const Tensor& d_out, const Saved& saved,
                          const Tensor& dh) const;

  float eps_;
  Parameter *mixer_norm_, *mlp_norm_;
  std::optional<Attention> attention_;
  std::optional<KdaMixer> kda_;
  MlpLayer mlp_;
};

}  // namespace deltapipe
