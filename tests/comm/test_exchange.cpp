#include "tests/comm/testing.h"

#include <thread>

namespace deltapipe {
namespace {

using testing::Owned;
using testing::runtime;
using testing::same_bits;

Owned<double> message(int from, int to, int number, std::int64_t elements) {
  RandomStream r(testing::test_seed(), fmt::format("{} to {}, {}", from, to, number));
  Owned<double> x({elements});
  x.normal(r);
  return x;
}

class Exchange : public ::testing::Test {
 protected:
  Exchange() : world(runtime().world()), ranks(world.size()), rank(world.rank()) {}
  ~Exchange() override { runtime().settings() = settings; }

  Communicator& world;
  const int ranks, rank;
  const Stream stream = Stream::cpu();
  const CommunicationSettings settings = runtime().settings();
};

TEST_F(Exchange, SendAndReceiveAlongALine) {
  constexpr std::int64_t elements = 100000;  // above MPI's eager limit: the sender waits for the receiver
  Owned<double> x({elements});
  if (rank == 0) x = message(0, 0, 0, elements);
  if (rank > 0) world.receive(stream, x, rank - 1, Purpose::hidden_state, 3);
  EXPECT_TRUE(same_bits(x, message(0, 0, 0, elements)));
  if (rank + 1 < ranks) world.send(stream, x, rank + 1, Purpose::hidden_state, 3);
}

TEST_F(Exchange, AllToAllLargeMessagesDoNotDeadlock) {
  constexpr std::int64_t elements = 40000;
  for (const std::size_t message_bytes : {std::size_t{30001}, settings.message_bytes}) {
    runtime().settings().message_bytes = message_bytes;
    std::vector<Owned<double>> out, in;
    for (int peer = 0; peer < ranks; ++peer) {
      out.push_back(message(rank, peer, 0, elements));
      in.emplace_back(Shape{elements});
    }
    std::vector<Transfer> sends, receives;
    for (int peer = 0; peer < ranks; ++peer) {
      if (peer == rank) continue;
      sends.push_back({peer, out[static_cast<std::size_t>(peer)]});
      receives.push_back({peer, in[static_cast<std::size_t>(peer)]});
    }
    world.exchange(stream, sends, receives, Purpose::data);
    for (int peer = 0; peer < ranks; ++peer) {
      if (peer == rank) continue;
      EXPECT_TRUE(same_bits(in[static_cast<std::size_t>(peer)], message(peer, rank, 0, elements)));
    }
  }
}

TEST_F(Exchange, TagsSeparateAndOrderHoldsWithinATag) {
  if (ranks == 1) return;
  const int next = (rank + 1) % ranks, previous = (rank + ranks - 1) % ranks;
  const auto out = [&](int i) { return message(rank, next, i, 10); };
  const auto in = [&](int i) { return message(previous, rank, i, 10); };
  const Owned<double> sent[4] = {out(0), out(1), out(2), out(3)};
  Owned<double> got[4] = {Owned<double>({10}), Owned<double>({10}), Owned<double>({10}), Owned<double>({10})};
  const Transfer sends[] = {{next, sent[0], 5}, {next, sent[1], 6}, {next, sent[2], 5}, {next, sent[3], 6}};
  const Transfer receives[] = {
      {previous, got[1], 6}, {previous, got[3], 6}, {previous, got[0], 5}, {previous, got[2], 5}};
  world.exchange(stream, sends, receives, Purpose::data);
  for (int i = 0; i < 4; ++i) EXPECT_TRUE(same_bits(got[i], in(i))) << i;
}

TEST_F(Exchange, StartedOnesRunBesideCollectives) {
  if (ranks == 1) return;
  const int next = (rank + 1) % ranks, previous = (rank + ranks - 1) % ranks;
  Owned<double> in({50000}), whole({3 * ranks});
  const Owned<double> out = message(rank, next, 0, 50000), part = message(rank, rank, 1, 3);
  const Transfer send{next, out}, receive{previous, in};
  Pending pending = world.start_exchange(stream, {&send, 1}, {&receive, 1}, Purpose::conv_halo);
  world.all_gather(stream, part, whole, Purpose::weights);
  world.barrier(stream);
  pending.wait(stream);
  EXPECT_TRUE(same_bits(in, message(previous, rank, 0, 50000)));
}

TEST_F(Exchange, MessagesOfAnotherSizeAreAnError) {
  if (ranks == 1) return;
  for (const std::int64_t sent : {4, 6}) {
    world.barrier(stream);
    if (rank == 0) world.send(stream, message(0, 1, 0, sent), 1, Purpose::hidden_state);
    if (rank == 1) {
      Owned<double> x({5});
      const std::string error =
          testing::communication_error([&] { world.receive(stream, x, 0, Purpose::hidden_state); });
      if (sent == 4) {
        EXPECT_EQ(error, "receive (hidden_state) on axis world: 32 bytes came from world rank 0, expected 40");
      } else {
        EXPECT_NE(error.find("receive on axis world: MPI_ERR_TRUNCATE"), std::string::npos) << error;
      }
    }
  }
  world.barrier(stream);
}

TEST_F(Exchange, DryStreamsDoNothing) {
  const Stream dry = Stream::dry({});
  Arena workspace = Arena::measuring("workspace");
  world.reset_traffic();
  Owned<double> x({10}), whole({10 * ranks});
  const int peer = (rank + 1) % ranks;
  if (ranks > 1) {
    world.send(dry, x, peer, Purpose::data);
    world.receive(dry, x, peer, Purpose::data);
    EXPECT_THROW(world.send(dry, x, ranks, Purpose::data), InternalError);  // checks stay on
  }
  world.all_gather(dry, x, whole, Purpose::data);
  world.all_reduce_sum(dry, x, Purpose::data, workspace);
  world.reduce_scatter_sum(dry, whole, x, Purpose::data, workspace);
  world.broadcast(dry, x, 0, Purpose::data);
  world.barrier(dry, Purpose::data);
  EXPECT_EQ(world.traffic(Purpose::data), Traffic{});
  for (const double value : x) EXPECT_TRUE(std::isnan(value));
}

TEST(Runtime, LocalRanksAreThoseOfThisHost) {
  EXPECT_EQ(runtime().local_size(), runtime().size());  // tests run on one machine
  EXPECT_EQ(runtime().local_rank(), runtime().rank());
}

TEST(Runtime, AgreementNamesTheRankThatDiffers) {
  MpiRuntime& r = runtime();
  EXPECT_NO_THROW(r.agree("0.1.0", 42));
  if (r.size() == 1) return;
  const int odd = r.size() - 1;
  const bool differs = r.rank() == odd;
  // Rank 0 tells; the others know that it does.
  const auto expect = [&](const std::string& message, const std::function<void()>& f) {
    try {
      f();
      ADD_FAILURE() << "agreed";
    } catch (const CommunicationError& e) {
      EXPECT_EQ(r.rank(), 0);
      EXPECT_EQ(e.what(), message);
    } catch (const PeerError& e) {
      EXPECT_NE(r.rank(), 0);
      EXPECT_EQ(e.exit_code(), CommunicationError("").exit_code());
    }
  };
  expect(fmt::format("rank {} runs version 0.2.0, rank 0 version 0.1.0: install one binary on every host", odd),
         [&] { r.agree(differs ? "0.2.0" : "0.1.0", 42); });
  expect(
      fmt::format("rank {} has another configuration than rank 0 (hash 000000000000002b, not 000000000000002a)", odd),
      [&] { r.agree("0.1.0", differs ? 43 : 42); });
}

}  // namespace
}  // namespace deltapipe
