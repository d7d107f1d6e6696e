#include "kernels/short_conv.h"
#include "tests/gpu/device.h"

namespace deltapipe {
namespace {

using testing::OnDevice;
using testing::Owned;
using testing::relative_rms;

class ShortConvCuda : public testing::CudaTest {
 protected:
  /// Documents of random lengths, the first of which began before the segment.
  Owned<std::int32_t> documents(std::int64_t segments, std::int64_t length) {
    Owned<std::int32_t> start({segments, length});
    for (std::int64_t s = 0; s < segments; ++s) {
      std::int32_t first = -1 - static_cast<std::int32_t>(random_.next_below(5));
      for (std::int64_t t = 0; t < length; ++t) {
        if (random_.next_below(6) == 0) first = static_cast<std::int32_t>(t);
        start[s * length + t] = first;
      }
    }
    return start;
  }

  void expect_cpu(const Shape& shape, std::int64_t taps, bool with_halo, std::int64_t shift) {
    SCOPED_TRACE(shape.str() + " taps " + std::to_string(taps) + " halo " + std::to_string(with_halo) + " shift " +
                 std::to_string(shift));
    const std::int64_t segments = shape[0], length = shape[1], d = shape[2];
    const Shape halo_shape{segments, taps - 1, d};
    with_halo = with_halo && taps > 1;
    const Owned<double> x = normal(shape), w = normal({d, taps}), halo = normal(halo_shape), dy = normal(shape);
    const Owned<std::int32_t> start = documents(segments, length);
    const Tensor cpu_halo = with_halo ? halo.tensor() : Tensor();
    Owned<double> y(shape), dx(shape), dhalo(halo_shape), dw({d, taps});
    dw.fill(2);
    kernels::short_conv_forward(Stream::cpu(), x, w, cpu_halo, start, y);
    kernels::short_conv_backward(Stream::cpu(), dy, x, w, cpu_halo, start, dx, dw,
                                 with_halo ? dhalo.tensor() : Tensor(), testing::no_workspace());

    const OnDevice gx = upload(x, shift), gw = upload(w, shift), gh = upload(halo, shift), gdy = upload(dy, shift),
                   gs(start), gy = poisoned(shape, shift), gdx = poisoned(shape, shift),
                   gdh = poisoned(halo_shape, shift), gdw(DType::f32, Owned<double>({d, taps}).fill(2)),
                   again_dx = poisoned(shape, shift), again_dw(DType::f32, gdw.host());
    const Tensor gpu_halo = with_halo ? gh.tensor() : Tensor(), gpu_dhalo = with_halo ? gdh.tensor() : Tensor();
    kernels::short_conv_forward(stream(), gx, gw, gpu_halo, gs, gy);
    EXPECT_LT(relative_rms(gy.host(), y), tolerance());
    kernels::short_conv_backward(stream(), gdy, gx, gw, gpu_halo, gs, gdx, gdw, gpu_dhalo, workspace());
    EXPECT_LT(relative_rms(gdx.host(), dx), tolerance());
    EXPECT_LT(relative_rms(gdw.host(), dw), 5e-6);  // float sums of up to 2,500 signed terms
    if (with_halo) {
      EXPECT_LT(relative_rms(gdh.host(), dhalo), tolerance());
    }
    kernels::short_conv_backward(stream(), gdy, gx, gw, gpu_halo, gs, again_dx, again_dw, Tensor(), workspace());
    expect_same_bits(again_dx, gdx, "dx");
    expect_same_bits(again_dw, gdw, "dw");
    kernels::short_conv_backward(stream(), gdy, gx, gw, gpu_halo, gs, again_dx, Tensor(), Tensor(), workspace());
    expect_same_bits(again_dx, gdx, "dx without dw");
  }
};

TEST_P(ShortConvCuda, EveryNumberOfTaps) {
  for (std::int64_t taps = 1; taps <= 8; ++taps) expect_cpu({2, 37, 24}, taps, true, 0);
}

TEST_P(ShortConvCuda, OddShapes) {
  // Shorter than the taps, around the chunks of forward (32) and backward (16), unaligned, more than a block's
  // channels.
  for (const Shape& shape : {Shape{1, 1, 1}, {3, 2, 7}, {1, 16, 8}, {2, 17, 130}, {2, 33, 600}, {1, 65, 8}}) {
    for (const bool halo : {false, true}) {
      for (const std::int64_t shift : {0, 1}) expect_cpu(shape, 4, halo, shift);
    }
  }
}

TEST_P(ShortConvCuda, LongSegments) {
  expect_cpu({1, 2500, 48}, 4, true, 0);
  expect_cpu({2, 5000, 8}, 3, false, 0);
}

// A tap that may not see a row must not multiply it either: 0 times infinity would be NaN.
TEST_P(ShortConvCuda, ForeignRowsAreNotRead) {
  const Shape shape{1, 6, 8};
  Owned<double> x = normal(shape), halo = normal({1, 3, 8});
  Owned<std::int32_t> start({1, 6});
  for (int t = 0; t < 6; ++t) start[t] = t < 3 ? 0 : 3;
  halo.fill(std::numeric_limits<double>::infinity());
  for (int i = 0; i < 8; ++i) x[2 * 8 + i] = std::numeric_limits<double>::infinity();
  const OnDevice gx = upload(x), gw = upload(normal({8, 4})), gh = upload(halo), gs(start), gy = poisoned(shape),
                 gdy = upload(normal(shape)), gdx = poisoned(shape), gdh = poisoned({1, 3, 8});
  kernels::short_conv_forward(stream(), gx, gw, gh, gs, gy);
  kernels::short_conv_backward(stream(), gdy, gx, gw, gh, gs, gdx, Tensor(), gdh, workspace());
  const Owned<double> y = gy.host(), dx = gdx.host(), dhalo = gdh.host();
  for (int i = 0; i < 48; ++i) {
    if (i / 8 == 2) continue;
    EXPECT_TRUE(std::isfinite(y[i])) << i;
    if (i / 8 > 2) {
      EXPECT_TRUE(std::isfinite(dx[i])) << i;
    }
  }
  for (int i = 0; i < 24; ++i) EXPECT_EQ(dhalo[i], 0) << i;
}

INSTANTIATE_TEST_SUITE_P(DTypes, ShortConvCuda, testing::model_dtypes(), testing::dtype_name);

}  // namespace
}  // namespace deltapipe
