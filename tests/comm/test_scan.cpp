// The state scans against a walk over all segments, one after another, and their traffic against the formulas of
// comm/sequence_parallel.h.
#include "comm/sequence_parallel.h"
#include "tests/comm/testing.h"

#include <chrono>
#include <thread>

namespace deltapipe {
namespace {

using testing::Owned;
using testing::relative_rms;
using testing::runtime;

struct Sizes {
  std::int64_t batch, heads, k, v;
};

/// Random maps of whole sequences of G segments: m [B, G, H, K, K] of gain about 1 a segment, e [B, G, H, K, V].
struct Maps {
  Sizes n;
  std::int64_t segments;
  Owned<double> m, e;

  Maps(const Sizes& sizes, std::int64_t g)
      : n(sizes), segments(g), m({n.batch, g, n.heads, n.k, n.k}), e({n.batch, g, n.heads, n.k, n.v}) {
    RandomStream r(testing::test_seed(), "maps");
    m.normal(r, 1.0 / std::sqrt(static_cast<double>(n.k)));
    e.normal(r);
    for (Owned<double>* x : {&m, &e}) {  // values of float, so that the casts below change nothing
      for (double& value : *x) value = static_cast<float>(value);
    }
  }
  /// The state (or gradient) beside every segment, by S <- M S + E from the first segment on, or S <- M^T S + E from
  /// the last one back.
  Owned<double> walk(bool backward) const {
    Owned<double> out(e.shape());
    const std::int64_t state_size = n.k * n.v;
    for (std::int64_t b = 0; b < n.batch; ++b) {
      for (std::int64_t h = 0; h < n.heads; ++h) {
        std::vector<double> state(static_cast<std::size_t>(state_size), 0.0), next(state);
        for (std::int64_t i = 0; i < segments; ++i) {
          const std::int64_t g = backward ? segments - 1 - i : i, at = (b * segments + g) * n.heads + h;
          std::copy(state.begin(), state.end(), out.begin() + at * state_size);
          for (std::int64_t x = 0; x < n.k; ++x) {
            for (std::int64_t y = 0; y < n.v; ++y) {
              double sum = e[at * state_size + x * n.v + y];
              for (std::int64_t z = 0; z < n.k; ++z) {
                const std::int64_t from = backward ? z * n.k + x : x * n.k + z;
                sum += m[at * n.k * n.k + from] * state[static_cast<std::size_t>(z * n.v + y)];
              }
              next[static_cast<std::size_t>(x * n.v + y)] = sum;
            }
          }
          std::swap(state, next);
        }
      }
    }
    return out;
  }
};

/// Runs the scan of this rank's segments; both ways share the workspace, as layers do.
template <class T>
Owned<T> run(const SequenceParallel& sp, const Maps& maps, bool backward) {
  const Owned<T> m = testing::cut(sp.layout(), sp.rank(), maps.m).template cast<T>();
  const Owned<T> e = testing::cut(sp.layout(), sp.rank(), maps.e).template cast<T>();
  const std::int64_t local = maps.n.batch * sp.layout().local_segments();
  const Shape map{local, maps.n.heads, maps.n.k, maps.n.k}, state{local, maps.n.heads, maps.n.k, maps.n.v};
  Owned<T> out(state);
  testing::with_exact_workspace([&](const Stream& stream, Arena& workspace) {
    if (backward) {
      sp.scan_backward(stream, m.tensor().view(map), e.tensor().view(state), out, workspace);
    } else {
      sp.scan(stream, m.tensor().view(map), e.tensor().view(state), out, workspace);
    }
  });
  return out;
}

class Scan : public ::testing::TestWithParam<std::tuple<LayoutKind, Sizes, bool>> {
 protected:
  Scan()
      : world(runtime().world()),
        sp(world, std::get<0>(GetParam())),
        n(std::get<1>(GetParam())),
        backward(std::get<2>(GetParam())),
        maps(n, sp.layout().segments()),
        expected(testing::cut(sp.layout(), world.rank(), maps.walk(backward))) {
    world.reset_traffic();
  }

