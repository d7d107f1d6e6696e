#include "checkpoints/convert.h"

#include "core/random.h"
#include "tests/checkpoints/testing.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace deltapipe {
namespace {

/// The bfloat16 nearest to x by trying both neighbours in exact arithmetic: an independent rounding.
std::uint16_t nearest_bfloat16(double x) {
  const double a = std::abs(x);
  const std::uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const auto value = [](unsigned bits) {
    // One past the largest finite value stands where the next power of two would be, so that overflow rounds like a
    // tie.
    return bits == 0x7f80 ? 0x1p128 : static_cast<double>(to_float(BFloat16{static_cast<std::uint16_t>(bits)}));
  };
  unsigned low = 0, high = 0x7f80;  // value(low) <= a, value(high) > a
  if (a >= value(high)) return static_cast<std::uint16_t>(sign | 0x7f80);
  while (high - low > 1) {
    const unsigned middle = (low + high) / 2;
    (value(middle) <= a ? low : high) = middle;
  }
  const double below = a - value(low),
               above = value(high) - a;  // exact: at most 54 significant bits apart or far from a tie
  const bool up = above < below || (above == below && (low & 1) != 0);
  return static_cast<std::uint16_t>(sign | (up ? high : low));
}

TEST(Convert, RoundsDoublesToBfloat16Once) {
  // Just above a tie between two bfloat16 values; rounding to float first lands on the tie and then goes to even.
  const double tie = 1.0 + 0x1p-8, above = tie + 0x1p-40;
  EXPECT_EQ(to_bfloat16(tie).bits, 0x3f80);
  EXPECT_EQ(to_bfloat16(above).bits, 0x3f81);
  EXPECT_EQ(to_bfloat16(static_cast<float>(above)).bits, 0x3f80);
  EXPECT_EQ(to_bfloat16(1.0 + 3 * 0x1p-8).bits, 0x3f82);
  RandomStream random(3, "bfloat16");
  for (int i = 0; i < 200'000; ++i) {
    // Every exponent from below the smallest subnormal bfloat16 to overflow, mantissas near ties more often than not.
    double x = std::ldexp(1.0 + static_cast<double>(random.next_below(256)) / 256,
                          static_cast<int>(random.next_below(270)) - 140);
    if (random.next_below(4) != 0) {
      const double nudge = std::ldexp(x, -static_cast<int>(random.next_below(53)));
      x += random.next_below(2) != 0 ? nudge : -nudge;
    }
    if (random.next_below(2) != 0) x = -x;
    ASSERT_EQ(to_bfloat16(x).bits, nearest_bfloat16(x)) << std::hexfloat << x;
  }
  const double inf = std::numeric_limits<double>::infinity();
  EXPECT_EQ(to_bfloat16(inf).bits, 0x7f80);
  EXPECT_EQ(to_bfloat16(-inf).bits, 0xff80);
  EXPECT_EQ(to_bfloat16(-1e-300).bits, 0x8000);
  EXPECT_EQ(to_bfloat16(-1e300).bits, 0xff80);
  EXPECT_TRUE(std::isnan(to_float(to_bfloat16(std::nan("")))));
}

template <class S, class D>
std::vector<D> converted(const std::vector<S>& values) {
  std::vector<std::byte> bytes(values.size() * sizeof(S) + 1);
  std::memcpy(bytes.data() + 1, values.data(), values.size() * sizeof(S));  // no alignment
  std::vector<D> out(values.size());
  convert_floats(std::span(bytes).subspan(1), dtype_of<S>,
                 Tensor(out.data(), dtype_of<D>, {static_cast<std::int64_t>(out.size())}));
  return out;
}

TEST(Convert, KeepsValuesThatTheOutputCanHold) {
  std::vector<Float16> half;
  std::vector<BFloat16> brain;
  for (unsigned bits = 0; bits < 65536; ++bits) {
    half.push_back({static_cast<std::uint16_t>(bits)});
    brain.push_back({static_cast<std::uint16_t>(bits)});
  }
  const auto half32 = converted<Float16, float>(half);
  const auto half64 = converted<Float16, double>(half);
  const auto half_brain = converted<Float16, BFloat16>(half);
  const auto brain32 = converted<BFloat16, float>(brain);
  const auto brain64 = converted<BFloat16, double>(brain);
  const auto brain_brain = converted<BFloat16, BFloat16>(brain);
  const auto back = converted<float, BFloat16>(brain32);
  for (unsigned b = 0; b < 65536; ++b) {
    const unsigned exponent = (b >> 10) & 31, mantissa = b & 1023;
    const double magnitude =
        exponent == 0 ? mantissa * 0x1p-24 : std::ldexp(1024 + mantissa, static_cast<int>(exponent) - 25);
    if (exponent < 31) {
      const double x = (b & 0x8000) != 0 ? -magnitude : magnitude;
      EXPECT_EQ(half32[b], static_cast<float>(x));
      EXPECT_EQ(half64[b], x);
      EXPECT_EQ(half_brain[b].bits, nearest_bfloat16(x));
    } else {
      EXPECT_EQ(std::isnan(half32[b]), mantissa != 0);
    }
    EXPECT_EQ(brain_brain[b].bits, b);
    if (std::isnan(brain32[b])) {
      EXPECT_TRUE(std::isnan(brain64[b]) && std::isnan(to_float(back[b])));
    } else {
      EXPECT_EQ(back[b].bits, b);
      EXPECT_EQ(brain64[b], static_cast<double>(brain32[b]));
    }
  }
  EXPECT_EQ((converted<double, float>({1.0 + 0x1p-24, 1.0 + 3 * 0x1p-24})),
            (std::vector<float>{1.0f, 1.0f + 0x1p-22f}));
  EXPECT_EQ((converted<float, double>({0.1f})), (std::vector<double>{static_cast<double>(0.1f)}));
}

TEST(Convert, ChecksItsContract) {
  std::vector<std::byte> bytes(8);
  std::vector<float> out(2);
  const Tensor t(out.data(), DType::f32, {2});
  testing::expect_error<InternalError>([&] { convert_floats(bytes, DType::f64, t); }, {"float64", "[2]"});
  testing::expect_error<InternalError>([&] { convert_floats(bytes, DType::i32, t); }, {"int32"});
  testing::expect_error<InternalError>([&] { convert_floats(bytes, DType::f32, Tensor(out.data(), DType::i32, {2})); },
                                       {"int32"});
}

}  // namespace
}  // namespace deltapipe
