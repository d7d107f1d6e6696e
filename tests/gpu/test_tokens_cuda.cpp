#include "kernels/embedding.h"
#include "kernels/rope.h"
#include "tests/gpu/device.h"

namespace deltapipe {
namespace {

using testing::OnDevice;
using testing::Owned;
using testing::relative_rms;

using EmbeddingCuda = testing::CudaTest;
using RopeCuda = testing::CudaTest;

Owned<std::int32_t> some_tokens(RandomStream& r, std::int64_t length, std::int64_t vocabulary) {
  Owned<std::int32_t> tokens({length});
  for (std::int64_t t = 0; t < length; ++t) {
    // Every third is token 0: many rows for one owner, as of a frequent word.
    tokens[t] = t % 3 == 0 ? 0 : static_cast<std::int32_t>(r.next_below(static_cast<std::uint64_t>(vocabulary)));
  }
  return tokens;
}

TEST_P(EmbeddingCuda, FollowsTheCpu) {
  struct Case {
    std::int64_t length, vocabulary, d;
  };
  // Longer than a block's turn through the ids and than its list of places, wider than a block's columns, unaligned.
  for (const auto& [length, vocabulary, d] : {Case{1, 1, 1},
                                              {7, 3, 5},
                                              {130, 50, 64},
                                              {5000, 300, 24},
                                              {9000, 3, 40},
                                              {600, 900, 2560},
                                              {65, 10, 4104},
                                              {2000, 5000, 33}}) {
    SCOPED_TRACE(Shape({length, vocabulary, d}).str());
    const Owned<double> table = normal({vocabulary, d}), dout = normal({length, d});
    const Owned<std::int32_t> tokens = some_tokens(random_, length, vocabulary);
    Owned<double> out({length, d}), dtable({vocabulary, d});
    dtable.fill(0.5);
    kernels::embedding_forward(Stream::cpu(), tokens, table, out);
    kernels::embedding_backward(Stream::cpu(), dout, tokens, dtable);
    const OnDevice gt(tokens), gtable = upload(table), gdout = upload(dout), gout = poisoned({length, d}),
                               gd(DType::f32, Owned<double>({vocabulary, d}).fill(0.5)), again(DType::f32, gd.host());
    kernels::embedding_forward(stream(), gt, gtable, gout);
    EXPECT_EQ(gout.bytes(), OnDevice(dtype(), out).bytes());
    kernels::embedding_backward(stream(), gdout, gt, gd);
    EXPECT_LT(relative_rms(gd.host(), dtable), 2e-6);  // float sums of up to 5000 signed terms
    kernels::embedding_backward(stream(), gdout, gt, again);
    expect_same_bits(again, gd, "dtable");
  }
}

TEST_P(EmbeddingCuda, TokensOutsideTheTable) {
  Owned<std::int32_t> tokens({3});
  tokens[0] = 1, tokens[1] = -1, tokens[2] = 4;
  const OnDevice gt(tokens), table = upload(normal({4, 8})), out = poisoned({3, 8}), dout = upload(normal({3, 8})),
                             dtable(DType::f32, Owned<double>({4, 8}).fill(0));
  kernels::embedding_forward(stream(), gt, table, out);
  kernels::embedding_backward(stream(), dout, gt, dtable);
  const Owned<double> rows = out.host(), d = dtable.host(), g = dout.host();
  for (int i = 0; i < 24; ++i) EXPECT_EQ(std::isnan(rows[i]), i >= 8);
  for (int i = 0; i < 32; ++i) EXPECT_EQ(d[i], i / 8 == 1 ? g[i - 8] : 0.0);
}

TEST_P(RopeCuda, FollowsTheCpu) {
  for (const Shape& shape : {Shape{1, 1, 2}, {5, 3, 6}, {7, 4, 64}, {33, 20, 128}, {6, 2, 256}, {3, 5, 130}}) {
    for (const std::int64_t shift : {0, 1}) {
      SCOPED_TRACE(shape.str() + " shift " + std::to_string(shift));
      const std::int64_t half = shape[2] / 2;
      const Owned<double> x = normal(shape);
      Owned<double> frequencies({half}), y(shape), back(shape);
      for (std::int64_t i = 0; i < half; ++i) {
        frequencies[i] = std::pow(10000.0, -static_cast<double>(i) / static_cast<double>(half));
      }
      // Positions whose angles are exact in float times frequencies that are: what differs is sine, cosine and sums.
      frequencies = testing::round_to(DType::f32, frequencies);
      Owned<std::int32_t> positions({shape[0]});
      for (std::int64_t t = 0; t < shape[0]; ++t) positions[t] = static_cast<std::int32_t>(t * 37);
      kernels::rope_forward(Stream::cpu(), x, positions, frequencies, 1.3f, y);
      kernels::rope_backward(Stream::cpu(), x, positions, frequencies, 1.3f, back);
      const OnDevice gx = upload(x, shift), gp(positions), gf(DType::f32, frequencies), gy = poisoned(shape, shift),
                     gback = poisoned(shape, shift);
      kernels::rope_forward(stream(), gx, gp, gf, 1.3f, gy);
      kernels::rope_backward(stream(), gx, gp, gf, 1.3f, gback);
      // An angle of up to 1184 rounds by 2^-24 of itself: 7e-5 at worst.
      const double error = std::max(tolerance(), 7e-5);
      EXPECT_LT(relative_rms(gy.host(), y), error);
      EXPECT_LT(relative_rms(gback.host(), back), error);
      kernels::rope_forward(stream(), gx, gp, gf, 1.3f, gx);
      expect_same_bits(gx, gy, "out in the memory of x");
    }
  }
}

// Long positions: the same float angle in both, so only its sine and cosine may differ.
TEST_P(RopeCuda, LongPositions) {
  const Shape shape{64, 1, 128};
  Owned<float> frequencies({64});
  Owned<std::int32_t> positions({64});
  for (int i = 0; i < 64; ++i) {
    frequencies[i] = static_cast<float>(std::pow(10000.0, -i / 64.0));
    positions[i] = 131072 + 9973 * i;
  }
  const Owned<double> x = normal(shape);
  const Owned<float> single = x.cast<float>();
  Owned<float> y(shape);
  kernels::rope_forward(Stream::cpu(), single, positions, frequencies, 1.0f, y);
  const OnDevice gx = upload(x), gp(positions), gf(DType::f32, frequencies.cast<double>()), gy = poisoned(shape);
  kernels::rope_forward(stream(), gx, gp, gf, 1.0f, gy);
  EXPECT_LT(relative_rms(gy.host(), y), tolerance());
}

INSTANTIATE_TEST_SUITE_P(DTypes, EmbeddingCuda, testing::model_dtypes(), testing::dtype_name);
INSTANTIATE_TEST_SUITE_P(DTypes, RopeCuda, testing::model_dtypes(), testing::dtype_name);

}  // namespace
}  // namespace deltapipe
