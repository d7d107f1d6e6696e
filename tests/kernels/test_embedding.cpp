#include "kernels/embedding.h"
#include "tests/kernels/testing.h"
#include "tests/kernels/threads.h"

namespace deltapipe {
namespace {

using testing::Owned;

Owned<std::int32_t> random_tokens(RandomStream& r, std::int64_t length, std::uint64_t n) {
  Owned<std::int32_t> tokens({length});
  for (std::int32_t& t : tokens) t = static_cast<std::int32_t>(r.next_below(n));
  return tokens;
}

TEST(Embedding, ForwardTakesRows) {
  RandomStream r(testing::test_seed(), "data");
  for (const auto& [length, n, d] : {std::tuple{1, 1, 1}, {7, 5, 3}, {1031, 50, 130}}) {
    const auto tokens = random_tokens(r, length, static_cast<std::uint64_t>(n));
    Owned<float> table({n, d}), out({length, d});
    table.normal(r);
    kernels::embedding_forward(Stream::cpu(), tokens, table, out);
    for (std::int64_t t = 0; t < length; ++t) {
      for (std::int64_t i = 0; i < d; ++i) ASSERT_EQ(out[t * d + i], table[tokens[t] * d + i]);
    }
  }
}

TEST(Embedding, BackwardAddsRowsOfRepeatedTokens) {
  RandomStream r(testing::test_seed(), "data");
  for (const auto& [length, n, d] : {std::tuple{1, 1, 1}, {23, 5, 3}, {517, 11, 131}}) {
    const auto tokens = random_tokens(r, length, static_cast<std::uint64_t>(n));
    Owned<double> dout({length, d}), dtable({n, d}), expected({n, d});
    dout.normal(r);
    dtable.normal(r);  // gradients are added to what is there
    for (std::int64_t i = 0; i < n * d; ++i) expected[i] = dtable[i];
    for (std::int64_t t = 0; t < length; ++t) {
      for (std::int64_t i = 0; i < d; ++i) expected[tokens[t] * d + i] += dout[t * d + i];
    }
    kernels::embedding_backward(Stream::cpu(), dout, tokens, dtable);
    for (std::int64_t i = 0; i < n * d; ++i) ASSERT_EQ(dtable[i], expected[i]);  // the same order of additions
  }
}

TEST(Embedding, BackwardDoesNotDependOnThreads) {
  RandomStream r(testing::test_seed(), "data");
  const auto tokens = random_tokens(r, 400, 7);
  Owned<float> dout({400, 257});
  dout.normal(r);
  testing::expect_same_on_any_threads([&] {
    Owned<float> dtable({7, 257});
    dtable.fill(0);
    kernels::embedding_backward(Stream::cpu(), dout, tokens, dtable);
    return std::vector{dtable};
  });
}

TEST(Embedding, NamesATokenOutsideTheTable) {
  Owned<std::int32_t> tokens({3});
  Owned<float> table({4, 2}), out({3, 2});
  table.fill(0);
  out.fill(0);
  for (const std::int32_t wrong : {4, -1}) {
    tokens[1] = wrong;
    for (const bool forward : {true, false}) {
      try {
        if (forward) kernels::embedding_forward(Stream::cpu(), tokens, table, out);
        if (!forward) kernels::embedding_backward(Stream::cpu(), out, tokens, table);
        FAIL() << "token " << wrong << " was accepted";
      } catch (const InternalError& e) {
        EXPECT_NE(std::string(e.what()).find(std::to_string(wrong) + " at index 1"), std::string::npos) << e.what();
      }
    }
  }
}

}  // namespace
}  // namespace deltapipe
