// Between a student in memory and a training checkpoint.
#pragma once

#include "checkpoints/training_checkpoint.h"
#include "model/parameters.h"
#include "train/optimizer.h"

#include <vector>

namespace deltapipe {

/// Groups "master", "exp_avg" and "exp_avg_sq" for parameters that are ever trained, "frozen" for the others. The
/// slices point into the tables.
std::vector<TensorSlice> snapshot_slices(const ParameterTable& parameters, const Optimizer& optimizer);

/// Reads all of it back, the number of updates included. Throws FormatError when the checkpoint lacks a tensor or has
/// it in another shape.
void restore_snapshot(CheckpointReader& reader, ParameterTable& parameters, Optimizer& optimizer);

/// The student's weights alone, from either group, converted to the parameters' dtypes.
void load_checkpoint_weights(CheckpointReader& reader, ParameterTable& parameters);

}  // namespace deltapipe
