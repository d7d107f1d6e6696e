#include "kernels/attention.h"
#include "tests/kernels/testing.h"
#include "tests/kernels/threads.h"

namespace deltapipe {
namespace {

using testing::Owned;

const Stream cpu = Stream::cpu();

struct Size {
  std::int64_t queries, keys, heads, kv_heads, d;
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(d)); }
  Shape q_shape() const { return {queries, heads, d}; }
  Shape kv_shape() const { return {keys, kv_heads, d}; }
  Shape lse_shape() const { return {heads, queries}; }
};

/// First key of each query's document. `boundaries` are key indices at which documents begin, in rising order.
Owned<std::int32_t> starts_of(const Size& s, std::vector<std::int64_t> boundaries) {
  Owned<std::int32_t> start({s.queries});
  for (std::int64_t i = 0; i < s.queries; ++i) {
    start[i] = 0;
    for (const std::int64_t b : boundaries) {
      if (b <= s.keys - s.queries + i) start[i] = static_cast<std::int32_t>(b);
    }
  }
  return start;
}

struct Case {
  Size size;
  std::vector<std::int64_t> boundaries;
};
// One token; primes; whole blocks; groups of 1, 3 and 5; a prefix that is and is not a multiple of a block; documents
// that begin before the segment, inside it, at its first token, at block edges, many to a block; a start before key 0.
const Case cases[] = {{{1, 1, 1, 1, 1}, {}},
                      {{7, 7, 3, 1, 5}, {3}},
                      {{64, 64, 2, 2, 16}, {}},
                      {{131, 131, 5, 1, 24}, {}},
                      {{131, 131, 3, 3, 8}, {17, 64, 65, 128}},
                      {{130, 258, 6, 2, 12}, {}},
                      {{67, 200, 5, 1, 7}, {40}},
                      {{67, 200, 5, 1, 7}, {40, 133, 140, 199}},
                      {{200, 263, 3, 1, 9}, {62, 63, 64, 127, 191, 192, 193}},
                      {{193, 193, 1, 1, 4}, {5, 10, 15, 20, 25, 30, 35, 40, 100, 150, 190}},
                      {{1, 150, 10, 2, 33}, {70}},
                      {{129, 160, 3, 1, 3}, {-7}}};

template <class T>
struct Pass {
  Owned<T> q, k, v, d_o, o, lse, dq, dk, dv;
  explicit Pass(const Size& s)
      : q(s.q_shape()),
        k(s.kv_shape()),
        v(s.kv_shape()),
        d_o(s.q_shape()),
        o(s.q_shape()),
        lse(s.lse_shape()),
        dq(s.q_shape()),
        dk(s.kv_shape()),
        dv(s.kv_shape()) {}
  void randomise(RandomStream& r) {
    for (Owned<T>* x : {&q, &k, &v, &d_o}) x->normal(r);
  }
  void forward(const Size& s, const Owned<std::int32_t>& start) {
    Arena workspace("workspace", 0);
    kernels::attention_forward(cpu, q, k, v, start, s.scale(), o, lse, workspace);
  }
  void backward(const Size& s, const Owned<std::int32_t>& start, bool accumulate_kv = false) {
    Arena workspace("workspace", 1 << 20);
    kernels::attention_backward(cpu, d_o, q, k, v, o, lse, start, s.scale(), dq, dk, dv, accumulate_kv, workspace);
  }
};

