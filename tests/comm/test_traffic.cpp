// The counters against the formulas of comm/mpi_communicator.h.
#include "tests/comm/testing.h"

namespace deltapipe {
namespace {

using testing::Owned;
using testing::runtime;

class TrafficOf : public ::testing::Test {
 protected:
  TrafficOf() : world(runtime().world()), n(static_cast<std::uint64_t>(world.size())) { world.reset_traffic(); }
  ~TrafficOf() override { runtime().settings() = settings; }

  const Traffic& counted() const { return world.traffic(Purpose::gradients); }

  Communicator& world;
  const std::uint64_t n;
  const Stream stream = Stream::cpu();
  Arena workspace{"workspace", 1 << 22};
  const CommunicationSettings settings = runtime().settings();
};

Owned<double> zeros(std::int64_t elements) {
  Owned<double> x({elements});
  x.fill(0);
  return x;
}

TEST_F(TrafficOf, AllGather) {
  Owned<double> whole = zeros(10 * world.size());
  world.all_gather(stream, zeros(10), whole, Purpose::gradients);
  EXPECT_EQ(counted(), (Traffic{n - 1, (n - 1) * 80, n > 1 ? 1u : 0u}));
  EXPECT_EQ(world.traffic(Purpose::weights), Traffic{});  // counted by purpose
}

TEST_F(TrafficOf, ReduceScatterInBlocks) {
  runtime().settings().reduce_bytes = 256 * 8;  // the smallest block, 256 elements, for 2 ranks or more
  Owned<double> whole = zeros(1000 * world.size()), part({1000});
  world.reduce_scatter_sum(stream, whole, part, Purpose::gradients, workspace);
  EXPECT_EQ(counted(), (Traffic{(n - 1) * 4, (n - 1) * 8000, n > 1 ? 4u : 0u}));
}

TEST_F(TrafficOf, SmallAllReduce) {
  Owned<double> x = zeros(2048);
  world.all_reduce_sum(stream, x, Purpose::gradients, workspace);
  EXPECT_EQ(counted(), (Traffic{n - 1, (n - 1) * 2048 * 8, n > 1 ? 1u : 0u}));
}

TEST_F(TrafficOf, LargeAllReduce) {
  const std::uint64_t part = 1000;  // at least 16 KiB from 3 ranks on
  if (n < 3) return;
  Owned<double> x = zeros(static_cast<std::int64_t>(part * n));
  world.all_reduce_sum(stream, x, Purpose::gradients, workspace);
  EXPECT_EQ(counted(), (Traffic{2 * (n - 1), 2 * (n - 1) * part * 8, 2}));
}

TEST_F(TrafficOf, Broadcast) {
  Owned<double> x = zeros(5), messages({1});
  world.broadcast(stream, x, 0, Purpose::gradients);
  EXPECT_EQ(counted().rounds, static_cast<std::uint64_t>(testing::ceil_log2(world.size())));
  EXPECT_EQ(counted().bytes, counted().messages * 40);
  EXPECT_LE(counted().messages, static_cast<std::uint64_t>(testing::ceil_log2(world.size())));
  messages[0] = static_cast<double>(counted().messages);
  world.all_reduce_sum(stream, messages, Purpose::control, workspace);
  EXPECT_EQ(messages[0], static_cast<double>(n - 1));  // every other rank hears once
}

TEST_F(TrafficOf, Barrier) {
  world.barrier(stream, Purpose::gradients);
  const auto rounds = static_cast<std::uint64_t>(testing::ceil_log2(world.size()));
  EXPECT_EQ(counted(), (Traffic{rounds, 0, rounds}));
}

TEST_F(TrafficOf, PiecesCountAsOneMessage) {
  if (n == 1) return;
  runtime().settings().message_bytes = 100;
  const int next = (world.rank() + 1) % world.size(), previous = (world.rank() + world.size() - 1) % world.size();
  Owned<double> out = zeros(1000), in({1000});
  const Transfer send{next, out}, receive{previous, in};
  world.exchange(stream, {&send, 1}, {&receive, 1}, Purpose::gradients);
  EXPECT_EQ(counted(), (Traffic{1, 8000, 1}));
  world.reset_traffic();
  EXPECT_EQ(counted(), Traffic{});
}

}  // namespace
}  // namespace deltapipe
