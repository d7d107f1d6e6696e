// Weights for measurements: random ones, quickly.
#pragma once

#include "core/stream.h"
#include "model/parameters.h"

namespace deltapipe::bench {

/// Matrices from N(0, 0.02), out of one block of 1,048,573 numbers (a prime: rows do not repeat) laid end to end from a
/// place that depends on the name; everything else (norms, gates, convolutions) as a student's first weights. The same
/// on every rank.
void fill_randomly(ParameterTable& parameters, const Stream& stream);

}  // namespace deltapipe::bench
