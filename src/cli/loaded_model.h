// A model in memory for inference, with arenas sized by a dry run of the work it is loaded for.
#pragma once

#include "core/config.h"
#include "distill/model_set.h"
#include "train/weight_source.h"

#include <CLI/CLI.hpp>

#include <functional>
#include <memory>
#include <string>

namespace deltapipe {

/// Where and in what a model is computed.
struct Computation {
  Device device;
  DType dtype = DType::f32;
};

/// Loads the student (and teacher, when given) and calls `work` on it, after a dry call that finds every size.
/// `work` must allocate the same whether the context's stream is dry or not.
using ModelWork = std::function<void(const Context& context, ModelSet& models, ArenaSet& arenas)>;
void with_models(WeightSource& student, WeightSource* teacher, const Computation& how, const ModelWork& work);

/// --device and --dtype of the commands that read a model: cpu with float32 (default) or float64, cuda with bfloat16.
struct ComputationOptions {
  std::string device, dtype;  // empty: the default

  void add_to(CLI::App& command);
  /// `configured` stands where --device is not given: on a machine without CUDA that is the CPU, whatever it says.
  /// Throws UsageError.
  Computation choose(DeviceChoice configured = DeviceChoice::cpu) const;
};

}  // namespace deltapipe
