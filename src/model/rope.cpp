#include "model/rope.h"

#include "core/error.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace deltapipe {

std::vector<double> rope_inverse_frequencies(const RopeSpec& spec, std::int64_t head_dim) {
  require(head_dim > 0 && head_dim % 2 == 0, "rope_inverse_frequencies: the head size is not positive and even");
  const auto d = static_cast<double>(head_dim);
  std::vector<double> frequencies(static_cast<std::size_t>(head_dim / 2));
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    frequencies[i] = std::pow(spec.theta, -2.0 * static_cast<double>(i) / d);
  }
  if (!spec.is_yarn()) return frequencies;

  // The channel, as a real number, that turns `turns` times over the original length.
  const auto channel_of = [&](double turns) {
    const double wavelength = static_cast<double>(spec.original_max_positions) / turns;
    return d * std::log(wavelength / (2 * std::numbers::pi)) / (2 * std::log(spec.theta));
  };
  const double low = std::max(std::floor(channel_of(spec.beta_fast)), 0.0);
  const double high = std::min(std::ceil(channel_of(spec.beta_slow)), d - 1);
  const double width = high == low ? 0.001 : high - low;  // a step instead of a division by zero
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    const double ramp = std::clamp((static_cast<double>(i) - low) / width, 0.0, 1.0);
    frequencies[i] *= (1 - ramp) + ramp / spec.factor;
  }
  return frequencies;
}

double rope_attention_factor(const RopeSpec& spec) {
  if (!spec.is_yarn()) return 1.0;
  if (spec.attention_factor != 0) return spec.attention_factor;
  const auto m = [&](double scale) { return spec.factor > 1 ? 0.1 * scale * std::log(spec.factor) + 1 : 1.0; };
  if (spec.mscale != 0 && spec.mscale_all_dim != 0) return m(spec.mscale) / m(spec.mscale_all_dim);
  return m(1.0);
}

}  // namespace deltapipe
