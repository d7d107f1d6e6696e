#include "kernels/short_conv.h"
#include "tests/gpu/device.h"

#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

namespace deltapipe {
namespace {

using kernels::ShortConv;
using kernels::ShortConvGradient;
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

  /// One convolution: inputs and results of the CPU, and memory for the GPU's.
  struct Case {
    Owned<double> x, w, halo, dy, y, dx, dw, dhalo;
    OnDevice gx, gw, gh, gdy, gy, gdx, gdh, gdw, again_dx, again_dw;
    bool with_halo;

    ShortConv forward() const { return {gx, gw, with_halo ? gh.tensor() : Tensor(), gy}; }
    ShortConvGradient backward() const {
      return {gdy, gx, gw, with_halo ? gh.tensor() : Tensor(), gdx, gdw, with_halo ? gdh.tensor() : Tensor()};
    }
  };
  Case make_case(const Shape& shape, std::int64_t taps, bool with_halo, std::int64_t shift,
                 const Owned<std::int32_t>& start) {
    const std::int64_t d = shape[2];
    const Shape halo_shape{shape[0], taps - 1, d};
    const Owned<double> x = normal(shape), w = normal({d, taps}), halo = normal(halo_shape), dy = normal(shape),
                        before = Owned<double>({d, taps}).fill(2);
    Owned<double> y(shape), dx(shape), dhalo(halo_shape), dw = before;
    const Tensor cpu_halo = with_halo ? halo.tensor() : Tensor();
    kernels::short_conv_forward(Stream::cpu(), std::array{ShortConv{x, w, cpu_halo, y}}, start);
    const ShortConvGradient backward{dy, x, w, cpu_halo, dx, dw, with_halo ? dhalo.tensor() : Tensor()};
    kernels::short_conv_backward(Stream::cpu(), std::array{backward}, start, testing::no_workspace());
    return {x,
            w,
            halo,
            dy,
            y,
            dx,
            dw,
            dhalo,
            upload(x, shift),
            upload(w, shift),
            upload(halo, shift),
            upload(dy, shift),
            poisoned(shape, shift),
            poisoned(shape, shift),
            poisoned(halo_shape, shift),
            OnDevice(DType::f32, before),
            poisoned(shape, shift),
            OnDevice(DType::f32, before),
            with_halo};
  }

  /// `count` convolutions in one call.
  void expect_cpu(const Shape& shape, std::int64_t taps, bool with_halo, std::int64_t shift, int count = 1) {
    SCOPED_TRACE(shape.str() + " taps " + std::to_string(taps) + " halo " + std::to_string(with_halo) + " shift " +
                 std::to_string(shift) + ", " + std::to_string(count) + " at once");
    const Owned<std::int32_t> start = documents(shape[0], shape[1]);
    const OnDevice gs(start);
    std::vector<Case> cases;
    std::vector<ShortConv> forwards;
    std::vector<ShortConvGradient> backwards;
    for (int i = 0; i < count; ++i) {
      cases.push_back(make_case(shape, taps, with_halo && taps > 1, shift, start));
      forwards.push_back(cases.back().forward());
      backwards.push_back(cases.back().backward());
    }
    kernels::short_conv_forward(stream(), forwards, gs);
    kernels::short_conv_backward(stream(), backwards, gs, workspace());
    for (const Case& c : cases) {
      EXPECT_LT(relative_rms(c.gy.host(), c.y), tolerance());
      EXPECT_LT(relative_rms(c.gdx.host(), c.dx), tolerance());
      EXPECT_LT(relative_rms(c.gdw.host(), c.dw), 5e-6);  // float sums of up to 2,500 signed terms
      if (c.with_halo) {
        EXPECT_LT(relative_rms(c.gdh.host(), c.dhalo), tolerance());
      }
    }
    const auto again = [&](bool with_dw) {
      for (int i = 0; i < count; ++i) {
        const auto at = static_cast<std::size_t>(i);
        backwards[at].dx = cases[at].again_dx;
        backwards[at].dw = with_dw ? cases[at].again_dw.tensor() : Tensor();
        backwards[at].dhalo = Tensor();
      }
      kernels::short_conv_backward(stream(), backwards, gs, workspace());
      for (const Case& c : cases) expect_same_bits(c.again_dx, c.gdx, with_dw ? "dx" : "dx without dw");
    };
    again(true);
    for (const Case& c : cases) expect_same_bits(c.again_dw, c.gdw, "dw");
    again(false);
  }
};

TEST_P(ShortConvCuda, EveryNumberOfTaps) {
  for (std::int64_t taps = 1; taps <= 8; ++taps) {
    for (const int count : {1, 3}) expect_cpu({2, 37, 24}, taps, true, 0, count);
  }
}

TEST_P(ShortConvCuda, OddShapes) {
  // Shorter than the taps, around the chunks of forward (32) and backward (16), unaligned, more than a block's
  // channels.
  for (const Shape& shape : {Shape{1, 1, 1}, {3, 2, 7}, {1, 16, 8}, {2, 17, 130}, {2, 33, 600}, {1, 65, 8}}) {
    for (const bool halo : {false, true}) {
      for (const std::int64_t shift : {0, 1}) expect_cpu(shape, 4, halo, shift, shift == 0 ? 3 : 2);
    }
  }
}

TEST_P(ShortConvCuda, LongSegments) {
  expect_cpu({1, 2500, 48}, 4, true, 0);
  expect_cpu({2, 5000, 8}, 3, false, 0);
  expect_cpu({1, 2500, 48}, 4, true, 0, 3);
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
  kernels::short_conv_forward(stream(), std::array{ShortConv{gx, gw, gh, gy}}, gs);
  kernels::short_conv_backward(stream(), std::array{ShortConvGradient{gdy, gx, gw, gh, gdx, Tensor(), gdh}}, gs,
                               workspace());
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
