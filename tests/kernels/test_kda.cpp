// kda_forward and kda_backward against the recurrence in double and its finite differences.
#include "tests/kernels/kda_testing.h"

#include "core/parallel.h"

namespace deltapipe {
namespace {

using testing::all_finite;
using testing::KdaCase;
using testing::KdaRegime;
using testing::KdaShape;
using testing::Owned;
using testing::random_case;
using testing::recurrence;
using testing::relative_rms;
using testing::run_backward;
using testing::run_forward;

// Sums over a chunk and its triangular inverse keep about 1e-13 in double; float keeps 1e-7 a step and meets about a
// hundred steps.
constexpr double double_tolerance = 1e-10;
constexpr double float_tolerance = 1e-5;

template <class T>
void expect_forward(const KdaCase<double>& c, double tolerance, const std::string& what) {
  const auto truth = recurrence(c);
  const auto got = run_forward(c.template cast<T>());
  EXPECT_LT(relative_rms(got.o, truth.o), tolerance) << what << ", seed " << testing::test_seed();
  EXPECT_LT(relative_rms(got.state_out, truth.state_out), tolerance) << what << ", seed " << testing::test_seed();
}

/// Every gradient of <o, d_o> + <state_out, dstate_out> against central differences of kda_forward.
void expect_gradients(KdaCase<double> c, const std::string& what) {
  set_num_threads(1);  // thousands of calls too small to share
  const auto g = run_backward(c);
  const auto loss = [&] {
    const auto out = run_forward(c);
    return testing::inner(out.o, c.d_o) + testing::inner(out.state_out, c.dstate_out);
  };
  testing::expect_gradient(c.q, g.dq, loss, what + ": dq");
  testing::expect_gradient(c.k, g.dk, loss, what + ": dk");
  testing::expect_gradient(c.v, g.dv, loss, what + ": dv");
  testing::expect_gradient(c.f, g.df, loss, what + ": df");
  testing::expect_gradient(c.b, g.db, loss, what + ": db");
  testing::expect_gradient(c.a_log, g.da_log, loss, what + ": da_log");
  testing::expect_gradient(c.dt_bias, g.ddt_bias, loss, what + ": ddt_bias");
  testing::expect_gradient(c.state_in, g.dstate_in, loss, what + ": dstate_in");
  set_num_threads(0);
}

TEST(Kda, ChunkedEqualsRecurrenceForAnyLength) {
  RandomStream r(testing::test_seed(), "data");
  for (std::int64_t length : {1, 15, 16, 17, 63, 64, 65, 130}) {
    for (float bound : {0.0f, -5.0f}) {
      const auto c = random_case(r, {2, length, 3, 16, 11}, {.bound = bound});
      const std::string what = "length " + std::to_string(length) + ", bound " + std::to_string(bound);
      expect_forward<double>(c, double_tolerance, what);
      expect_forward<float>(c, float_tolerance, what);
    }
  }
}

TEST(Kda, ChunkedEqualsRecurrenceForAnyHeadSize) {
  RandomStream r(testing::test_seed(), "data");
  for (const auto& [k, v] : {std::pair{1, 1}, {3, 7}, {32, 32}, {40, 24}, {128, 128}}) {
    const auto c = random_case(r, {1, 100, 2, k, v});
    const std::string what = "K " + std::to_string(k) + ", V " + std::to_string(v);
    expect_forward<double>(c, double_tolerance, what);
    expect_forward<float>(c, float_tolerance, what);
  }
}

TEST(Kda, ManyHeadsRunHeadByHead) {
  RandomStream r(testing::test_seed(), "data");
  auto c = random_case(r, {9, 100, 5, 12, 9});  // 45 heads: more than the lanes, and no multiple of them
  c.pack(4, {-1, 40, 70});
  expect_forward<double>(c, double_tolerance, "45 heads");
  expect_forward<float>(c, float_tolerance, "45 heads");
}

TEST(Kda, WithoutIncomingStateItIsZero) {
  RandomStream r(testing::test_seed(), "data");
  auto c = random_case(r, {2, 70, 2, 8, 8});
  c.state_in.fill(0);
  c.dstate_out.fill(0);
  const auto with = run_forward(c);
  const auto g = run_backward(c);
  Owned<double> o(c.v.shape()), dstate_in(c.state_in.shape());
  Owned<double> dq(c.q.shape()), dk(c.q.shape()), dv(c.v.shape()), df(c.q.shape()), db(c.b.shape());
  testing::with_workspace([&](const Stream& stream, Arena& workspace) {
    kernels::kda_forward(stream, c.inputs(), Tensor(), Tensor(), o, Tensor(), workspace);
  });
  testing::with_workspace([&](const Stream& stream, Arena& workspace) {
    kernels::kda_backward(stream, c.inputs(), Tensor(), Tensor(), c.d_o, Tensor(),
                          {dq, dk, dv, df, db, Tensor(), Tensor()}, Tensor(), workspace);
  });
  EXPECT_TRUE(testing::same_bits(o, with.o));
  EXPECT_TRUE(testing::same_bits(dq, g.dq));
  EXPECT_TRUE(testing::same_bits(dk, g.dk));
  EXPECT_TRUE(testing::same_bits(dv, g.dv));
  EXPECT_TRUE(testing::same_bits(df, g.df));
  EXPECT_TRUE(testing::same_bits(db, g.db));
}

struct NamedRegime {
  const char* name;
  KdaRegime regime;
};

const NamedRegime regimes[] = {
    {"slow decay, g near 0", {.f_mean = -25.0}},
    {"fast decay, g near -50", {.f_mean = 60.0, .f_scale = 5.0}},
    {"bounded gate, slow", {.bound = -5.0f, .f_mean = -30.0, .f_scale = 5.0}},
    {"bounded gate, fast", {.bound = -5.0f, .f_mean = 20.0, .f_scale = 2.0}},
    {"decays from none to total in one chunk", {.f_scale = 40.0}},
    {"beta near 0", {.b_mean = -12.0}},
    {"beta near 1", {.b_mean = 18.0}},
    {"beta near 1, slow decay", {.f_mean = -25.0, .b_mean = 18.0}},
};

TEST(Kda, ExtremeRegimesStayExactAndFinite) {
  RandomStream r(testing::test_seed(), "data");
  for (const auto& [name, regime] : regimes) {
    const auto c = random_case(r, {2, 130, 2, 16, 16}, regime);
    expect_forward<double>(c, double_tolerance, name);
    expect_forward<float>(c, float_tolerance, name);
    const auto g = run_backward(c.cast<float>());
    for (const auto* x : {&g.dq, &g.dk, &g.dv, &g.df, &g.db, &g.da_log, &g.ddt_bias, &g.dstate_in}) {
      EXPECT_TRUE(all_finite(*x)) << name;
    }
  }
}

TEST(Kda, GradientsMatchFiniteDifferences) {
  RandomStream r(testing::test_seed(), "data");
  expect_gradients(random_case(r, {2, 70, 2, 5, 4}), "standard gate");
  expect_gradients(random_case(r, {1, 67, 2, 4, 6}, {.bound = -5.0f}), "bounded gate");
  expect_gradients(random_case(r, {1, 40, 1, 5, 4}, {.f_mean = -6.0, .b_mean = 5.0}), "slow decay, beta near 1");
  auto packed = random_case(r, {2, 75, 2, 5, 4});
  packed.pack(0, {-7, 3, 16, 17, 40, 64, 70});
  packed.pack(1, {0, 31, 33, 65});
  expect_gradients(packed, "packed documents");
}

TEST(Kda, FloatGradientsFollowDouble) {
  RandomStream r(testing::test_seed(), "data");
  for (float bound : {0.0f, -5.0f}) {
    auto c = random_case(r, {2, 130, 3, 32, 32}, {.bound = bound});
    c.pack(1, {-3, 20, 64, 100});
    // df, da_log and ddt_bias sum differences of terms a few times larger than themselves.
    testing::expect_close(run_backward(c.cast<float>()), run_backward(c), 3 * float_tolerance);
  }
}

TEST(Kda, GradientsOfParametersAccumulate) {
  RandomStream r(testing::test_seed(), "data");
  const auto c = random_case(r, {1, 20, 2, 4, 4});
  const auto g = run_backward(c);
  auto twice = run_backward(c);
  testing::with_workspace([&](const Stream& stream, Arena& workspace) {
    kernels::kda_backward(stream, c.inputs(), Tensor(), c.state_in, c.d_o, c.dstate_out,
                          {twice.dq, twice.dk, twice.dv, twice.df, twice.db, twice.da_log, twice.ddt_bias},
                          twice.dstate_in, workspace);
  });
  for (std::int64_t i = 0; i < g.da_log.size(); ++i) EXPECT_DOUBLE_EQ(twice.da_log[i], 2 * g.da_log[i]);
  for (std::int64_t i = 0; i < g.ddt_bias.size(); ++i) EXPECT_DOUBLE_EQ(twice.ddt_bias[i], 2 * g.ddt_bias[i]);
  EXPECT_TRUE(testing::same_bits(twice.dq, g.dq));
}

/// Rows [begin, end) of the only segment, as a case of its own.
KdaCase<double> cut(const KdaCase<double>& c, std::int64_t begin, std::int64_t end) {
  KdaCase<double> out(KdaShape{1, end - begin, c.n.heads, c.n.k, c.n.v});
  out.bound = c.bound;
  out.scale = c.scale;
  const auto rows = [&](const Owned<double>& from, Owned<double>& to) {
    const std::int64_t row = from.size() / c.n.length;
    std::copy(from.begin() + begin * row, from.begin() + end * row, to.begin());
  };
  rows(c.q, out.q);
  rows(c.k, out.k);
  rows(c.v, out.v);
  rows(c.f, out.f);
  rows(c.b, out.b);
  rows(c.d_o, out.d_o);
  out.a_log = c.a_log;
  out.dt_bias = c.dt_bias;
  out.state_in.fill(0);
  out.dstate_out.fill(0);
  out.start.fill(0);
  return out;
}

TEST(Kda, PackedDocumentsEqualSeparateDocuments) {
  RandomStream r(testing::test_seed(), "data");
  const std::vector<std::int32_t> starts = {0, 3, 16, 21, 22, 64, 100, 128};
  auto c = random_case(r, {1, 140, 2, 6, 5});
  c.pack(0, starts);
  const auto out = run_forward(c);
  const auto g = run_backward(c);
  Owned<double> da_log(c.a_log.shape()), ddt_bias(c.dt_bias.shape());
  da_log.fill(0);
  ddt_bias.fill(0);
  for (std::size_t i = 0; i < starts.size(); ++i) {
    const std::int64_t begin = starts[i], end = i + 1 < starts.size() ? starts[i + 1] : c.n.length;
    auto alone = cut(c, begin, end);
    if (end == c.n.length) alone.dstate_out = c.dstate_out;
    const auto out_alone = run_forward(alone);
    const auto g_alone = run_backward(alone);
    const auto expect_rows = [&](const Owned<double>& whole, const Owned<double>& part, const char* name) {
      const std::int64_t row = whole.size() / c.n.length;
      Owned<double> rows({(end - begin) * row});
      std::copy(whole.begin() + begin * row, whole.begin() + end * row, rows.begin());
      // A document's first token has no gate gradient: both are exactly zero.
      EXPECT_LT(relative_rms(rows, part), double_tolerance) << name << " of document at " << begin;
    };
    expect_rows(out.o, out_alone.o, "o");
    expect_rows(g.dq, g_alone.dq, "dq");
    expect_rows(g.dk, g_alone.dk, "dk");
    expect_rows(g.dv, g_alone.dv, "dv");
    expect_rows(g.df, g_alone.df, "df");
    expect_rows(g.db, g_alone.db, "db");
    for (std::int64_t j = 0; j < da_log.size(); ++j) da_log[j] += g_alone.da_log[j];
    for (std::int64_t j = 0; j < ddt_bias.size(); ++j) ddt_bias[j] += g_alone.ddt_bias[j];
    if (end == c.n.length) {
      EXPECT_LT(relative_rms(out.state_out, out_alone.state_out), double_tolerance);
    }
  }
  EXPECT_LT(relative_rms(g.da_log, da_log), double_tolerance);
  EXPECT_LT(relative_rms(g.ddt_bias, ddt_bias), double_tolerance);
  for (double x : g.dstate_in) EXPECT_EQ(x, 0.0);  // a new document at token 0 cuts the incoming state off
}

TEST(Kda, ThreadsAndGroupingDoNotChangeABit) {
  RandomStream r(testing::test_seed(), "data");
  // 2 segments x 2 heads are worked on chunk by chunk, 6 x 3 head by head.
  const auto few = random_case(r, {2, 150, 2, 16, 16}).cast<float>();
  const auto many = random_case(r, {6, 70, 3, 16, 16}).cast<float>();
  for (const auto* c : {&few, &many}) {
    set_num_threads(1);
    const auto one = run_forward(*c);
    const auto g_one = run_backward(*c);
    set_num_threads(2);
    const auto two = run_forward(*c);
    const auto g_two = run_backward(*c);
    set_num_threads(0);
    EXPECT_TRUE(testing::same_bits(one.o, two.o));
    EXPECT_TRUE(testing::same_bits(one.state_out, two.state_out));
    EXPECT_TRUE(testing::same_bits(g_one.dq, g_two.dq));
    EXPECT_TRUE(testing::same_bits(g_one.dk, g_two.dk));
    EXPECT_TRUE(testing::same_bits(g_one.dv, g_two.dv));
    EXPECT_TRUE(testing::same_bits(g_one.df, g_two.df));
    EXPECT_TRUE(testing::same_bits(g_one.db, g_two.db));
    EXPECT_TRUE(testing::same_bits(g_one.da_log, g_two.da_log));
    EXPECT_TRUE(testing::same_bits(g_one.ddt_bias, g_two.ddt_bias));
    EXPECT_TRUE(testing::same_bits(g_one.dstate_in, g_two.dstate_in));
  }
  // A segment's results are the same alone, where it is worked on in the other way.
  const std::int64_t tokens = many.n.length * many.n.heads;
  KdaCase<float> alone(KdaShape{1, many.n.length, many.n.heads, many.n.k, many.n.v});
  alone.scale = many.scale;
  const auto first = [](const Owned<float>& from, Owned<float>& to) {
    std::copy_n(from.begin(), to.size(), to.begin());
  };
  first(many.q, alone.q);
  first(many.k, alone.k);
  first(many.v, alone.v);
  first(many.f, alone.f);
  first(many.b, alone.b);
  first(many.a_log, alone.a_log);
  first(many.dt_bias, alone.dt_bias);
  first(many.state_in, alone.state_in);
  first(many.d_o, alone.d_o);
  first(many.dstate_out, alone.dstate_out);
  alone.start.fill(-1);
  const auto whole = run_backward(many), part = run_backward(alone);
  EXPECT_EQ(std::memcmp(whole.dk.begin(), part.dk.begin(), static_cast<std::size_t>(tokens * many.n.k) * sizeof(float)),
            0);
  EXPECT_EQ(std::memcmp(whole.df.begin(), part.df.begin(), static_cast<std::size_t>(tokens * many.n.k) * sizeof(float)),
            0);
}

TEST(Kda, RejectsWrongShapesAndTypes) {
  RandomStream r(testing::test_seed(), "data");
  const auto c = random_case(r, {1, 4, 2, 4, 4});
  Owned<double> o(c.v.shape()), short_o({1, 3, 2, 4});
  Owned<float> wrong_type(c.v.shape());
  Arena workspace = Arena::measuring("workspace");
  const Stream dry = Stream::dry({});
  EXPECT_NO_THROW(kernels::kda_forward(dry, c.inputs(), Tensor(), c.state_in, o, Tensor(), workspace));
  EXPECT_THROW(kernels::kda_forward(dry, c.inputs(), Tensor(), c.state_in, short_o, Tensor(), workspace),
               InternalError);
  EXPECT_THROW(kernels::kda_forward(dry, c.inputs(), Tensor(), c.state_in, wrong_type, Tensor(), workspace),
               InternalError);
  auto inputs = c.inputs();
  inputs.gate_lower_bound = 1.0f;
  EXPECT_THROW(kernels::kda_forward(dry, inputs, Tensor(), c.state_in, o, Tensor(), workspace), InternalError);
}

}  // namespace
}  // namespace deltapipe
