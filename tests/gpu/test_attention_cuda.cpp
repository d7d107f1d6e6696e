// kernels/attention.h on CUDA against the CPU in double on the same bf16 inputs.
#include "kernels/attention.h"
#include "kernels/settings.h"
#include "tests/gpu/testing.h"

namespace deltapipe {
namespace {

using testing::gpu_stream;
using testing::OnDevice;
using testing::Owned;

struct Size {
  std::int64_t queries, keys, heads, kv_heads, d;
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(d)); }
  Shape q_shape() const { return {queries, heads, d}; }
  Shape kv_shape() const { return {keys, kv_heads, d}; }
  Shape lse_shape() const { return {heads, queries}; }
};

struct Case {
  Size size;
  std::vector<std::int64_t> boundaries;  // key indices at which documents begin, in rising order
};

// One token; lengths that no tile divides; groups of 1, 3 and 5 heads; head sizes 16 to 256; a prefix of keys before
// the queries; documents that begin before the segment, inside it, at its first token, at the edges of tiles, many to a
// segment, of one token; a start before key 0; more queries than a block of the deterministic backward, in one document
// and in several.
const Case cases[] = {{{1, 1, 1, 1, 16}, {}},
                      {{7, 7, 3, 1, 32}, {3}},
                      {{64, 64, 2, 2, 64}, {}},
                      {{131, 131, 5, 1, 128}, {}},
                      {{131, 131, 3, 3, 128}, {17, 64, 65, 128}},
                      {{130, 258, 6, 2, 64}, {}},
                      {{67, 200, 5, 1, 128}, {40}},
                      {{67, 200, 5, 1, 128}, {40, 133, 140, 199}},
                      {{200, 263, 3, 1, 48}, {62, 63, 64, 127, 191, 192, 193}},
                      {{193, 193, 1, 1, 16}, {5, 10, 15, 20, 25, 30, 35, 40, 100, 150, 190}},
                      {{1, 150, 10, 2, 128}, {70}},
                      {{129, 160, 3, 1, 256}, {-7}},
                      {{1500, 2100, 5, 1, 128}, {}},
                      {{2300, 2300, 4, 2, 64}, {100, 150, 1900}},
                      {{1100, 1500, 5, 1, 128}, {300, 1450}}};

Owned<std::int32_t> starts_of(const Case& c) {
  Owned<std::int32_t> start({c.size.queries});
  for (std::int64_t i = 0; i < c.size.queries; ++i) {
    start[i] = 0;
    for (const std::int64_t b : c.boundaries) {
      if (b <= c.size.keys - c.size.queries + i) start[i] = static_cast<std::int32_t>(b);
    }
  }
  return start;
}

std::string name_of(const Case& c) {
  const Size& s = c.size;
  std::string text =
      fmt::format("{} of {} keys, {} / {} heads of {}, documents", s.queries, s.keys, s.heads, s.kv_heads, s.d);
  for (const std::int64_t b : c.boundaries) text += " " + std::to_string(b);
  return text;
}

class AttentionCuda : public testing::GpuTest<::testing::TestWithParam<bool>> {
 protected:
  void SetUp() override {
    GpuTest::SetUp();
    kernels::settings().deterministic = GetParam();
  }
  void TearDown() override { kernels::settings() = {}; }
};

/// Inputs and, after run_truth, what they give in double.
struct Pass {
  Owned<double> q, k, v, d_o, o, lse, dq, dk, dv;
};

struct DevicePass {
  OnDevice q, k, v, d_o, o, lse, dq, dk, dv;

  DevicePass(const Pass& p, const Size& s)
      : q(DType::bf16, p.q),
        k(DType::bf16, p.k),
        v(DType::bf16, p.v),
        d_o(DType::bf16, p.d_o),
        o(DType::bf16, s.q_shape()),
        lse(DType::f32, s.lse_shape()),
        dq(DType::bf16, s.q_shape()),
        dk(DType::bf16, s.kv_shape()),
        dv(DType::bf16, s.kv_shape()) {}

  void forward(const Size& s, const Owned<std::int32_t>& start) {
    testing::with_planned_workspace([&](const Stream& stream, Arena& workspace) {
      kernels::attention_forward(stream, q, k, v, start, s.scale(), o, lse, workspace);
    });
  }
  void backward(const Size& s, const Owned<std::int32_t>& start, bool accumulate) {
    testing::with_planned_workspace([&](const Stream& stream, Arena& workspace) {
      kernels::attention_backward(stream, d_o, q, k, v, o, lse, start, s.scale(), dq, dk, dv, accumulate, workspace);
    });
  }
};

