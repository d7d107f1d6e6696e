#include "kernels/short_conv.h"

#include "core/parallel.h"
#include "tests/kernels/testing.h"

#include <array>
#include <cstring>
#include <vector>

namespace deltapipe {
namespace {

using kernels::ShortConv;
using kernels::ShortConvGradient;
using testing::Owned;

struct Conv {
  std::int64_t s, l, d, w;
  Owned<double> x, taps, halo, dy;
  Owned<std::int32_t> start;

  Conv(RandomStream& r, std::int64_t segments, std::int64_t length, std::int64_t channels, std::int64_t width)
      : s(segments),
        l(length),
        d(channels),
        w(width),
        x({s, l, d}),
        taps({d, w}),
        halo({s, w - 1, d}),
        dy({s, l, d}),
        start({s, l}) {
    x.normal(r);
    taps.normal(r);
    halo.normal(r);
    dy.normal(r);
    start.fill(-100);
  }
  /// A new document at each of these tokens, relative to the segment.
  void pack(std::int64_t segment, const std::vector<std::int32_t>& starts) {
    for (std::int64_t t = 0; t < l; ++t) {
      for (std::int32_t at : starts) {
        if (at <= t) start[segment * l + t] = at;
      }
    }
  }
};

Owned<double> definition(const Conv& c) {
  Owned<double> y({c.s, c.l, c.d});
  for (std::int64_t s = 0; s < c.s; ++s) {
    for (std::int64_t t = 0; t < c.l; ++t) {
      for (std::int64_t i = 0; i < c.d; ++i) {
        double p = 0;
        for (std::int64_t j = 0; j < c.w; ++j) {
          const std::int64_t source = t - (c.w - 1) + j;
          if (source < c.start[s * c.l + t]) continue;
          const double value =
              source >= 0 ? c.x[(s * c.l + source) * c.d + i] : c.halo[(s * (c.w - 1) + source + c.w - 1) * c.d + i];
          p += c.taps[i * c.w + j] * value;
        }
        y[(s * c.l + t) * c.d + i] = p / (1 + std::exp(-p));
      }
    }
  }
  return y;
}

std::array<ShortConv, 1> one(const Tensor& x, const Tensor& w, const Tensor& halo, const Tensor& y) {
  return {{{x, w, halo, y}}};
}

template <class T>
Owned<T> forward(const Conv& c) {
  Owned<T> y({c.s, c.l, c.d});
  const auto x = c.x.cast<T>(), taps = c.taps.cast<T>(), halo = c.halo.cast<T>();
  kernels::short_conv_forward(Stream::cpu(), one(x, taps, c.w > 1 ? halo.tensor() : Tensor(), y), c.start);
  return y;
}

TEST(ShortConv, ForwardMatchesDefinition) {
  RandomStream r(testing::test_seed(), "data");
  for (std::int64_t width = 1; width <= 8; ++width) {
    for (const auto& [length, channels] : {std::pair{1, 3}, {5, 64}, {130, 70}}) {
      Conv c(r, 2, length, channels, width);
      c.pack(0, {-2, 1, 2, 4, 66});  // halo rows from -2 on belong to the first token's document
      c.pack(1, {0, 3, 64});         // none do
      const auto expected = definition(c);
      EXPECT_LT(testing::relative_rms(forward<double>(c), expected), 1e-14);
      EXPECT_LT(testing::relative_rms(forward<float>(c), expected), 1e-6);  // at most 8 products, then exp
    }
  }
}

TEST(ShortConv, WithoutHaloItIsZero) {
  RandomStream r(testing::test_seed(), "data");
  Conv c(r, 2, 9, 5, 4);
  c.halo.fill(0);
  const auto expected = forward<double>(c);
  Owned<double> y(c.x.shape());
  kernels::short_conv_forward(Stream::cpu(), one(c.x, c.taps, Tensor(), y), c.start);
  EXPECT_LT(testing::relative_rms(y, expected), 1e-15);
}

struct Gradients {
  Owned<double> dx, dw, dhalo;
};
ShortConvGradient gradient_call(const Conv& c, Gradients& g) {
  const bool halo = c.w > 1;
  return {.dy = c.dy,
          .x = c.x,
          .w = c.taps,
          .halo = halo ? c.halo.tensor() : Tensor(),
          .dx = g.dx,
          .dw = g.dw,
          .dhalo = halo ? g.dhalo.tensor() : Tensor()};
}
Gradients zero_gradients(const Conv& c) {
  Gradients g{Owned<double>(c.x.shape()), Owned<double>(c.taps.shape()), Owned<double>(c.halo.shape())};
  g.dw.fill(0);
  return g;
}
Gradients backward(const Conv& c) {
  Gradients g = zero_gradients(c);
  kernels::short_conv_backward(Stream::cpu(), std::array{gradient_call(c, g)}, c.start, testing::no_workspace());
  return g;
}

TEST(ShortConv, GradientsMatchFiniteDifferences) {
  RandomStream r(testing::test_seed(), "data");
  for (const auto& [length, width] : {std::pair{1, 4}, {2, 4}, {11, 1}, {11, 4}, {70, 8}}) {
    Conv c(r, 2, length, 35, width);
    c.pack(0, {-2, 1, 4, 7});
    const auto loss = [&] { return testing::inner(forward<double>(c), c.dy); };
    const auto g = backward(c);
    testing::expect_gradient(c.x, g.dx, loss, "dx");
    testing::expect_gradient(c.taps, g.dw, loss, "dw");
    if (width > 1) testing::expect_gradient(c.halo, g.dhalo, loss, "dhalo");
    // dw accumulates, and an absent dw or dhalo changes nothing else.
    Gradients again = g;
    ShortConvGradient call = gradient_call(c, again);
    call.dhalo = Tensor();
    kernels::short_conv_backward(Stream::cpu(), std::array{call}, c.start, testing::no_workspace());
    for (std::int64_t i = 0; i < g.dw.size(); ++i) EXPECT_NEAR(again.dw[i], 2 * g.dw[i], 1e-12 * std::abs(g.dw[i]));
    EXPECT_EQ(testing::relative_rms(again.dx, g.dx), 0.0);
    call.dw = Tensor();
    kernels::short_conv_backward(Stream::cpu(), std::array{call}, c.start, testing::no_workspace());
    EXPECT_EQ(testing::relative_rms(again.dx, g.dx), 0.0);
  }
}

TEST(ShortConv, SeveralAtOnceAreEachAlone) {
  RandomStream r(testing::test_seed(), "data");
  std::vector<Conv> all;
  for (int i = 0; i < 3; ++i) all.emplace_back(r, 2, 21, 19, 4);
  std::vector<Owned<double>> y;
  std::vector<Gradients> g;
  std::vector<ShortConv> forwards;
  std::vector<ShortConvGradient> backwards;
  for (const Conv& c : all) {
    y.emplace_back(c.x.shape());
    g.push_back(zero_gradients(c));
  }
  for (std::size_t i = 0; i < 3; ++i) {
    forwards.push_back({all[i].x, all[i].taps, all[i].halo, y[i]});
    backwards.push_back(gradient_call(all[i], g[i]));
  }
  kernels::short_conv_forward(Stream::cpu(), forwards, all[0].start);
  kernels::short_conv_backward(Stream::cpu(), backwards, all[0].start, testing::no_workspace());
  for (std::size_t i = 0; i < 3; ++i) {
    Conv& c = all[i];
    c.start = all[0].start;
    const Gradients alone = backward(c);
    EXPECT_EQ(testing::relative_rms(y[i], forward<double>(c)), 0.0) << i;
    EXPECT_EQ(testing::relative_rms(g[i].dx, alone.dx), 0.0) << i;
    EXPECT_EQ(testing::relative_rms(g[i].dw, alone.dw), 0.0) << i;
    EXPECT_EQ(testing::relative_rms(g[i].dhalo, alone.dhalo), 0.0) << i;
  }
}

TEST(ShortConv, ConvolutionsOfOneCallHaveOneShape) {
  RandomStream r(testing::test_seed(), "data");
  const Conv c(r, 1, 4, 3, 4), wider(r, 1, 4, 5, 4), more_taps(r, 1, 4, 3, 5);
  Owned<double> y(c.x.shape()), wide_y(wider.x.shape());
  const ShortConv call{c.x, c.taps, c.halo, y};
  const auto run = [&](const std::vector<ShortConv>& calls) {
    kernels::short_conv_forward(Stream::cpu(), calls, c.start);
  };
  EXPECT_NO_THROW(run({call, call}));
  EXPECT_THROW(run({call, {wider.x, wider.taps, wider.halo, wide_y}}), InternalError);
  EXPECT_THROW(run({call, {more_taps.x, more_taps.taps, more_taps.halo, y}}), InternalError);
  EXPECT_THROW(run({}), InternalError);
  EXPECT_THROW(run({call, call, call, call}), InternalError);
}

// A document cut behind its 12th token: the second part's halo is the first part's last rows, and its dhalo is what
// the first part's dx lacks.
TEST(ShortConv, ACutWithHaloEqualsTheWhole) {
  RandomStream r(testing::test_seed(), "data");
  const std::int64_t length = 30, cut = 12, d = 20, w = 4;
  for (const auto& starts : {std::vector<std::int32_t>{-50}, {-50, 11, 13}, {-50, 12}, {-50, 10, 20}}) {
    Conv whole(r, 1, length, d, w);
    whole.pack(0, starts);
    Conv left(r, 1, cut, d, w), right(r, 1, length - cut, d, w);
    left.taps = right.taps = whole.taps;
    left.halo = whole.halo;
    std::copy_n(whole.x.begin(), cut * d, left.x.begin());
    std::copy_n(whole.dy.begin(), cut * d, left.dy.begin());
    std::copy_n(whole.start.begin(), cut, left.start.begin());
    std::copy_n(whole.x.begin() + cut * d, right.x.size(), right.x.begin());
    std::copy_n(whole.dy.begin() + cut * d, right.dy.size(), right.dy.begin());
    std::copy_n(whole.x.begin() + (cut - w + 1) * d, right.halo.size(), right.halo.begin());
    for (std::int64_t t = 0; t < right.l; ++t) {
      right.start[t] = whole.start[cut + t] - static_cast<std::int32_t>(cut);
    }
    const auto y = forward<double>(whole), y_left = forward<double>(left), y_right = forward<double>(right);
    for (std::int64_t i = 0; i < y.size(); ++i) EXPECT_EQ(y[i], i < cut * d ? y_left[i] : y_right[i - cut * d]);
    const auto g = backward(whole), g_left = backward(left), g_right = backward(right);
    for (std::int64_t i = 0; i < g.dx.size(); ++i) {
      double joined = i < cut * d ? g_left.dx[i] : g_right.dx[i - cut * d];
      const std::int64_t halo_row = i / d - (cut - w + 1);
      if (i < cut * d && halo_row >= 0) joined += g_right.dhalo[halo_row * d + i % d];
      EXPECT_NEAR(joined, g.dx[i], 1e-13) << i;  // sums of four terms of order 1 in another order
    }
    for (std::int64_t i = 0; i < g.dw.size(); ++i) EXPECT_NEAR(g_left.dw[i] + g_right.dw[i], g.dw[i], 1e-12);
    EXPECT_EQ(testing::relative_rms(g_left.dhalo, g.dhalo), 0.0);
  }
}

TEST(ShortConv, ThreadsDoNotChangeABit) {
  RandomStream r(testing::test_seed(), "data");
  const Conv c(r, 3, 50, 100, 4);
  set_num_threads(1);
  const auto y = forward<float>(c);
  const auto g = backward(c);
  set_num_threads(2);
  const auto y2 = forward<float>(c);
  const auto g2 = backward(c);
  set_num_threads(0);
  EXPECT_EQ(std::memcmp(y.begin(), y2.begin(), static_cast<std::size_t>(y.size()) * sizeof(float)), 0);
  EXPECT_EQ(std::memcmp(g.dw.begin(), g2.dw.begin(), static_cast<std::size_t>(g.dw.size()) * sizeof(double)), 0);
}

TEST(ShortConv, RejectsWidthsOutsideOneToEight) {
  RandomStream r(testing::test_seed(), "data");
  const Conv c(r, 1, 4, 3, 9);
  Owned<double> y(c.x.shape());
  EXPECT_THROW(kernels::short_conv_forward(Stream::cpu(), one(c.x, c.taps, c.halo, y), c.start), InternalError);
}

}  // namespace
}  // namespace deltapipe