/// The definition with whole rows of scores, in double: fills o, lse and the gradients.
void reference(const Size& s, const Owned<std::int32_t>& start, Pass<double>& x) {
  x.o.fill(0);
  for (auto* g : {&x.dq, &x.dk, &x.dv}) g->fill(0);
  const double scale = s.scale();
  std::vector<double> p(static_cast<std::size_t>(s.keys));
  for (std::int64_t h = 0; h < s.heads; ++h) {
    const std::int64_t kv = h / (s.heads / s.kv_heads);
    for (std::int64_t i = 0; i < s.queries; ++i) {
      const std::int64_t low = std::max(start[i], 0), high = s.keys - s.queries + i + 1;
      const std::int64_t qi = (i * s.heads + h) * s.d;
      const auto key = [&](std::int64_t j) { return (j * s.kv_heads + kv) * s.d; };
      const auto prob = [&](std::int64_t j) -> double& { return p[static_cast<std::size_t>(j)]; };
      double top = -std::numeric_limits<double>::infinity(), sum = 0, delta = 0;
      for (std::int64_t j = low; j < high; ++j) {
        prob(j) = 0;
        for (std::int64_t c = 0; c < s.d; ++c) prob(j) += scale * x.q[qi + c] * x.k[key(j) + c];
        top = std::max(top, prob(j));
      }
      for (std::int64_t j = low; j < high; ++j) sum += std::exp(prob(j) - top);
      x.lse[h * s.queries + i] = top + std::log(sum);
      for (std::int64_t j = low; j < high; ++j) {
        prob(j) = std::exp(prob(j) - top) / sum;
        for (std::int64_t c = 0; c < s.d; ++c) x.o[qi + c] += prob(j) * x.v[key(j) + c];
      }
      for (std::int64_t c = 0; c < s.d; ++c) delta += x.d_o[qi + c] * x.o[qi + c];
      for (std::int64_t j = low; j < high; ++j) {
        double dp = 0;
        for (std::int64_t c = 0; c < s.d; ++c) dp += x.d_o[qi + c] * x.v[key(j) + c];
        const double ds = scale * prob(j) * (dp - delta);
        for (std::int64_t c = 0; c < s.d; ++c) {
          x.dq[qi + c] += ds * x.k[key(j) + c];
          x.dk[key(j) + c] += ds * x.q[qi + c];
          x.dv[key(j) + c] += prob(j) * x.d_o[qi + c];
        }
      }
    }
  }
}

/// Compares everything a run gives with the definition; returns the largest relative RMS error.
template <class T>
double worst_error(const Case& c, RandomStream& r) {
  const Size& s = c.size;
  const auto start = starts_of(s, c.boundaries);
  Pass<T> x(s);
  x.randomise(r);
  x.forward(s, start);
  x.backward(s, start);
  Pass<double> e(s);
  e.q = x.q.template cast<double>();
  e.k = x.k.template cast<double>();
  e.v = x.v.template cast<double>();
  e.d_o = x.d_o.template cast<double>();
  reference(s, start, e);
  double worst = 0;
  const auto compare = [&](const Owned<T>& a, const Owned<double>& b) {
    double error = 0, norm = 0;
    for (std::int64_t i = 0; i < b.size(); ++i) {
      error += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
      norm += b[i] * b[i];
    }
    // Relative to at least 1 an element: dq and dk of a single token are zero, and rounding is all there is.
    const double relative = std::sqrt(error / std::max(norm, static_cast<double>(b.size())));
    EXPECT_FALSE(std::isnan(relative));
    worst = std::max(worst, relative);
  };
  compare(x.o, e.o);
  compare(x.lse, e.lse);
  compare(x.dq, e.dq);
  compare(x.dk, e.dk);
  compare(x.dv, e.dv);
  return worst;
}

TEST(Attention, MatchesDefinitionInDouble) {
  RandomStream r(testing::test_seed(), "data");
  // Sums of some hundred terms of size about 1 at 1e-16 each.
  for (const Case& c : cases) EXPECT_LT(worst_error<double>(c, r), 1e-13) << c.size.queries << " " << c.size.keys;
}

TEST(Attention, MatchesDefinitionInFloat) {
  RandomStream r(testing::test_seed(), "data");
  // The same at 6e-8; scores of size about 4 carry their error through exp.
  for (const Case& c : cases) EXPECT_LT(worst_error<float>(c, r), 2e-6) << c.size.queries << " " << c.size.keys;
}

