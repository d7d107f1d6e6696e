// An axis of one rank, and the checks that every communicator makes.
#include "comm/block_copy.h"
#include "comm/sequence_parallel.h"
#include "tests/comm/testing.h"

namespace deltapipe {
namespace {

using testing::Owned;

TEST(SingleRank, CollectivesAreCopies) {
  SingleRank one("sequence");
  const Stream stream = Stream::cpu();
  Arena workspace("none", 0);
  RandomStream r(testing::test_seed(), "x");
  Owned<double> x({6}), part({6}), whole({6});
  x.normal(r);
  const Owned<double> before = x;
  one.all_reduce_sum(stream, x, Purpose::gradients, workspace);
  one.broadcast(stream, x, 0, Purpose::weights);
  EXPECT_TRUE(testing::same_bits(x, before));
  one.all_gather(stream, x, whole, Purpose::weights);
  EXPECT_TRUE(testing::same_bits(whole, before));
  one.reduce_scatter_sum(stream, x, part, Purpose::gradients, workspace);
  EXPECT_TRUE(testing::same_bits(part, before));
  one.exchange(stream, {}, {}, Purpose::conv_halo);
  one.barrier(stream);
  for (std::size_t p = 0; p < purpose_count; ++p) EXPECT_EQ(one.traffic(static_cast<Purpose>(p)), Traffic{});
}

TEST(Communicator, BrokenContractsThrow) {
  SingleRank one("sequence");
  const Stream stream = Stream::cpu();
  Arena workspace("none", 0);
  Owned<double> x({6}), y({5});
  Owned<float> z({6});
  Owned<std::int32_t> i({6});
  EXPECT_THROW(one.send(stream, x, 0, Purpose::data), InternalError);  // to itself
  EXPECT_THROW(one.receive(stream, x, 1, Purpose::data), InternalError);
  EXPECT_THROW(one.all_gather(stream, x, y, Purpose::data), InternalError);
  EXPECT_THROW(one.all_gather(stream, x, z, Purpose::data), InternalError);
  EXPECT_THROW(one.all_reduce_sum(stream, i, Purpose::data, workspace), InternalError);
  EXPECT_THROW(one.reduce_scatter_sum(stream, x, y, Purpose::data, workspace), InternalError);
  EXPECT_THROW(one.broadcast(stream, x, 1, Purpose::data), InternalError);
}

TEST(CopyBlocks, MovesAndChecks) {
  const Stream stream = Stream::cpu();
  Owned<std::int32_t> a({12}), b({12});
  for (int i = 0; i < 12; ++i) a[i] = i;
  b.fill(-1);
  copy_blocks(stream, 3, 2, a, 1, 4, b, 0, 2);  // 1 2, 5 6, 9 10
  const std::int32_t expected[] = {1, 2, 5, 6, 9, 10, -1};
  for (int i = 0; i < 7; ++i) EXPECT_EQ(b[i], expected[i]);
  EXPECT_THROW(copy_blocks(stream, 3, 2, a, 3, 4, b, 0, 2), InternalError);
  EXPECT_THROW(copy_blocks(stream, 3, 2, a, 0, 4, b, 0, 6), InternalError);
  EXPECT_THROW(copy_blocks(stream, 1, 2, a, -1, 4, b, 0, 6), InternalError);
}

TEST(SequenceParallel, ShortSegmentsAreAnError) {
  SingleRank one("sequence");
  const SequenceParallel sp(one, LayoutKind::contiguous);
  Arena workspace("small", 1 << 12);
  Owned<double> x({1, 2, 4}), halo({1, 3, 4});
  EXPECT_THROW(sp.gather_halo(Stream::cpu(), x, halo, workspace), ConfigError);
  EXPECT_THROW(sp.return_halo(Stream::cpu(), halo, x, workspace), ConfigError);
  Owned<double> wrong({1, 1, 5});
  EXPECT_THROW(sp.gather_halo(Stream::cpu(), x, wrong, workspace), InternalError);
}

}  // namespace
}  // namespace deltapipe
