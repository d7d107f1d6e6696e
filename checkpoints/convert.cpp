#include "checkpoints/convert.h"

#include "core/error.h"
#include "core/parallel.h"

#include <bit>
#include <cmath>
#include <cstring>

namespace deltapipe {
namespace {

constexpr std::int64_t block = 1 << 18;  // elements a task converts; large enough to hide the start of a thread

template <class S>
auto widen(S x) {
  if constexpr (std::is_floating_point_v<S>) {
    return x;
  } else {
    return to_float(x);
  }
}

template <class D, class W>
D narrow(W x) {
  if constexpr (std::is_same_v<D, BFloat16>) {
    return to_bfloat16(x);
  } else {
    return static_cast<D>(x);
  }
}

template <class S, class D>
void convert(const std::byte* source, D* out, std::int64_t n) {
  parallel_blocks(n, block, [&](std::int64_t begin, std::int64_t end) {
    if constexpr (std::is_same_v<S, D>) {
      std::memcpy(out + begin, source + begin * static_cast<std::int64_t>(sizeof(S)),
                  static_cast<std::size_t>(end - begin) * sizeof(S));
    } else {
      for (std::int64_t i = begin; i < end; ++i) {
        S x;
        std::memcpy(&x, source + i * static_cast<std::int64_t>(sizeof(S)), sizeof(S));
        out[i] = narrow<D>(widen(x));
      }
    }
  });
}

template <class D>
void convert_to(std::span<const std::byte> source, DType from, D* out, std::int64_t n) {
  switch (from) {
    case DType::f32: convert<float>(source.data(), out, n); return;
    case DType::f64: convert<double>(source.data(), out, n); return;
    case DType::bf16: convert<BFloat16>(source.data(), out, n); return;
    case DType::f16: convert<Float16>(source.data(), out, n); return;
    default: fail<InternalError>("convert_floats: {} is not a floating type", name_of(from));
  }
}

}  // namespace

// double -> float rounded to odd, then float -> bfloat16: the float has more than twice two bits to spare, so the
// second rounding sees on which side of a tie the double lies. Boldo & Melquiond, "When double rounding is odd", 2005.
BFloat16 to_bfloat16(double x) {
  const auto nearest = static_cast<float>(x);
  if (std::isnan(x) || static_cast<double>(nearest) == x) return to_bfloat16(nearest);
  auto bits = std::bit_cast<std::uint32_t>(nearest);
  if (std::abs(static_cast<double>(nearest)) > std::abs(x)) --bits;  // toward zero
  return to_bfloat16(std::bit_cast<float>(bits | 1u));
}

void convert_floats(std::span<const std::byte> source, DType from, const Tensor& out) {
  require(out.device.is_cpu(), "convert_floats: the output is not in host memory");
  if (source.size() != static_cast<std::size_t>(out.numel()) * size_of(from)) {
    fail<InternalError>("convert_floats: {} bytes of {} for shape {}", source.size(), name_of(from), out.shape.str());
  }
  switch (out.dtype) {
    case DType::f32: convert_to(source, from, out.as<float>(), out.numel()); return;
    case DType::f64: convert_to(source, from, out.as<double>(), out.numel()); return;
    case DType::bf16: convert_to(source, from, out.as<BFloat16>(), out.numel()); return;
    default: fail<InternalError>("convert_floats: cannot convert to {}", name_of(out.dtype));
  }
}

}  // namespace deltapipe