// cuDNN rounds probabilities and dS to bf16 before the second product, and results once more: 1.7e-3 each in the root
// mean square, which sums of many terms partly average out. Gradients also take in the error of the rounded o, and are
// differences of numbers larger than they are.
constexpr double tolerance_of_o = 4e-3;
constexpr double tolerance_of_gradients = 1e-2;
// Scores are summed in fp32, exp and log approximated to about 1e-6; |lse| is at most about 10.
constexpr double tolerance_of_lse = 1e-4;

TEST_P(AttentionCuda, ForwardAndBackward) {
  for (const Case& c : cases) {
    const Size& s = c.size;
    SCOPED_TRACE(name_of(c));
    const Owned<std::int32_t> start = starts_of(c);
    const auto random_q = [&] { return normal(DType::bf16, s.q_shape()); };
    const auto random_kv = [&] { return normal(DType::bf16, s.kv_shape()); };
    Pass x{random_q(),
           random_kv(),
           random_kv(),
           random_q(),
           Owned<double>(s.q_shape()),
           Owned<double>(s.lse_shape()),
           Owned<double>(s.q_shape()),
           Owned<double>(s.kv_shape()),
           Owned<double>(s.kv_shape())};
    Arena workspace("workspace", 1 << 22);
    kernels::attention_forward(Stream::cpu(), x.q, x.k, x.v, start, s.scale(), x.o, x.lse, workspace);
    kernels::attention_backward(Stream::cpu(), x.d_o, x.q, x.k, x.v, x.o, x.lse, start, s.scale(), x.dq, x.dk, x.dv,
                                false, workspace);
    DevicePass on(x, s);
    on.forward(s, start);
    EXPECT_LT(testing::relative_rms(on.o.host(), x.o), tolerance_of_o);
    const Owned<double> lse = on.lse.host();
    for (std::int64_t i = 0; i < lse.size(); ++i) ASSERT_NEAR(lse[i], x.lse[i], tolerance_of_lse) << i;
    on.backward(s, start, false);
    if (s.queries > 1) {  // a single query's softmax may see a single key: its gradients are noise around zero
      EXPECT_LT(testing::relative_rms(on.dq.host(), x.dq), tolerance_of_gradients);
      EXPECT_LT(testing::relative_rms(on.dk.host(), x.dk), tolerance_of_gradients);
    }
    EXPECT_LT(testing::relative_rms(on.dv.host(), x.dv), tolerance_of_gradients);

    const Owned<double> dk_before = random_kv(), dv_before = random_kv();
    on.dk.write(dk_before);
    on.dv.write(dv_before);
    on.dq.poison();
    on.backward(s, start, true);
    Owned<double> dk = dk_before, dv = dv_before;
    for (std::int64_t i = 0; i < dk.size(); ++i) {
      dk[i] += x.dk[i];
      dv[i] += x.dv[i];
    }
    EXPECT_LT(testing::relative_rms(on.dk.host(), dk), tolerance_of_gradients);
    EXPECT_LT(testing::relative_rms(on.dv.host(), dv), tolerance_of_gradients);
    if (s.queries > 1) {
      EXPECT_LT(testing::relative_rms(on.dq.host(), x.dq), tolerance_of_gradients);
    }
  }
}

TEST_P(AttentionCuda, LargeScores) {
  // Probabilities near 0 and 1: the softmax must not overflow, and lse follows the largest score.
  const Case c{{200, 200, 4, 2, 64}, {90}};
  const Owned<double> q = normal(DType::bf16, c.size.q_shape(), 12), k = normal(DType::bf16, c.size.kv_shape(), 12),
                      v = normal(DType::bf16, c.size.kv_shape());
  Owned<double> o(c.size.q_shape()), lse(c.size.lse_shape());
  const Owned<std::int32_t> start = starts_of(c);
  Arena workspace("workspace", 1 << 20);
  kernels::attention_forward(Stream::cpu(), q, k, v, start, c.size.scale(), o, lse, workspace);
  DevicePass on({q, k, v, q, o, lse, o, v, v}, c.size);
  on.forward(c.size, start);
  EXPECT_LT(testing::relative_rms(on.o.host(), o), tolerance_of_o);
  EXPECT_LT(testing::relative_rms(on.lse.host(), lse), tolerance_of_lse);
}