TEST(Attention, GradientsMatchFiniteDifferences) {
  set_num_threads(1);  // a thousand tiny calls: waiting for a busy machine's other cores would take longer
  RandomStream r(testing::test_seed(), "data");
  for (const Case& c : {Case{{9, 9, 3, 1, 5}, {4}}, {{70, 141, 5, 1, 6}, {30, 75, 100}}, {{20, 90, 2, 2, 3}, {}}}) {
    const Size& s = c.size;
    const auto start = starts_of(s, c.boundaries);
    Pass<double> x(s);
    x.randomise(r);
    const auto loss = [&] {
      x.forward(s, start);
      return testing::inner(x.o, x.d_o);
    };
    loss();
    x.backward(s, start);
    testing::expect_gradient(x.q, x.dq, loss, "dq");
    testing::expect_gradient(x.k, x.dk, loss, "dk");
    testing::expect_gradient(x.v, x.dv, loss, "dv");
  }
  set_num_threads(0);
}

TEST(Attention, AccumulatesIntoKeysAndValues) {
  RandomStream r(testing::test_seed(), "data");
  const Size s{70, 150, 3, 1, 6};
  const auto start = starts_of(s, {20, 100});
  Pass<double> x(s);
  x.randomise(r);
  x.forward(s, start);
  x.backward(s, start);
  const Pass<double> once = x;
  Owned<double> base({s.keys, s.kv_heads, s.d});
  base.normal(r);
  x.dk = base;
  x.dv = base;
  x.backward(s, start, true);
  EXPECT_TRUE(testing::same_bits(x.dq, once.dq));  // overwritten all the same
  for (std::int64_t i = 0; i < base.size(); ++i) {
    ASSERT_NEAR(x.dk[i], base[i] + once.dk[i], 1e-13);  // a few sums of size about 1
    ASSERT_NEAR(x.dv[i], base[i] + once.dv[i], 1e-13);
  }
}

// A sequence cut into segments, each against all keys up to its end, as sequence parallelism does.
TEST(Attention, SegmentsGiveTheWholeSequence) {
  RandomStream r(testing::test_seed(), "data");
  const Size s{203, 203, 5, 1, 6};
  const auto start = starts_of(s, {50, 90, 160});
  Pass<double> whole(s);
  whole.randomise(r);
  whole.forward(s, start);
  whole.backward(s, start);
  Pass<double> joined = whole;
  joined.dk.fill(0);
  joined.dv.fill(0);
  for (auto* x : {&joined.o, &joined.lse, &joined.dq}) x->fill(std::numeric_limits<double>::quiet_NaN());
  Arena workspace("workspace", 1 << 20);
  for (const auto& [begin, end] : {std::pair{0, 1}, {1, 101}, {101, 203}}) {
    const auto rows = [b = begin, e = end](const Owned<double>& x) { return x.tensor().rows(b, e); };
    const auto upto = [e = end](const Owned<double>& x) { return x.tensor().rows(0, e); };
    const Tensor part = start.tensor().rows(begin, end);
    Owned<double> lse({s.heads, end - begin});
    kernels::attention_forward(cpu, rows(whole.q), upto(whole.k), upto(whole.v), part, s.scale(), rows(joined.o), lse,
                               workspace);
    kernels::attention_backward(cpu, rows(whole.d_o), rows(whole.q), upto(whole.k), upto(whole.v), rows(joined.o), lse,
                                part, s.scale(), rows(joined.dq), upto(joined.dk), upto(joined.dv), true, workspace);
    for (std::int64_t h = 0; h < s.heads; ++h) {
      for (std::int64_t i = begin; i < end; ++i) {
        joined.lse[h * s.queries + i] = lse[h * (end - begin) + i - begin];
      }
    }
  }
  // Blocks fall elsewhere, so sums are ordered otherwise.
  EXPECT_LT(testing::relative_rms(joined.o, whole.o), 1e-13);
  EXPECT_LT(testing::relative_rms(joined.lse, whole.lse), 1e-13);
  EXPECT_LT(testing::relative_rms(joined.dq, whole.dq), 1e-13);
  EXPECT_LT(testing::relative_rms(joined.dk, whole.dk), 1e-13);
  EXPECT_LT(testing::relative_rms(joined.dv, whole.dv), 1e-13);
}

