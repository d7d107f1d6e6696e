// Communication as a trace shows it: one span a call, one a wait, with the bytes of the counters.
#include "core/trace.h"
#include "tests/comm/testing.h"

#include <algorithm>
#include <utility>

namespace deltapipe {
namespace {

using testing::Owned;
using testing::runtime;

class TraceOf : public ::testing::Test {
 protected:
  TraceOf() : world(runtime().world()) {
    trace::reserve(1000);
    world.reset_traffic();
    trace::start();
  }
  ~TraceOf() override {
    trace::stop();
    trace::clear();
  }

  std::vector<std::string_view> names() const {
    std::vector<std::string_view> list;
    for (const trace::Event& e : trace::events()) list.push_back(e.name);
    return list;
  }
  void expect_counted() const {
    for (std::size_t p = 0; p < purpose_count; ++p) {
      const auto purpose = static_cast<Purpose>(p);
      std::uint64_t messages = 0, bytes = 0;
      for (const trace::Event& e : trace::events()) {
        if (e.purpose != name_of(purpose)) continue;
        messages += e.messages;
        bytes += e.bytes;
      }
      EXPECT_EQ(messages, world.traffic(purpose).messages) << name_of(purpose);
      EXPECT_EQ(bytes, world.traffic(purpose).bytes) << name_of(purpose);
    }
    std::int64_t end = 0;
    for (const trace::Event& e : trace::events()) {
      EXPECT_EQ(e.track, trace::Track::communication);
      EXPECT_EQ(e.category, "world");
      EXPECT_GE(e.begin_ns, end) << e.name << " overlaps the span before it";
      EXPECT_GE(e.end_ns, e.begin_ns);
      end = e.end_ns;
    }
  }

  Communicator& world;
  const Stream stream = Stream::cpu();
  Arena workspace{"workspace", 1 << 22};
};

TEST_F(TraceOf, EveryBlockingCallOnce) {
  const int n = world.size();
  Owned<double> whole({3000 * n}), part({3000}), small({5});
  whole.fill(1);
  part.fill(1);
  small.fill(1);
  world.all_reduce_sum(stream, whole, Purpose::gradients, workspace);
  world.all_reduce_sum(stream, small, Purpose::control, workspace);
  world.all_gather(stream, part, whole, Purpose::weights);
  world.reduce_scatter_sum(stream, whole, part, Purpose::gradients, workspace);
  world.broadcast(stream, small, 0, Purpose::data);
  world.barrier(stream);
  if (n > 1) {
    const Transfer send{(world.rank() + 1) % n, part},
        receive{(world.rank() + n - 1) % n, whole.tensor().rows(0, 3000)};
    world.exchange(stream, {&send, 1}, {&receive, 1}, Purpose::hidden_state);
    if (world.rank() == 0) world.send(stream, small, 1, Purpose::control);
    if (world.rank() == 1) world.receive(stream, small, 0, Purpose::control);
  }
  std::vector<std::string_view> wanted{"all_reduce_sum", "all_reduce_sum", "all_gather", "reduce_scatter_sum",
                                       "broadcast",      "barrier",        "exchange"};
  if (world.rank() < 2) wanted.push_back(world.rank() == 0 ? "send" : "receive");
  if (n == 1) wanted.clear();  // nothing travels
  EXPECT_EQ(names(), wanted);
  expect_counted();
}

TEST_F(TraceOf, StartsAndWaits) {
  const int n = world.size();
  if (n == 1) return;
  Owned<double> whole({20 * n}), part({20}), out({7}), in({7});
  part.fill(1);
  out.fill(2);
  const Transfer send{(world.rank() + 1) % n, out}, receive{(world.rank() + n - 1) % n, in};
  Pending exchange = world.start_exchange(stream, {&send, 1}, {&receive, 1}, Purpose::conv_halo);
  Pending gather = world.start_all_gather(stream, part, whole, Purpose::attention_kv);
  gather.wait(stream);
  exchange.wait(stream);
  exchange.wait(stream);  // has been waited for
  EXPECT_EQ(names(), (std::vector<std::string_view>{"start exchange", "start all_gather", "wait for all_gather",
                                                    "wait for exchange"}));
  EXPECT_EQ(trace::events()[0].bytes, 56u);
  EXPECT_EQ(trace::events()[3].bytes, 0u);
  expect_counted();
}

// A sum of several blocks sends the later ones whenever anybody waits.
TEST_F(TraceOf, WhatIsSentWhileOthersWaitIsTheWaitsOfItsOwn) {
  const int n = world.size();
  if (n == 1) return;
  const std::size_t usual = std::exchange(runtime().settings().reduce_bytes, 1);
  constexpr std::int64_t block = 256, rest = 7;  // elements: the smallest block, and what remains for a second one
  Owned<double> whole({n * (block + rest)}), part({block + rest});
  whole.fill(1);
  Pending sum = world.start_reduce_scatter_sum(stream, whole, part, Purpose::gradients, workspace);
  for (int i = 0; i < 5; ++i) world.barrier(stream);  // the first block arrives
  sum.wait(stream);
  runtime().settings().reduce_bytes = usual;
  EXPECT_EQ(names().back(), "wait for reduce_scatter_sum");
  EXPECT_EQ(trace::events().back().bytes, static_cast<std::uint64_t>((n - 1) * rest) * sizeof(double));
  expect_counted();
}

TEST_F(TraceOf, AStartBeforeTheRecordingIsNotWaitedForInIt) {
  const int n = world.size();
  if (n == 1) return;
  trace::stop();
  Owned<double> whole({20 * n}), part({20});
  part.fill(1);
  Pending gather = world.start_all_gather(stream, part, whole, Purpose::attention_kv);
  trace::start();
  gather.wait(stream);
  EXPECT_TRUE(trace::events().empty());
}

TEST_F(TraceOf, DryCallsLeaveNothing) {
  Arena measured = Arena::measuring("workspace");
  Owned<double> small({5});
  world.all_reduce_sum(Stream::dry({}), small, Purpose::control, measured);
  world.barrier(Stream::dry({}));
  EXPECT_TRUE(trace::events().empty());
}

}  // namespace
}  // namespace deltapipe
