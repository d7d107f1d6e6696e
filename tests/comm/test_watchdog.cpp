// A silent rank: the others throw within the timeout and say what they waited for, and for whom.
#include "tests/comm/testing.h"

#include <chrono>
#include <memory>
#include <thread>

namespace deltapipe {
namespace {

using testing::communication_error;
using testing::Owned;
using testing::runtime;

class Watchdog : public ::testing::Test {
 protected:
  // A communicator of its own: an abandoned operation leaves it unusable.
  Watchdog() : comm(runtime().split(0, runtime().rank(), "sequence")), ranks(comm->size()), rank(comm->rank()) {
    runtime().settings().timeout_s = timeout_s;
  }
  ~Watchdog() override {
    runtime().settings() = settings;
    runtime().set_where("");
    runtime().world().barrier(stream);  // the world still works
  }
  /// The error of `f`, which must come after the timeout and within another 20 s (the machine may be busy).
  template <class F>
  std::string error_in_time(const F& f) {
    const auto begin = std::chrono::steady_clock::now();
    const std::string error = communication_error(f);
    const double waited = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    EXPECT_GE(waited, timeout_s);
    EXPECT_LT(waited, timeout_s + 20);
    return error;
  }

  static constexpr double timeout_s = 0.3;
  const CommunicationSettings settings = runtime().settings();
  const std::unique_ptr<Communicator> comm;
  const int ranks, rank;
  const Stream stream = Stream::cpu();
  Arena workspace{"workspace", 1 << 22};
};

TEST_F(Watchdog, ReceiveThatNobodySends) {
  runtime().set_where("step 12");
  if (rank == 0) {
    Owned<double> x({10});
    EXPECT_EQ(error_in_time([&] { comm->receive(stream, x, 1, Purpose::hidden_state); }),
              "receive (hidden_state) on axis sequence, step 12: world rank 0 has waited 0.3 s for world rank 1");
  }
}

TEST_F(Watchdog, LargeSendThatNobodyReceives) {
  if (rank == 0) {
    Owned<double> x({1 << 20});  // 8 MiB: MPI buffers no such message
    EXPECT_EQ(error_in_time([&] { comm->send(stream, x, 1, Purpose::hidden_gradient); }),
              "send (hidden_gradient) on axis sequence: world rank 0 has waited 0.3 s for world rank 1");
  }
}

TEST_F(Watchdog, CollectivesWithoutTheLastRank) {
  if (rank + 1 == ranks) return;
  Owned<double> x({10}), whole({10 * ranks});
  x.fill(0);
  const std::string silent = fmt::format("world rank {} has waited 0.3 s for world rank {}", rank, ranks - 1);
  EXPECT_EQ(error_in_time([&] { comm->all_gather(stream, x, whole, Purpose::weights); }),
            "all_gather (weights) on axis sequence: " + silent);
  EXPECT_EQ(error_in_time([&] { comm->all_reduce_sum(stream, x, Purpose::gradients, workspace); }),
            "all_reduce_sum (gradients) on axis sequence: " + silent);
  whole.fill(0);
  EXPECT_EQ(error_in_time([&] { comm->reduce_scatter_sum(stream, whole, x, Purpose::gradients, workspace); }),
            "reduce_scatter_sum (gradients) on axis sequence: " + silent);
}

TEST_F(Watchdog, AllSilentRanksAreNamed) {
  if (rank != 0) return;
  Owned<double> x({10}), whole({10 * ranks});
  x.fill(0);
  const std::string error = error_in_time([&] { comm->all_gather(stream, x, whole, Purpose::weights); });
  EXPECT_NE(error.find(ranks == 2 ? "for world rank 1" : "for world ranks 1, 2"), std::string::npos) << error;
}

TEST_F(Watchdog, BarrierWithoutTheLastRank) {
  if (rank + 1 == ranks) return;
  const std::string error = error_in_time([&] { comm->barrier(stream); });
  EXPECT_NE(error.find("barrier (control) on axis sequence: "), std::string::npos) << error;
}

TEST_F(Watchdog, StartedOperationsFailWhenWaitedFor) {
  if (rank != 0) return;
  Owned<double> x({10});
  const Transfer receive{1, x};
  Pending pending = comm->start_exchange(stream, {}, {&receive, 1}, Purpose::conv_halo);
  EXPECT_FALSE(pending.test());
  EXPECT_NE(error_in_time([&] { pending.wait(stream); }), "");
  EXPECT_TRUE(pending.test());  // nothing is left to wait for
}

TEST_F(Watchdog, ALateAnswerWithinTheTimeoutIsNoError) {
  runtime().settings().timeout_s = 30;
  Owned<double> x({10});
  x.fill(1);
  if (rank == 1) {
    std::this_thread::sleep_for(std::chrono::milliseconds(400));  // the watchdog of another test would have barked
    comm->send(stream, x, 0, Purpose::hidden_state);
  }
  if (rank == 0) {
    EXPECT_EQ(communication_error([&] { comm->receive(stream, x, 1, Purpose::hidden_state); }), "");
  }
}

}  // namespace
}  // namespace deltapipe