TEST(Attention, PackedDocumentsAreSeparateDocuments) {
  RandomStream r(testing::test_seed(), "data");
  const Size s{230, 230, 3, 1, 8};
  const std::vector<std::int64_t> boundaries{0, 1, 70, 71, 128, 200, 230};
  const auto start = starts_of(s, boundaries);
  Pass<double> packed(s);
  packed.randomise(r);
  packed.forward(s, start);
  packed.backward(s, start);
  Pass<double> separate = packed;
  for (auto* x : {&separate.o, &separate.dq, &separate.dk, &separate.dv}) {
    x->fill(std::numeric_limits<double>::quiet_NaN());
  }
  Arena workspace("workspace", 1 << 20);
  for (std::size_t n = 0; n + 1 < boundaries.size(); ++n) {
    const std::int64_t length = boundaries[n + 1] - boundaries[n];
    const auto rows = [&](const Owned<double>& x) { return x.tensor().rows(boundaries[n], boundaries[n + 1]); };
    Owned<double> lse({s.heads, length});
    Owned<std::int32_t> zero({length});
    zero.fill(0);
    kernels::attention_forward(cpu, rows(packed.q), rows(packed.k), rows(packed.v), zero, s.scale(), rows(separate.o),
                               lse, workspace);
    kernels::attention_backward(cpu, rows(packed.d_o), rows(packed.q), rows(packed.k), rows(packed.v), rows(separate.o),
                                lse, zero, s.scale(), rows(separate.dq), rows(separate.dk), rows(separate.dv), false,
                                workspace);
  }
  // Blocks fall elsewhere, so sums are ordered otherwise.
  EXPECT_LT(testing::relative_rms(packed.o, separate.o), 1e-13);
  EXPECT_LT(testing::relative_rms(packed.dq, separate.dq), 1e-13);
  EXPECT_LT(testing::relative_rms(packed.dk, separate.dk), 1e-13);
  EXPECT_LT(testing::relative_rms(packed.dv, separate.dv), 1e-13);
}

// Whatever other documents hold, a document's results keep every bit.
TEST(Attention, OtherDocumentsAreMaskedExactly) {
  RandomStream r(testing::test_seed(), "data");
  const Size s{150, 250, 3, 1, 8};
  const std::int64_t begin = 130, end = 170;  // key indices of the document in the middle
  const auto start = starts_of(s, {40, begin, end});
  Pass<float> a(s);
  a.randomise(r);
  Pass<float> b = a;
  const auto disturb = [&](Owned<float>& x, std::int64_t first_key) {  // all rows outside the document
    const std::int64_t row = x.size() / x.shape()[0];
    for (std::int64_t i = 0; i < x.size(); ++i) {
      const std::int64_t key = i / row + first_key;
      if (key < begin || key >= end) x[i] = static_cast<float>(100 * r.next_normal());
    }
  };
  const std::int64_t first_query = s.keys - s.queries;
  disturb(b.q, first_query);
  disturb(b.d_o, first_query);
  disturb(b.k, 0);
  disturb(b.v, 0);
  for (Pass<float>* x : {&a, &b}) {
    x->forward(s, start);
    x->backward(s, start);
  }
  const auto same = [&](const Owned<float>& x, const Owned<float>& y, std::int64_t first_key) {
    const std::int64_t row = x.size() / x.shape()[0];
    for (std::int64_t i = (begin - first_key) * row; i < (end - first_key) * row; ++i) ASSERT_EQ(x[i], y[i]) << i / row;
  };
  same(a.o, b.o, first_query);
  same(a.dq, b.dq, first_query);
  same(a.dk, b.dk, 0);
  same(a.dv, b.dv, 0);
  // No query sees the keys before the first query's document.
  for (std::int64_t i = 0; i < 40 * s.kv_heads * s.d; ++i) {
    ASSERT_EQ(b.dk[i], 0.0f);
    ASSERT_EQ(b.dv[i], 0.0f);
  }
}

