// Learning-rate schedules: a pure function of the step.
#pragma once

#include <cstdint>

namespace deltapipe {

enum class LrKind : std::uint8_t { constant, cosine, linear };

/// Learning rate of `step` (from 0) of a stage of `total_steps`.
/// Warm-up: W = round(warmup_fraction * total_steps) steps rise linearly from peak / W to peak (so never from 0), which
/// step W - 1 has (step 0 where W = 0). Every later step decays from there, and the last one has `final_rate`:
///   cosine: final + (peak - final) (1 + cos(pi x)) / 2    linear: peak + (final - peak) x    constant: peak
/// with x in (0, 1] the fraction of the decay done. Where no step is left to decay (one step in all, warm-up to the
/// end), the last step has the peak. Steps past the end keep the last step's rate.
/// Throws InternalError for step < 0, total_steps < 1 or a fraction outside [0, 1].
double learning_rate(LrKind kind, std::int64_t step, std::int64_t total_steps, double warmup_fraction, double peak,
                     double final_rate);

}  // namespace deltapipe
