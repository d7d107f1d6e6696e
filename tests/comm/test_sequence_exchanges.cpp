// Halo and keys: every rank holds its share of what one rank would hold, to the bit, and the adjoints are adjoints.
#include "comm/sequence_parallel.h"
#include "tests/comm/testing.h"

namespace deltapipe {
namespace {

using testing::Owned;
using testing::runtime;
using testing::same_bits;

struct Case {
  LayoutKind kind;
  std::int64_t batch, length, width, channels;  // length of a segment, width W of the convolution
};

class SequenceExchanges : public ::testing::TestWithParam<Case> {
 protected:
  SequenceExchanges()
      : world(runtime().world()),
        sp(world, GetParam().kind),
        n(GetParam()),
        segments(n.batch * sp.layout().local_segments()),
        tokens(n.length * sp.layout().segments()),
        rows(n.width - 1),
        random(testing::test_seed(), "data") {
    world.reset_traffic();
  }
  template <class T>
  Owned<T> whole() {
    Owned<T> x({n.batch, tokens, n.channels});
    x.normal(random);
    return x;
  }
  /// Row i of the halo before local segment s is this sequence token; negative before the sequence.
  std::int64_t token_of_halo(std::int64_t s, std::int64_t i) const {
    const auto first = testing::first_tokens(sp.layout(), world.rank(), n.length);
    return first[static_cast<std::size_t>(s) % first.size()] - rows + i;
  }

