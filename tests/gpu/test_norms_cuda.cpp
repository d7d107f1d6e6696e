#include "kernels/gated_rms_norm.h"
#include "kernels/rms_norm.h"
#include "tests/gpu/device.h"

namespace deltapipe {
namespace {

using testing::no_workspace;
using testing::OnDevice;
using testing::Owned;
using testing::relative_rms;

using RmsNormCuda = testing::CudaTest;
using GatedRmsNormCuda = testing::CudaTest;

// Rows and widths: one element, unaligned rows, every number of packs a thread (bfloat16 up to 2048, 4096, 8192,
// 16384), a hidden size of a real model, more rows than blocks.
const std::pair<std::int64_t, std::int64_t> shapes[] = {{1, 1},    {3, 7},    {65, 130}, {5, 256},
                                                        {9, 2560}, {7, 4100}, {3, 8192}, {1000, 64}};

TEST_P(RmsNormCuda, FollowsTheCpu) {
  for (const auto& [rows, d] : shapes) {
    for (const std::int64_t shift : {0, 1}) {
      SCOPED_TRACE(Shape({rows, d}).str() + " shift " + std::to_string(shift));
      const Owned<double> x = normal({rows, d}), w = normal({d}, 0.5, 1), dy = normal({rows, d}),
                          old = normal({rows, d});
      Owned<double> y({rows, d}), rstd({rows}), dx({rows, d}), dw({d}), dx_alone({rows, d});
      dw.fill(2);
      kernels::rms_norm_forward(Stream::cpu(), x, w, 1e-5f, y, rstd);
      kernels::rms_norm_backward(Stream::cpu(), dy, x, w, rstd, old, dx, dw, no_workspace());
      kernels::rms_norm_backward(Stream::cpu(), dy, x, w, rstd, Tensor(), dx_alone, Tensor(), no_workspace());

      const OnDevice gx = upload(x, shift), gw = upload(w), gdy = upload(dy, shift), gy = poisoned({rows, d}, shift),
                     gold = upload(old, shift), gdx = poisoned({rows, d}, shift),
                     gdx_alone = poisoned({rows, d}, shift), grstd(DType::f32, Shape{rows}),
                     gdw(DType::f32, Owned<double>({d}).fill(2));
      kernels::rms_norm_forward(stream(), gx, gw, 1e-5f, gy, grstd);
      EXPECT_LT(relative_rms(grstd.host(), rstd), 2e-6);
      // x * rstd is rounded, then its product with the weight.
      EXPECT_LT(relative_rms(gy.host(), y), tolerance(2));
      kernels::rms_norm_backward(stream(), gdy, gx, gw, grstd, gold, gdx, gdw, workspace());
      kernels::rms_norm_backward(stream(), gdy, gx, gw, grstd, Tensor(), gdx_alone, Tensor(), workspace());
      // The gradient of a row of one element is eps, a difference of equal numbers, each as large as w dy / x: where x
      // is small, more than is added to it.
      if (d > 1) {
        EXPECT_LT(relative_rms(gdx.host(), dx), tolerance());
        EXPECT_LT(relative_rms(gdx_alone.host(), dx_alone), tolerance());
      }
      EXPECT_LT(relative_rms(gdw.host(), dw), 5e-6);  // float sums of up to 1000 signed terms

      // In place, and again: the same bits.
      const OnDevice again_dw(DType::f32, Owned<double>({d}).fill(2)), again_dx = upload(old, shift);
      kernels::rms_norm_backward(stream(), gdy, gx, gw, grstd, again_dx, again_dx, again_dw, workspace());
      expect_same_bits(again_dx, gdx, "dx");
      expect_same_bits(again_dw, gdw, "dw");
      kernels::rms_norm_backward(stream(), gdy, gx, gw, grstd, Tensor(), gdy, Tensor(), workspace());
      expect_same_bits(gdy, gdx_alone, "dx in the memory of dy");
      kernels::rms_norm_forward(stream(), gx, gw, 1e-5f, gx, grstd);
      expect_same_bits(gx, gy, "y in the memory of x");
    }
  }
}

TEST_P(RmsNormCuda, ForwardOfASumIsTheSumsForward) {
  for (const auto& [rows, d] : shapes) {
    for (const std::int64_t shift : {0, 1}) {
      SCOPED_TRACE(Shape({rows, d}).str() + " shift " + std::to_string(shift));
      const Shape shape{rows, d};
      const Owned<double> x = normal(shape), h = normal(shape);
      Owned<double> truth(shape);
      for (std::int64_t i = 0; i < truth.size(); ++i) truth[i] = x[i] + h[i];
      const OnDevice gx = upload(x, shift), gh = upload(h, shift), gw = upload(normal({d}, 0.5, 1)),
                     expected_sum = upload(truth, shift), expected = poisoned(shape, shift),
                     sum = poisoned(shape, shift), y = poisoned(shape, shift), again = poisoned(shape, shift),
                     rstd(DType::f32, Shape{rows}), expected_rstd(DType::f32, Shape{rows});
      kernels::rms_norm_forward(stream(), expected_sum, gw, 1e-5f, expected, expected_rstd);
      kernels::add_rms_norm_forward(stream(), gx, gh, gw, 1e-5f, sum, y, rstd);
      expect_same_bits(sum, expected_sum, "sum");  // one rounding of an exact float sum, or a float sum
      expect_same_bits(y, expected, "y");
      expect_same_bits(rstd, expected_rstd, "rstd");
      kernels::add_rms_norm_forward(stream(), gx, gh, gw, 1e-5f, gh, again, rstd);
      expect_same_bits(gh, expected_sum, "sum in the memory of h");
      expect_same_bits(again, expected, "y");
    }
  }
}

TEST_P(RmsNormCuda, TooLongARowIsRefused) {
  const std::int64_t d = (dtype() == DType::bf16 ? 16384 : 8192) + 1;
  const OnDevice x = poisoned({1, d}), w = poisoned({d}), rstd(DType::f32, Shape{1});
  EXPECT_THROW(kernels::rms_norm_forward(stream(), x, w, 1e-5f, x, rstd), InternalError);
}

TEST_P(RmsNormCuda, ADryStreamTakesWorkspaceAlone) {
  Arena measuring = Arena::measuring("workspace", {Device::Kind::cuda, 0});
  const Shape shape{32768, 2560};
  const Tensor none(measuring.allocate(dtype(), {1}, "nothing").data, dtype(), shape);
  const Tensor w(none.data, dtype(), {2560}), rstd(none.data, DType::f32, {32768}), dw(none.data, DType::f32, {2560});
  measuring.reset();
  kernels::rms_norm_backward(Stream::dry({Device::Kind::cuda, 0}), none, none, w, rstd, Tensor(), none, dw, measuring);
  EXPECT_EQ(measuring.used(), 0u);
  EXPECT_GT(measuring.peak(), 0u);
  EXPECT_LE(measuring.peak(), std::size_t{396 * 2560 * 4});
}

TEST_P(GatedRmsNormCuda, FollowsTheCpu) {
  const Shape all[] = {{1, 1, 1},   {3, 2, 7},   {5, 3, 64},  {33, 20, 128},
                       {2, 3, 130}, {4, 2, 256}, {3, 5, 512}, {2, 2, 509}};
  for (const Shape& shape : all) {
    for (const std::int64_t shift : {0, 1}) {
      SCOPED_TRACE(shape.str() + " shift " + std::to_string(shift));
      const std::int64_t v = shape[2];
      const Shape heads{shape[0], shape[1]};
      const Owned<double> x = normal(shape), gate = normal(shape, 2), w = normal({v}, 0.5, 1), dy = normal(shape);
      Owned<double> y(shape), rstd(heads), dx(shape), dgate(shape), dw({v});
      dw.fill(2);
      kernels::gated_rms_norm_forward(Stream::cpu(), x, gate, w, 1e-5f, y, rstd);
      kernels::gated_rms_norm_backward(Stream::cpu(), dy, x, gate, w, rstd, dx, dgate, dw, no_workspace());

      const OnDevice gx = upload(x, shift), gg = upload(gate, shift), gw = upload(w), gdy = upload(dy, shift),
                     gy = poisoned(shape, shift), gdx = poisoned(shape, shift), gdg = poisoned(shape, shift),
                     grstd(DType::f32, heads), gdw(DType::f32, Owned<double>({v}).fill(2));
      kernels::gated_rms_norm_forward(stream(), gx, gg, gw, 1e-5f, gy, grstd);
      kernels::gated_rms_norm_backward(stream(), gdy, gx, gg, gw, grstd, gdx, gdg, gdw, workspace());
      EXPECT_LT(relative_rms(grstd.host(), rstd), 2e-6);
      EXPECT_LT(relative_rms(gy.host(), y), tolerance());
      // The gradient of a head of one channel is eps, a difference of equal numbers.
      if (v > 1) {
        EXPECT_LT(relative_rms(gdx.host(), dx), tolerance());
      }
      EXPECT_LT(relative_rms(gdg.host(), dgate), tolerance());
      EXPECT_LT(relative_rms(gdw.host(), dw), 5e-6);  // float sums of up to 660 signed terms

      const OnDevice again_dw(DType::f32, Owned<double>({v}).fill(2));
      kernels::gated_rms_norm_backward(stream(), gdy, gx, gg, gw, grstd, gdy, gg, again_dw, workspace());
      expect_same_bits(gdy, gdx, "dx in the memory of dy");
      expect_same_bits(gg, gdg, "dgate in the memory of gate");
      expect_same_bits(again_dw, gdw, "dw");
    }
  }
}

TEST_P(GatedRmsNormCuda, MoreRowsThanBlocks) {
  const Shape shape{1500, 20, 128};
  const Owned<double> x = normal(shape), gate = normal(shape), w = normal({128}, 0.5, 1), dy = normal(shape);
  Owned<double> y(shape), rstd({1500, 20}), dx(shape), dgate(shape), dw({128});
  dw.fill(0);
  kernels::gated_rms_norm_forward(Stream::cpu(), x, gate, w, 1e-5f, y, rstd);
  kernels::gated_rms_norm_backward(Stream::cpu(), dy, x, gate, w, rstd, dx, dgate, dw, no_workspace());
  const OnDevice gx = upload(x), gg = upload(gate), gw = upload(w), gdy = upload(dy), grstd(DType::f32, rstd),
                 gdx = poisoned(shape), gdg = poisoned(shape), gdw(DType::f32, Owned<double>({128}).fill(0));
  kernels::gated_rms_norm_backward(stream(), gdy, gx, gg, gw, grstd, gdx, gdg, gdw, workspace());
  EXPECT_LT(relative_rms(gdx.host(), dx), tolerance());
  EXPECT_LT(relative_rms(gdw.host(), dw), 5e-6);
}

INSTANTIATE_TEST_SUITE_P(DTypes, RmsNormCuda, testing::model_dtypes(), testing::dtype_name);
INSTANTIATE_TEST_SUITE_P(DTypes, GatedRmsNormCuda, testing::model_dtypes(), testing::dtype_name);

}  // namespace
}  // namespace deltapipe
