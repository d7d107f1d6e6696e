// A sequence cut into segments, in any order of storage, with states composed from their maps, is one sequence.
#include "tests/kernels/kda_testing.h"

namespace deltapipe {
namespace {

using testing::KdaCase;
using testing::KdaOutputs;
using testing::KdaResults;
using testing::KdaShape;
using testing::Owned;
using testing::relative_rms;

constexpr double tolerance = 1e-10;  // double; a few hundred roundings

struct Maps {
  Owned<double> m, e;
  Maps(const KdaShape& n, std::int64_t segments) : m({segments, n.heads, n.k, n.k}), e({segments, n.heads, n.k, n.v}) {}
};

Maps identity(const KdaShape& n) {
  Maps out(n, 1);
  out.m.fill(0);
  out.e.fill(0);
  for (std::int64_t h = 0; h < n.heads; ++h) {
    for (std::int64_t x = 0; x < n.k; ++x) out.m[(h * n.k + x) * n.k + x] = 1;
  }
  return out;
}

Maps slice(const KdaShape& n, const Owned<double>& m, const Owned<double>& e, std::int64_t i, bool transpose) {
  Maps out(n, 1);
  for (std::int64_t h = 0; h < n.heads; ++h) {
    for (std::int64_t x = 0; x < n.k; ++x) {
      for (std::int64_t y = 0; y < n.k; ++y) {
        const std::int64_t from = ((i * n.heads + h) * n.k + (transpose ? y : x)) * n.k + (transpose ? x : y);
        out.m[(h * n.k + x) * n.k + y] = m[from];
      }
    }
  }
  std::copy_n(e.begin() + i * out.e.size(), out.e.size(), out.e.begin());
  return out;
}

Maps compose(const KdaShape& n, const Maps& first, const Maps& second) {
  Maps out(n, 1);
  kernels::kda_compose_maps(Stream::cpu(), first.m, first.e, second.m, second.e, out.m, out.e);
  return out;
}

/// Exclusive scan in log2(n) rounds, as ranks would do it.
std::vector<Maps> exclusive_scan(const KdaShape& n, std::vector<Maps> maps) {
  for (std::size_t d = 1; d < maps.size(); d *= 2) {
    std::vector<Maps> next = maps;
    for (std::size_t i = d; i < maps.size(); ++i) next[i] = compose(n, maps[i - d], maps[i]);
    maps = next;
  }
  maps.insert(maps.begin(), identity(n));
  maps.pop_back();
  return maps;
}

/// The one segment of `c` cut into order.size() segments; storage slot i holds segment order[i].
KdaCase<double> cut(const KdaCase<double>& c, const std::vector<std::int64_t>& order) {
  const auto pieces = static_cast<std::int64_t>(order.size());
  const std::int64_t length = c.n.length / pieces;
  KdaCase<double> out(KdaShape{pieces, length, c.n.heads, c.n.k, c.n.v});
  out.bound = c.bound;
  out.scale = c.scale;
  out.a_log = c.a_log;
  out.dt_bias = c.dt_bias;
  for (std::int64_t i = 0; i < pieces; ++i) {
    const std::int64_t at = order[static_cast<std::size_t>(i)];
    const auto rows = [&](const auto& from, auto& to) {
      const std::int64_t size = to.size() / pieces;
      std::copy_n(from.begin() + at * size, size, to.begin() + i * size);
    };
    rows(c.q, out.q);
    rows(c.k, out.k);
    rows(c.v, out.v);
    rows(c.f, out.f);
    rows(c.b, out.b);
    rows(c.d_o, out.d_o);
    rows(c.start, out.start);
    for (std::int64_t t = 0; t < length; ++t) out.start[i * length + t] -= static_cast<std::int32_t>(at * length);
  }
  return out;
}

/// A tensor of segments in storage order, back in sequence order.
Owned<double> join(const Owned<double>& x, const std::vector<std::int64_t>& order) {
  Owned<double> out = x;
  const auto pieces = static_cast<std::int64_t>(order.size());
  const std::int64_t size = x.size() / pieces;
  for (std::int64_t i = 0; i < pieces; ++i) {
    std::copy_n(x.begin() + i * size, size, out.begin() + order[static_cast<std::size_t>(i)] * size);
  }
  return out;
}

void expect_split_equals_whole(const KdaCase<double>& whole, const KdaOutputs<double>& out, const KdaResults<double>& g,
                               const std::vector<std::int64_t>& order, const std::string& what) {
  KdaCase<double> c = cut(whole, order);
  const KdaShape& n = c.n;
  const auto pieces = static_cast<std::int64_t>(order.size());
  std::vector<std::int64_t> slot(order.size());  // segment -> storage slot
  for (std::size_t i = 0; i < order.size(); ++i)
    slot[static_cast<std::size_t>(order[i])] = static_cast<std::int64_t>(i);

  Maps maps(n, pieces);
  Owned<double> own(c.state_in.shape());
  testing::with_workspace([&](const Stream& stream, Arena& workspace) {
    kernels::kda_segment_map(stream, c.inputs(), Tensor(), maps.m, maps.e, workspace);
  });
  testing::with_workspace([&](const Stream& stream, Arena& workspace) {
    kernels::kda_backward_map(stream, c.inputs(), Tensor(), c.d_o, own, workspace);
  });
  std::vector<Maps> forward, backward;
  for (std::int64_t i = 0; i < pieces; ++i) {
    forward.push_back(slice(n, maps.m, maps.e, slot[static_cast<std::size_t>(i)], false));
    backward.insert(backward.begin(), slice(n, maps.m, own, slot[static_cast<std::size_t>(i)], true));
  }
  forward = exclusive_scan(n, forward);
  backward = exclusive_scan(n, backward);
  for (std::int64_t i = 0; i < pieces; ++i) {
    const Maps& f = forward[static_cast<std::size_t>(i)];
    const Maps& b = backward[static_cast<std::size_t>(pieces - 1 - i)];
    const std::int64_t at = slot[static_cast<std::size_t>(i)];
    kernels::kda_apply_map(Stream::cpu(), f.m, false, whole.state_in, f.e, c.state_in.tensor().rows(at, at + 1));
    kernels::kda_apply_map(Stream::cpu(), b.m, false, whole.dstate_out, b.e, c.dstate_out.tensor().rows(at, at + 1));
  }
  const auto got = testing::run_forward(c);
  EXPECT_LT(relative_rms(join(got.o, order), out.o), tolerance) << what;
  const std::int64_t last = slot.back(), size = out.state_out.size();
  Owned<double> state(out.state_out.shape());
  std::copy_n(got.state_out.begin() + last * size, size, state.begin());
  EXPECT_LT(relative_rms(state, out.state_out), tolerance) << what;

  const auto grads = testing::run_backward(c);
  KdaResults<double> joined{
      join(grads.dq, order), join(grads.dk, order), join(grads.dv, order), join(grads.df, order),
      join(grads.db, order), grads.da_log,          grads.ddt_bias,        Owned<double>(g.dstate_in.shape())};
  std::copy_n(grads.dstate_in.begin() + slot.front() * size, size, joined.dstate_in.begin());
  SCOPED_TRACE(what);
  testing::expect_close(joined, g, tolerance);
}

TEST(KdaSegments, MapsReproduceStatesAndTheirGradients) {
  RandomStream r(testing::test_seed(), "data");
  for (float bound : {0.0f, -5.0f}) {
    for (std::int64_t length : {1, 64, 100}) {
      auto c = testing::random_case(r, {3, length, 2, 8, 5}, {.bound = bound});
      if (length == 100) c.pack(1, {-4, 30, 64, 90});
      c.start[2 * length] = 0;  // a document of one token, then the rest of another
      for (std::int64_t t = 1; t < length; ++t) c.start[2 * length + t] = 1;
      Maps maps(c.n, 3);
      Owned<double> own(c.state_in.shape()), state(c.state_in.shape()), dstate(c.state_in.shape());
      testing::with_workspace([&](const Stream& stream, Arena& workspace) {
        kernels::kda_segment_map(stream, c.inputs(), Tensor(), maps.m, maps.e, workspace);
      });
      testing::with_workspace([&](const Stream& stream, Arena& workspace) {
        kernels::kda_backward_map(stream, c.inputs(), Tensor(), c.d_o, own, workspace);
      });
      kernels::kda_apply_map(Stream::cpu(), maps.m, false, c.state_in, maps.e, state);
      kernels::kda_apply_map(Stream::cpu(), maps.m, true, c.dstate_out, own, dstate);
      EXPECT_LT(relative_rms(state, testing::recurrence(c).state_out), tolerance) << length;
      EXPECT_LT(relative_rms(dstate, testing::run_backward(c).dstate_in), tolerance) << length;
    }
  }
}

TEST(KdaSegments, AnySplitEqualsTheWhole) {
  RandomStream r(testing::test_seed(), "data");
  for (bool packed : {false, true}) {
    auto c = testing::random_case(r, {1, 132, 2, 6, 5}, {.f_mean = -1.0});
    if (packed) c.pack(0, {-9, 10, 50, 66, 67, 101});
    const auto out = testing::run_forward(c);
    const auto g = testing::run_backward(c);
    for (std::int64_t pieces : {2, 3, 4, 6}) {
      std::vector<std::int64_t> contiguous, zigzag;
      for (std::int64_t i = 0; i < pieces; ++i) contiguous.push_back(i);
      const std::string what = std::to_string(pieces) + (packed ? " segments of packed documents" : " segments");
      expect_split_equals_whole(c, out, g, contiguous, what);
      if (pieces % 2 != 0) continue;
      for (std::int64_t rank = 0; rank < pieces / 2; ++rank) {
        zigzag.push_back(rank);
        zigzag.push_back(pieces - 1 - rank);
      }
      expect_split_equals_whole(c, out, g, zigzag, what + ", zigzag");
    }
  }
}

TEST(KdaSegments, FloatMapsKeepFloatAccuracy) {
  RandomStream r(testing::test_seed(), "data");
  for (const KdaShape& n : {KdaShape{2, 200, 2, 32, 32}, {6, 70, 3, 32, 32}}) {  // chunk by chunk, and head by head
    const auto c = testing::random_case(r, n, {.f_mean = -4.0});
    const auto f = c.cast<float>();
    Owned<float> m({n.segments, n.heads, n.k, n.k}), e(f.state_in.shape()), own(f.state_in.shape());
    Owned<float> state(f.state_in.shape()), dstate(f.state_in.shape());
    testing::with_workspace([&](const Stream& stream, Arena& workspace) {
      kernels::kda_segment_map(stream, f.inputs(), Tensor(), m, e, workspace);
    });
    testing::with_workspace([&](const Stream& stream, Arena& workspace) {
      kernels::kda_backward_map(stream, f.inputs(), Tensor(), f.d_o, own, workspace);
    });
    kernels::kda_apply_map(Stream::cpu(), m, false, f.state_in, e, state);
    kernels::kda_apply_map(Stream::cpu(), m, true, f.dstate_out, own, dstate);
    // A hundred roundings of 6e-8 or so.
    EXPECT_LT(relative_rms(state, testing::recurrence(c).state_out), 1e-5);
    EXPECT_LT(relative_rms(dstate, testing::run_backward(c).dstate_in), 1e-5);
  }
}

}  // namespace
}  // namespace deltapipe
