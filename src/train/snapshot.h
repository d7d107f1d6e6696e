// Between a student in memory and a training checkpoint.
#pragma once

#include "checkpoints/training_checkpoint.h"
#include "core/stream.h"
#include "model/parameters.h"
#include "train/optimizer.h"

#include <functional>
#include <vector>

namespace deltapipe {

/// Groups "master", "exp_avg" and "exp_avg_sq" for parameters that are ever trained, "frozen" for the others. The
/// slices point into the tables. Of several ranks each element is written once: `owns` leaves out parameters that
/// another rank of the pipeline writes, and frozen ones are written where `writes_frozen`.
std::vector<TensorSlice> snapshot_slices(const ParameterTable& parameters, const Optimizer& optimizer,
                                         const std::function<bool(const ParameterSpec&)>& owns, bool writes_frozen);

/// Reads all of it back, the number of updates included; of trained weights this rank's shard alone. `stream` is of the
/// parameters' device. Throws FormatError when the checkpoint lacks a tensor or has it in another shape or dtype.
void restore_snapshot(CheckpointReader& reader, ParameterTable& parameters, Optimizer& optimizer, const Stream& stream);

/// The student's weights alone, from either group, converted to the parameters' dtypes.
void load_checkpoint_weights(CheckpointReader& reader, ParameterTable& parameters, const Stream& stream);

}  // namespace deltapipe
