// What layers cost, estimated from their sizes: for partitions and simulated schedules before anything has run. Only
// the ratios matter to either; seconds are those of a device of the given speed.
#pragma once

#include "model/spec.h"
#include "pipeline/cost_model.h"
#include "pipeline/partition.h"

#include <cstdint>
#include <functional>
#include <vector>

namespace deltapipe::pipeline {

struct WorkOfMicrobatch {
  std::int64_t tokens = 0;           // of this rank: its share of the microbatch's sequences
  std::int64_t sequence_length = 0;  // whole sequences, for attention
  bool recompute = false;            // the backward runs the forward again
  bool trains_head_losses = true;    // the last stage has both heads
};

struct Speed {
  double flops = 500e12;    // a second, dense matrix products
  double bandwidth = 3e12;  // bytes a second, of memory-bound work
};

/// Costs of layers (teacher and student together), embedding and heads. Matrix products: 2 FLOP a weight and token in
/// forward, twice that in backward. Causal attention: 2 heads head_dim FLOP a token and visible key in forward, 2.5
/// times that in backward. KDA beside its projections is bound by memory traffic: the state-passing kernels move about
/// 40 bytes a token and channel in forward, three times that in backward.
struct ModelCosts {
  std::vector<StageCost> layers;
  StageCost embedding, head;
};
ModelCosts estimate_costs(const ModelSpec& student, const ModelSpec* teacher, const WorkOfMicrobatch& work,
                          const Speed& speed = {});

/// FLOP a token that a training step cannot do without: forward of both models, and the student's backward, of which
/// the weights' part counts for what `trained` selects. Recomputation does not count; the MFU of a step is these, times
/// its tokens, over its seconds and the device's peak. Matrix products 2 a weight (twice that in backward), causal
/// attention 4 heads head_dim times half the length (twice in backward), KDA 182,000 a head of 128 channels in forward
/// (chunks of 64 tokens), twice that in backward. `teacher` may be null.
double model_flops_per_token(const ModelSpec& student, const ModelSpec* teacher, std::int64_t sequence_length,
                             const std::function<bool(const ParameterSpec&)>& trained);
/// Dense bfloat16 peak of an H100 SXM, FLOP a second: what MFU is of.
inline constexpr double h100_peak_flops = 989e12;

/// For partition_layers: seconds of teacher and student, forward and backward.
LayerCosts to_layer_costs(const ModelCosts& costs);

}  // namespace deltapipe::pipeline