  Communicator& world;
  const SequenceParallel sp;
  const Sizes n;
  const bool backward;
  const Maps maps;
  const Owned<double> expected;
};

TEST_P(Scan, EqualsTheWalkOverAllSegments) {
  // At most 16 maps in another order of association: sums of K terms each, some hundred roundings of 1.1e-16 and 6e-8.
  EXPECT_LT(relative_rms(run<double>(sp, maps, backward), expected), 1e-12);
  EXPECT_LT(relative_rms(run<float>(sp, maps, backward), expected), 5e-6);
}

TEST_P(Scan, WhereTheWalkBeginsTheStateIsZeroExactly) {
  const Owned<double> states = run<double>(sp, maps, backward);
  const SequenceLayout& layout = sp.layout();
  const int segment = backward ? layout.segments() - 1 : 0;
  if (layout.owner_of(segment) != world.rank()) return;
  const std::int64_t slots = layout.local_segments(), size = n.heads * n.k * n.v;
  for (std::int64_t b = 0; b < n.batch; ++b) {
    const std::int64_t first = (b * slots + layout.slot_of(segment)) * size;
    for (std::int64_t i = first; i < first + size; ++i) EXPECT_EQ(states[i], 0.0);
  }
}

TEST_P(Scan, SameBitsEveryTime) {
  const Owned<float> first = run<float>(sp, maps, backward);
  std::this_thread::sleep_for(std::chrono::milliseconds(3 * (world.rank() % 3)));
  EXPECT_TRUE(testing::same_bits(run<float>(sp, maps, backward), first));
}

TEST_P(Scan, TrafficFollowsTheFormulas) {
  run<float>(sp, maps, backward);
  const std::int64_t ranks = world.size(), rank = world.rank();
  const auto e = static_cast<std::uint64_t>(n.batch * n.heads * n.k * n.v) * sizeof(float);
  const auto m = static_cast<std::uint64_t>(n.batch * n.heads * n.k * n.k) * sizeof(float);
  const bool zigzag = sp.layout().kind() == LayoutKind::zigzag;
  const std::int64_t v = backward && !zigzag ? ranks - 1 - rank : rank;
  Traffic expected_traffic;
  expected_traffic.rounds = static_cast<std::uint64_t>(testing::ceil_log2(ranks));
  for (std::int64_t d = 1; d < ranks; d *= 2) {
    if (v + d < ranks) {
      ++expected_traffic.messages;
      expected_traffic.bytes += v < d ? e : e + m;
    }
    if (zigzag && v >= d) {
      ++expected_traffic.messages;
      expected_traffic.bytes += (v + d >= ranks ? 1 : 2) * (e + m);
    }
  }
  EXPECT_EQ(world.traffic(Purpose::kda_state), expected_traffic);
  // Over all ranks: a round of distance d has N - d messages one way, of which min(d, N - d) are a state alone, and,
  // zigzag, N - d the other way, of which as many are one map.
  std::uint64_t bytes = 0;
  for (std::int64_t d = 1; d < ranks; d *= 2) {
    const auto pairs = static_cast<std::uint64_t>(ranks - d), ends = static_cast<std::uint64_t>(std::min(d, ranks - d));
    bytes += pairs * e + (pairs - ends) * m;
    if (zigzag) bytes += (2 * pairs - ends) * (e + m);
  }
  Owned<double> sent({1});
  sent[0] = static_cast<double>(world.traffic(Purpose::kda_state).bytes);
  Arena workspace("workspace", 1 << 16);
  world.all_reduce_sum(Stream::cpu(), sent, Purpose::control, workspace);
  EXPECT_EQ(sent[0], static_cast<double>(bytes));
}

INSTANTIATE_TEST_SUITE_P(Cases, Scan,
                         ::testing::Combine(::testing::Values(LayoutKind::contiguous, LayoutKind::zigzag),
                                            ::testing::Values(Sizes{1, 2, 8, 8}, Sizes{3, 1, 5, 7}, Sizes{2, 3, 16, 4}),
                                            ::testing::Bool()),
                         [](const auto& test) {
                           const Sizes& n = std::get<1>(test.param);
                           return fmt::format("{}B{}H{}K{}V{}{}", name_of(std::get<0>(test.param)), n.batch, n.heads,
                                              n.k, n.v, std::get<2>(test.param) ? "Backward" : "Forward");
                         });

TEST(ScanShapes, AreChecked) {
  const SequenceParallel sp(runtime().world(), LayoutKind::zigzag);
  Arena workspace("workspace", 1 << 16);
  Owned<double> m({2, 1, 4, 4}), e({2, 1, 4, 3}), wrong({2, 1, 3, 4}), odd_m({1, 1, 4, 4}), odd_e({1, 1, 4, 3});
  Owned<float> single({2, 1, 4, 3});
  const Stream dry = Stream::dry({});
  EXPECT_THROW(sp.scan(dry, m, wrong, wrong, workspace), InternalError);
  EXPECT_THROW(sp.scan(dry, m, e, wrong, workspace), InternalError);
  EXPECT_THROW(sp.scan(dry, m, e, single, workspace), InternalError);
  EXPECT_THROW(sp.scan_backward(dry, odd_m, odd_e, odd_e, workspace), InternalError);
}

}  // namespace
}  // namespace deltapipe