  Communicator& world;
  const SequenceParallel sp;
  const Case n;
  const std::int64_t segments, tokens, rows;
  RandomStream random;
};

TEST_P(SequenceExchanges, HaloIsTheRowsBefore) {
  const Owned<float> all = whole<float>(), x = testing::cut(sp.layout(), world.rank(), all);
  Owned<float> expected({segments, rows, n.channels});
  for (std::int64_t s = 0; s < segments; ++s) {
    for (std::int64_t i = 0; i < rows; ++i) {
      const std::int64_t t = token_of_halo(s, i), b = s / sp.layout().local_segments();
      for (std::int64_t d = 0; d < n.channels; ++d) {
        expected[(s * rows + i) * n.channels + d] = t < 0 ? 0.0f : all[(b * tokens + t) * n.channels + d];
      }
    }
  }
  testing::with_exact_workspace([&](const Stream& stream, Arena& workspace) {
    Owned<float> halo(expected.shape());
    sp.gather_halo(stream, x, halo, workspace);
    if (!stream.is_dry()) {
      EXPECT_TRUE(same_bits(halo, expected));
    }
  });
  const auto ranks = static_cast<std::uint64_t>(world.size()), rank = static_cast<std::uint64_t>(world.rank());
  std::uint64_t messages = rank + 1 < ranks ? 1 : 0;
  if (n.kind == LayoutKind::zigzag) messages += rank > 0 ? 1 : 0;
  const auto bytes = static_cast<std::uint64_t>(n.batch * rows * n.channels) * sizeof(float);
  EXPECT_EQ(world.traffic(Purpose::conv_halo), (Traffic{messages, messages * bytes, ranks > 1 ? 1u : 0u}));
}

TEST_P(SequenceExchanges, ReturnedHaloIsAddedWhereItCameFrom) {
  const Owned<double> all = whole<double>(), x = testing::cut(sp.layout(), world.rank(), all);
  // The gradient of a halo row is a function of sequence, token and channel, so that every rank knows the others'.
  const auto gradient = [&](std::int64_t b, std::int64_t t, std::int64_t d) {
    return std::sin(static_cast<double>((b * tokens + t) * n.channels + d));
  };
  Owned<double> dhalo({segments, rows, n.channels});
  for (std::int64_t s = 0; s < segments; ++s) {
    for (std::int64_t i = 0; i < rows * n.channels; ++i) {
      dhalo[s * rows * n.channels + i] =
          gradient(s / sp.layout().local_segments(), token_of_halo(s, i / n.channels), i % n.channels);
    }
  }
  Owned<double> sum = all;  // every segment but a sequence's last gets its last rows' gradients
  for (std::int64_t b = 0; b < n.batch; ++b) {
    for (std::int64_t end = n.length; end < tokens; end += n.length) {
      for (std::int64_t t = end - rows; t < end; ++t) {
        for (std::int64_t d = 0; d < n.channels; ++d) sum[(b * tokens + t) * n.channels + d] += gradient(b, t, d);
      }
    }
  }
  const Owned<double> expected = testing::cut(sp.layout(), world.rank(), sum);
  testing::with_exact_workspace([&](const Stream& stream, Arena& workspace) {
    Owned<double> dx = x;
    sp.return_halo(stream, dhalo, dx, workspace);
    if (!stream.is_dry()) {
      EXPECT_TRUE(same_bits(dx, expected));
    }
  });
}

TEST_P(SequenceExchanges, KeysAreGatheredInSequenceOrder) {
  const Owned<double> all = whole<double>(), x = testing::cut(sp.layout(), world.rank(), all);
  testing::with_exact_workspace([&](const Stream& stream, Arena& workspace) {
    Owned<double> keys(all.shape());
    sp.gather_keys(stream, x, keys, workspace);
    if (!stream.is_dry()) {
      EXPECT_TRUE(same_bits(keys, all));
    }
  });
  const auto peers = static_cast<std::uint64_t>(world.size() - 1);
  EXPECT_EQ(world.traffic(Purpose::attention_kv),
            (Traffic{peers, peers * static_cast<std::uint64_t>(x.size()) * sizeof(double), peers > 0 ? 1u : 0u}));
}

TEST_P(SequenceExchanges, KeyGradientsAreSummedInRankOrder) {
  const auto contribution = [&](int rank) {
    RandomStream r(testing::test_seed(), "rank " + std::to_string(rank));
    Owned<double> x({n.batch, tokens, n.channels});
    x.normal(r);
    return x;
  };
  Owned<double> sum = contribution(0);
  for (int rank = 1; rank < world.size(); ++rank) {
    const Owned<double> x = contribution(rank);
    for (std::int64_t i = 0; i < sum.size(); ++i) sum[i] += x[i];
  }
  const Owned<double> own = contribution(world.rank()), expected = testing::cut(sp.layout(), world.rank(), sum);
  testing::with_exact_workspace([&](const Stream& stream, Arena& workspace) {
    const Owned<double> whole_gradient = own;
    Owned<double> local({segments, n.length, n.channels});
    sp.scatter_key_gradients(stream, whole_gradient, local, workspace);
    if (!stream.is_dry()) {
      EXPECT_TRUE(same_bits(local, expected));
    }
  });
  const auto peers = static_cast<std::uint64_t>(world.size() - 1);
  EXPECT_EQ(
      world.traffic(Purpose::attention_kv),
      (Traffic{peers, peers * static_cast<std::uint64_t>(expected.size()) * sizeof(double), peers > 0 ? 1u : 0u}));
}

TEST_P(SequenceExchanges, StartedTogetherFinishedInAnyOrder) {
  const Stream stream = Stream::cpu();
  Arena workspace("workspace", 1 << 20);
  const Owned<double> k = whole<double>(), v = whole<double>();
  const Owned<double> local_k = testing::cut(sp.layout(), world.rank(), k);
  const Owned<double> local_v = testing::cut(sp.layout(), world.rank(), v);
  Owned<double> all_k(k.shape()), all_v(v.shape()), halo({segments, rows, n.channels}), again(halo.shape());
  SequenceParallel::Started keys = sp.start_gather_keys(stream, local_k, all_k, workspace);
  SequenceParallel::Started rows_before = sp.start_gather_halo(stream, local_k, halo, workspace);
  SequenceParallel::Started values = sp.start_gather_keys(stream, local_v, all_v, workspace);
  sp.gather_halo(stream, local_k, again, workspace);
  sp.finish_gather_keys(stream, values);
  sp.finish_gather_halo(stream, rows_before);
  sp.finish_gather_keys(stream, keys);
  EXPECT_TRUE(same_bits(all_k, k));
  EXPECT_TRUE(same_bits(all_v, v));
  EXPECT_TRUE(same_bits(halo, again));
}

INSTANTIATE_TEST_SUITE_P(Cases, SequenceExchanges,
                         ::testing::Values(Case{LayoutKind::contiguous, 1, 5, 4, 6},
                                           Case{LayoutKind::zigzag, 1, 5, 4, 6},
                                           Case{LayoutKind::contiguous, 3, 3, 4, 2},  // segments as long as the halo
                                           Case{LayoutKind::zigzag, 3, 3, 4, 2}, Case{LayoutKind::zigzag, 2, 7, 2, 1},
                                           Case{LayoutKind::contiguous, 2, 1, 1, 3}),  // W = 1: no halo
                         [](const auto& test) {
                           const Case& c = test.param;
                           return fmt::format("{}B{}L{}W{}D{}", name_of(c.kind), c.batch, c.length, c.width,
                                              c.channels);
                         });

}  // namespace
}  // namespace deltapipe
