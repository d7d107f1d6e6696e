// Counter-based random numbers: every value is a pure function of (seed, stream, counter), so that initial weights,
// data order and stochastic rounding do not depend on threads, ranks or call order.
// Philox4x32-10: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <string_view>

namespace deltapipe {

constexpr std::array<std::uint32_t, 4> philox(std::uint64_t key, std::uint64_t stream, std::uint64_t counter) {
  std::array<std::uint32_t, 4> c{static_cast<std::uint32_t>(counter), static_cast<std::uint32_t>(counter >> 32),
                                 static_cast<std::uint32_t>(stream), static_cast<std::uint32_t>(stream >> 32)};
  auto k0 = static_cast<std::uint32_t>(key);
  auto k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c[0];
    const std::uint64_t p1 = std::uint64_t{0xCD9E8D57u} * c[2];
    c = {static_cast<std::uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<std::uint32_t>(p1),
         static_cast<std::uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<std::uint32_t>(p0)};
    k0 += 0x9E3779B9u;  // Weyl constants of the paper
    k1 += 0xBB67AE85u;
  }
  return c;
}

/// FNV-1a of a name: the random stream of a named tensor or purpose.
constexpr std::uint64_t stream_of(std::string_view name) {
  std::uint64_t h = 0xcbf29ce484222325u;
  for (char c : name) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return h;
}

/// Values number 0, 1, 2, ... of one stream, by index or one after another.
class RandomStream {
 public:
  RandomStream(std::uint64_t seed, std::string_view name) : seed_(seed), stream_(stream_of(name)) {}
  RandomStream(std::uint64_t seed, std::uint64_t stream) : seed_(seed), stream_(stream) {}

  std::uint64_t bits(std::uint64_t i) const {
    const auto r = philox(seed_, stream_, i);
    return (static_cast<std::uint64_t>(r[1]) << 32) | r[0];
  }
  /// Uniform in [0, 1), 53 bits.
  double uniform(std::uint64_t i) const { return static_cast<double>(bits(i) >> 11) * 0x1p-53; }
  /// Standard normal (Box-Muller, one of the pair).
  double normal(std::uint64_t i) const {
    const auto r = philox(seed_, stream_, i);
    const double u1 = (static_cast<double>(r[0]) + 1.0) * 0x1p-32;  // (0, 1]: the logarithm stays finite
    const double u2 = static_cast<double>(r[1]) * 0x1p-32;
    return std::sqrt(-2.0 * std::log(u1)) * std::cos(2.0 * std::numbers::pi * u2);
  }
  std::uint64_t next_bits() { return bits(counter_++); }
  double next_uniform() { return uniform(counter_++); }
  double next_normal() { return normal(counter_++); }
  /// Uniform integer in [0, n); the bias is below n / 2^64.
  std::uint64_t next_below(std::uint64_t n) {
    return static_cast<std::uint64_t>((static_cast<unsigned __int128>(next_bits()) * n) >> 64);
  }

 private:
  std::uint64_t seed_;
  std::uint64_t stream_;
  std::uint64_t counter_ = 0;
};

}  // namespace deltapipe
