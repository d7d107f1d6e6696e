#include "train/lr_schedule.h"

#include "core/error.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace deltapipe {

double learning_rate(LrKind kind, std::int64_t step, std::int64_t total_steps, double warmup_fraction, double peak,
                     double final_rate) {
  require(step >= 0, "learning_rate: step is negative");
  require(total_steps >= 1, "learning_rate: total_steps is below 1");
  require(warmup_fraction >= 0 && warmup_fraction <= 1, "learning_rate: warmup_fraction is not in [0, 1]");
  const std::int64_t last = total_steps - 1;
  step = std::min(step, last);
  const std::int64_t warmup = std::llround(warmup_fraction * static_cast<double>(total_steps));
  if (step < warmup) return peak * (static_cast<double>(step + 1) / static_cast<double>(warmup));
  const std::int64_t top = std::max<std::int64_t>(warmup - 1, 0);  // the step that has the peak
  if (kind == LrKind::constant || step == top) return peak;
  if (step == last) return final_rate;  // without the rounding of the formulas below
  const double x = static_cast<double>(step - top) / static_cast<double>(last - top);
  if (kind == LrKind::linear) return peak + (final_rate - peak) * x;
  return final_rate + (peak - final_rate) * 0.5 * (1 + std::cos(std::numbers::pi * x));
}

}  // namespace deltapipe
