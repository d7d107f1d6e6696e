#include "comm/sequence_layout.h"

#include "tests/comm/testing.h"

namespace deltapipe {
namespace {

using testing::Owned;

TEST(SequenceLayout, SegmentsOfEachRank) {
  const SequenceLayout contiguous(LayoutKind::contiguous, 3);
  EXPECT_EQ(contiguous.segments(), 3);
  for (int r = 0; r < 3; ++r) EXPECT_EQ(contiguous.segment_at(r, 0), r);
  const SequenceLayout zigzag(LayoutKind::zigzag, 3);
  EXPECT_EQ(zigzag.segments(), 6);
  const int expected[3][2] = {{0, 5}, {1, 4}, {2, 3}};
  for (int r = 0; r < 3; ++r) {
    for (int s = 0; s < 2; ++s) EXPECT_EQ(zigzag.segment_at(r, s), expected[r][s]);
  }
}

TEST(SequenceLayout, OwnerAndSlotInvertSegmentAt) {
  for (const LayoutKind kind : {LayoutKind::contiguous, LayoutKind::zigzag}) {
    for (int ranks = 1; ranks <= 8; ++ranks) {
      const SequenceLayout layout(kind, ranks);
      for (int g = 0; g < layout.segments(); ++g) {
        EXPECT_EQ(layout.segment_at(layout.owner_of(g), layout.slot_of(g)), g);
      }
    }
  }
}

TEST(SequenceLayout, ZigzagBalancesCausalAttention) {
  const SequenceLayout layout(LayoutKind::zigzag, 4);
  for (int r = 0; r < 4; ++r) EXPECT_EQ(layout.segment_at(r, 0) + layout.segment_at(r, 1), 7);
}

TEST(SequenceLayout, LengthThatDoesNotDivide) {
  const SequenceLayout layout(LayoutKind::zigzag, 4);
  EXPECT_EQ(layout.segment_length(64), 8);
  try {
    layout.segment_length(100);
    FAIL() << "no error";
  } catch (const ConfigError& e) {
    EXPECT_STREQ(e.what(),
                 "a sequence of 100 tokens does not divide into 8 equal segments (mesh.sequence = 4, layout zigzag)");
  }
  EXPECT_THROW(layout.segment_length(0), ConfigError);
}

struct Batch {
  Owned<std::int32_t> tokens, labels, start, positions;
  explicit Batch(const Shape& shape) : tokens(shape), labels(shape), start(shape), positions(shape) {}
  TokenBatch view() const {
    const auto flat = [&](const Owned<std::int32_t>& x) { return x.tensor().view({x.size()}); };
    return {tokens.shape()[0], tokens.shape()[1], flat(tokens), flat(labels), start, flat(positions), start};
  }
};

TEST(CutBatch, StartIsRelativeToItsSegment) {
  constexpr std::int64_t batch = 2, tokens = 24;
  Batch whole({batch, tokens});
  whole.start = testing::pack_documents(tokens, {{0, 3, 12, 13}, {0}});
  for (std::int64_t i = 0; i < batch * tokens; ++i) {
    whole.tokens[i] = static_cast<std::int32_t>(100 + i);
    whole.labels[i] = static_cast<std::int32_t>(-i);
    whole.positions[i] = static_cast<std::int32_t>(i % tokens) - whole.start[i];
  }
  for (const LayoutKind kind : {LayoutKind::contiguous, LayoutKind::zigzag}) {
    for (const int ranks : {1, 2, 3, 4}) {
      const SequenceLayout layout(kind, ranks);
      const std::int64_t length = layout.segment_length(tokens);
      for (int rank = 0; rank < ranks; ++rank) {
        Batch local({batch * layout.local_segments(), length});
        cut_batch(layout, rank, whole.view(), local.view());
        EXPECT_TRUE(testing::same_bits(local.tokens, testing::cut(layout, rank, whole.tokens)));
        EXPECT_TRUE(testing::same_bits(local.labels, testing::cut(layout, rank, whole.labels)));
        EXPECT_TRUE(testing::same_bits(local.positions, testing::cut(layout, rank, whole.positions)));
        const auto first = testing::first_tokens(layout, rank, length);
        const Owned<std::int32_t> start = testing::cut(layout, rank, whole.start);
        for (std::int64_t s = 0; s < batch * layout.local_segments(); ++s) {
          for (std::int64_t t = 0; t < length; ++t) {
            EXPECT_EQ(local.start[s * length + t] + first[static_cast<std::size_t>(s) % first.size()],
                      start[s * length + t]);
          }
        }
      }
    }
  }
  // By hand: two ranks, contiguous; the second holds tokens 12 .. 23.
  Batch local({batch, 12});
  cut_batch(SequenceLayout(LayoutKind::contiguous, 2), 1, whole.view(), local.view());
  EXPECT_EQ(local.start[0], 0);
  EXPECT_EQ(local.start[1], 1);
  EXPECT_EQ(local.start[11], 1);
  EXPECT_EQ(local.start[12], -12);
  EXPECT_EQ(local.positions[12], 12);
}

TEST(CutBatch, ShapesAreChecked) {
  Batch whole({1, 8}), local({1, 3});
  whole.tokens.fill(0);
  EXPECT_THROW(cut_batch(SequenceLayout(LayoutKind::contiguous, 2), 0, whole.view(), local.view()), InternalError);
}

}  // namespace
}  // namespace deltapipe
