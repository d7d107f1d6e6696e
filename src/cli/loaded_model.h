// A model in memory for inference, with arenas sized by a dry run of the work it is loaded for.
#pragma once

#include "distill/model_set.h"
#include "train/weight_source.h"

#include <functional>
#include <memory>

namespace deltapipe {

/// Loads the student (and teacher, when given) and calls `work` on it, after a dry call that finds every size.
/// `work` must allocate the same whether the context's stream is dry or not.
using ModelWork = std::function<void(const Context& context, ModelSet& models, ArenaSet& arenas)>;
void with_models(WeightSource& student, WeightSource* teacher, DType dtype, const ModelWork& work);

/// float32, or float64 when `name` says so. Throws UsageError for other words.
DType inference_dtype(const std::string& name);

}  // namespace deltapipe
