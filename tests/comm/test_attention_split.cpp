// Softmax attention of each local segment over gathered keys and values, against one rank's whole sequences.
#include "comm/sequence_parallel.h"
#include "kernels/attention.h"
#include "tests/comm/testing.h"

namespace deltapipe {
namespace {

using testing::Owned;
using testing::relative_rms;
using testing::runtime;

constexpr std::int64_t batch = 2, query_heads = 4, key_heads = 2, head_dim = 8;
constexpr std::int64_t query_width = query_heads * head_dim, key_width = key_heads * head_dim;
constexpr float scale = 0.35f;  // about 1 / sqrt(head_dim)

template <class T>
struct Attended {
  Owned<T> o, dq, dk, dv;
};

Tensor query_rows(const Tensor& t, std::int64_t begin, std::int64_t end) {
  return t.rows(begin, end).view({end - begin, query_heads, head_dim});
}
Tensor key_rows(const Tensor& t, std::int64_t end) { return t.rows(0, end).view({end, key_heads, head_dim}); }

/// Forward and backward. q, d_o [S, L, Hq d] and k, v [S, L, Hkv d] are this rank's segments; start [S, L] is in tokens
/// of the whole sequence, which are the indices of the gathered keys.
template <class T>
Attended<T> attend(const SequenceParallel& sp, const Owned<T>& q, const Owned<T>& k, const Owned<T>& v,
                   const Owned<std::int32_t>& start, const Owned<T>& d_o) {
  const SequenceLayout& layout = sp.layout();
  const std::int64_t S = q.shape()[0], L = q.shape()[1], tokens = L * layout.segments(), slots = S / batch;
  Attended<T> out{Owned<T>(q.shape()), Owned<T>(q.shape()), Owned<T>(k.shape()), Owned<T>(v.shape())};
  testing::with_exact_workspace([&](const Stream& stream, Arena& workspace) {
    const auto scope = workspace.scope();
    const auto take = [&](const Shape& shape) { return workspace.allocate(dtype_of<T>, shape, "test"); };
    const Tensor all_k = take({batch, tokens, key_width}), all_v = take(all_k.shape);
    const Tensor dk = take(all_k.shape), dv = take(all_k.shape), lse = take({S, query_heads, L});
    sp.gather_keys(stream, k, all_k, workspace);
    sp.gather_keys(stream, v, all_v, workspace);
    if (!stream.is_dry()) {
      std::memset(dk.data, 0, dk.bytes());
      std::memset(dv.data, 0, dv.bytes());
    }
    for (std::int64_t s = 0; s < S; ++s) {
      const int slot = static_cast<int>(s % slots);
      const std::int64_t b = s / slots, end = (layout.segment_at(sp.rank(), slot) + 1) * L;
      const auto mine = [&](const Tensor& t) { return query_rows(t.at(s), 0, L); };
      const auto keys = [&](const Tensor& t) { return key_rows(t.at(b), end); };
      kernels::attention_forward(stream, mine(q), keys(all_k), keys(all_v), start.tensor().at(s), scale, mine(out.o),
                                 lse.at(s), workspace);
      kernels::attention_backward(stream, mine(d_o), mine(q), keys(all_k), keys(all_v), mine(out.o), lse.at(s),
                                  start.tensor().at(s), scale, mine(out.dq), keys(dk), keys(dv), true, workspace);
    }
    sp.scatter_key_gradients(stream, dk, out.dk, workspace);
    sp.scatter_key_gradients(stream, dv, out.dv, workspace);
  });
  return out;
}

template <class T>
void expect_split_equals_whole(LayoutKind kind, std::int64_t length, double tolerance) {
  Communicator& world = runtime().world();
  const SequenceParallel sp(world, kind);
  const std::int64_t tokens = length * sp.layout().segments();
  RandomStream r(testing::test_seed(), "inputs");
  const auto make = [&](std::int64_t width) {
    Owned<double> x({batch, tokens, width});
    x.normal(r);
    for (double& value : x) value = static_cast<float>(value);
    return x;
  };
  const Owned<double> q = make(query_width), k = make(key_width), v = make(key_width), d_o = make(query_width);
  const auto L = static_cast<std::int32_t>(length), last = static_cast<std::int32_t>(tokens) - 1;
  const Owned<std::int32_t> start =
      testing::pack_documents(tokens, {{0, L / 2, L, std::min(3 * L + 1, last), last}, {0}});
  SingleRank alone("sequence");
  const Attended<double> whole = attend<double>(SequenceParallel(alone, LayoutKind::contiguous), q, k, v, start, d_o);
  const auto cut = [&](const auto& x) { return testing::cut(sp.layout(), world.rank(), x); };
  const auto local = [&](const Owned<double>& x) { return cut(x).template cast<T>(); };
  const Attended<T> split = attend<T>(sp, local(q), local(k), local(v), cut(start), local(d_o));
  EXPECT_LT(relative_rms(split.o, cut(whole.o)), tolerance) << "o";
  EXPECT_LT(relative_rms(split.dq, cut(whole.dq)), tolerance) << "dq";
  EXPECT_LT(relative_rms(split.dk, cut(whole.dk)), tolerance) << "dk";
  EXPECT_LT(relative_rms(split.dv, cut(whole.dv)), tolerance) << "dv";
}

class AttentionSplit : public ::testing::TestWithParam<LayoutKind> {};

TEST_P(AttentionSplit, EqualsTheWholeSequence) {
  for (const std::int64_t length : {5, 9, 70}) {
    SCOPED_TRACE(length);
    expect_split_equals_whole<double>(GetParam(), length, 1e-12);
    // Sums of up to 1,120 terms of either sign, 6e-8 each: measured up to 4e-7.
    expect_split_equals_whole<float>(GetParam(), length, 3e-6);
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, AttentionSplit, ::testing::Values(LayoutKind::contiguous, LayoutKind::zigzag),
                         [](const auto& test) { return std::string(name_of(test.param)); });

}  // namespace
}  // namespace deltapipe