TEST(Attention, LargeScoresDoNotOverflow) {
  RandomStream r(testing::test_seed(), "data");
  const Size s{150, 150, 1, 1, 4};
  const auto start = starts_of(s, {});
  Pass<float> x(s);
  x.randomise(r);
  for (float& v : x.q) v *= 1000;
  x.forward(s, start);
  x.backward(s, start);
  Pass<double> e(s);
  e.q = x.q.cast<double>();
  e.k = x.k.cast<double>();
  e.v = x.v.cast<double>();
  e.d_o = x.d_o.cast<double>();
  reference(s, start, e);
  // Scores of about 1000 carry an error of 1e-4, which exp turns into a relative one.
  EXPECT_LT(testing::relative_rms(x.o, e.o), 1e-3);
  EXPECT_LT(testing::relative_rms(x.lse, e.lse), 1e-6);
  EXPECT_LT(testing::relative_rms(x.dv, e.dv), 1e-3);
}

TEST(Attention, NanIsNotHidden) {
  RandomStream r(testing::test_seed(), "data");
  const Size s{70, 70, 1, 1, 4};
  const auto start = starts_of(s, {});
  Pass<float> x(s);
  x.randomise(r);
  x.q[66 * s.d] = std::numeric_limits<float>::quiet_NaN();
  x.forward(s, start);
  for (std::int64_t i = 0; i < s.queries; ++i) EXPECT_EQ(std::isnan(x.o[i * s.d]), i == 66) << i;
}

TEST(Attention, ResultsDoNotDependOnThreads) {
  RandomStream r(testing::test_seed(), "data");
  for (const Case& c : {Case{{300, 420, 6, 2, 16}, {}}, {{333, 333, 3, 1, 9}, {64, 100, 101, 290}}}) {
    const Size& s = c.size;
    const auto start = starts_of(s, c.boundaries);
    Pass<float> x(s);
    x.randomise(r);
    testing::expect_same_on_any_threads([&] {
      Pass<float> y = x;
      y.forward(s, start);
      y.backward(s, start);
      return std::vector{y.o, y.lse, y.dq, y.dk, y.dv};
    });
  }
}

TEST(Attention, ADryRunMeasuresTheWorkspaceOfARealOne) {
  RandomStream r(testing::test_seed(), "data");
  const Size s{133, 190, 5, 1, 8};
  const auto start = starts_of(s, {7, 99});
  Pass<float> x(s);
  x.randomise(r);
  const auto run = [&](const Stream& stream, Arena& workspace) {
    kernels::attention_forward(stream, x.q, x.k, x.v, start, s.scale(), x.o, x.lse, workspace);
    const std::size_t forward = workspace.peak();
    kernels::attention_backward(stream, x.d_o, x.q, x.k, x.v, x.o, x.lse, start, s.scale(), x.dq, x.dk, x.dv, false,
                                workspace);
    EXPECT_EQ(workspace.used(), 0u);
    return std::pair{forward, workspace.peak()};
  };
  Arena measuring = Arena::measuring("measuring");
  const auto measured = run(Stream::dry({}), measuring);
  for (const float v : x.o) ASSERT_TRUE(std::isnan(v));  // nothing was written
  Arena real("workspace", measured.second);
  EXPECT_EQ(run(cpu, real), measured);
  EXPECT_GT(measured.second, 0u);
  for (const float v : x.dk) ASSERT_FALSE(std::isnan(v));
  Arena small("workspace", measured.second - Arena::alignment);
  EXPECT_THROW(run(cpu, small), MemoryError);
}

TEST(Attention, RefusesStartsAndShapesThatBreakTheContract) {
  const Size s{4, 6, 2, 1, 3};
  Pass<float> x(s);
  RandomStream r(testing::test_seed(), "data");
  x.randomise(r);
  auto start = starts_of(s, {});
  x.forward(s, start);
  start[2] = 5;  // query 2 sits at key 4
  EXPECT_THROW(x.forward(s, start), InternalError);
  EXPECT_THROW(x.backward(s, start), InternalError);
  start[2] = 0;
  start[1] = 2;  // falls again at query 2
  EXPECT_THROW(x.forward(s, start), InternalError);
  Pass<float> three_heads({4, 6, 3, 2, 3});
  EXPECT_THROW(three_heads.forward(s, starts_of(s, {})), InternalError);
  Pass<float> few_keys({4, 3, 2, 1, 3});
  EXPECT_THROW(few_keys.forward(s, starts_of(s, {})), InternalError);
}

}  // namespace
}  // namespace deltapipe
