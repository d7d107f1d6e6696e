// Tiny models in memory for evaluations, by the same two runs as in the program: a dry one that measures, a real one.
#pragma once

#include "distill/model_set.h"
#include "tests/distill/tiny.h"

#include <functional>

namespace deltapipe::testing {

using ModelWork = std::function<void(const Context&, ModelSet&, ArenaSet&)>;

/// `fill` sets the weights between the two calls of `work`.
inline void with_tiny_models(const ModelSpec& student, const ModelSpec* teacher, DType dtype,
                             const std::function<void(ModelSet&)>& fill, const ModelWork& work) {
  ArenaSet measured = ArenaSet::measuring(Device());
  {
    const Stream dry = Stream::dry(Device());
    ModelSet models(student, teacher, dtype, measured, dry);
    work({dry, measured.workspace}, models, measured);
  }
  ArenaSet arenas = measured.reserve();
  ModelSet models(student, teacher, dtype, arenas, Stream::cpu());
  fill(models);
  work({Stream::cpu(), arenas.workspace}, models, arenas);
}

}  // namespace deltapipe::testing