TEST_P(AttentionCuda, ASegmentsLseAtAnyAddress) {
  const Case c{{133, 133, 3, 1, 64}, {}};
  const Owned<double> q = normal(DType::bf16, c.size.q_shape()), k = normal(DType::bf16, c.size.kv_shape()),
                      v = normal(DType::bf16, c.size.kv_shape()), d_o = normal(DType::bf16, c.size.q_shape());
  Pass x{q, k, v, d_o, q, Owned<double>(c.size.lse_shape()), q, k, k};
  const Owned<std::int32_t> start = starts_of(c);
  DevicePass on(x, c.size), alone(x, c.size);
  const OnDevice both(DType::f32, Shape{2, c.size.heads, c.size.queries});  // the second begins at 1,596 bytes
  testing::with_planned_workspace([&](const Stream& stream, Arena& workspace) {
    const Tensor lse = both.tensor().at(1);
    kernels::attention_forward(stream, on.q, on.k, on.v, start, c.size.scale(), on.o, lse, workspace);
    kernels::attention_backward(stream, on.d_o, on.q, on.k, on.v, on.o, lse, start, c.size.scale(), on.dq, on.dk, on.dv,
                                false, workspace);
  });
  alone.forward(c.size, start);
  alone.backward(c.size, start, false);
  EXPECT_EQ(on.o.raw(), alone.o.raw());
  EXPECT_EQ(on.dk.raw(), alone.dk.raw());
  EXPECT_LT(testing::relative_rms(on.dq.host(), alone.dq.host()), tolerance_of_gradients);
}

TEST_P(AttentionCuda, WrongStartsAreRefused) {
  const Size s{4, 4, 1, 1, 16};
  const Owned<double> x = normal(DType::bf16, s.q_shape());
  DevicePass on({x, x, x, x, x, Owned<double>(s.lse_shape()), x, x, x}, s);
  Arena workspace("workspace", 1 << 22, testing::gpu());
  Owned<std::int32_t> start({4});
  start.fill(0);
  start[1] = 2;  // after its own query
  EXPECT_THROW(kernels::attention_forward(gpu_stream(), on.q, on.k, on.v, start, 1, on.o, on.lse, workspace),
               InternalError);
  const Tensor on_device(on.lse.tensor().data, DType::i32, {4}, testing::gpu());
  EXPECT_THROW(kernels::attention_forward(gpu_stream(), on.q, on.k, on.v, on_device, 1, on.o, on.lse, workspace),
               InternalError);
}

INSTANTIATE_TEST_SUITE_P(Backward, AttentionCuda, ::testing::Values(true, false),
                         [](const auto& b) { return b.param ? "deterministic" : "fast"; });

class AttentionRepeats : public testing::GpuTest<> {};

TEST_F(AttentionRepeats, DeterministicBackwardGivesTheSameBits) {
  // Enough blocks at work that atomics would add in another order.
  for (const Case& c : {Case{{3000, 4000, 20, 4, 128}, {}}, Case{{3000, 3000, 10, 2, 128}, {200, 210, 900, 2500}}}) {
    const Size& s = c.size;
    const Owned<std::int32_t> start = starts_of(c);
    const Owned<double> q = normal(DType::bf16, s.q_shape()), k = normal(DType::bf16, s.kv_shape()),
                        v = normal(DType::bf16, s.kv_shape()), d_o = normal(DType::bf16, s.q_shape());
    DevicePass on({q, k, v, d_o, q, Owned<double>(s.lse_shape()), q, k, k}, s);
    on.forward(s, start);
    on.backward(s, start, false);
    const auto dq = on.dq.raw(), dk = on.dk.raw(), dv = on.dv.raw();
    for (int run = 0; run < 3; ++run) {
      for (OnDevice* t : {&on.dq, &on.dk, &on.dv}) t->poison();
      on.backward(s, start, false);
      EXPECT_EQ(on.dq.raw(), dq);
      EXPECT_EQ(on.dk.raw(), dk);
      EXPECT_EQ(on.dv.raw(), dv);
    }
  }
}

}  // namespace
}  // namespace deltapipe
