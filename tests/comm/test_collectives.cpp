// Reductions, gathers, broadcast and barrier against the same sums done by one rank, in rank order: equal to the bit.
#include "tests/comm/testing.h"

#include <chrono>
#include <thread>

namespace deltapipe {
namespace {

using testing::Owned;
using testing::runtime;
using testing::same_bits;

/// What rank `rank` contributes.
template <class T>
Owned<T> contribution(int rank, std::int64_t elements) {
  RandomStream r(testing::test_seed(), "rank " + std::to_string(rank) + " of " + std::to_string(elements));
  Owned<T> x({elements});
  x.normal(r);
  return x;
}

template <class T>
Owned<T> sum_in_rank_order(int ranks, std::int64_t elements) {
  Owned<T> sum = contribution<T>(0, elements);
  for (int rank = 1; rank < ranks; ++rank) {
    const Owned<T> x = contribution<T>(rank, elements);
    for (std::int64_t i = 0; i < elements; ++i) sum[i] += x[i];
  }
  return sum;
}

template <class T>
Owned<T> part_of(const Owned<T>& whole, int rank, std::int64_t part) {
  Owned<T> out({part});
  std::copy_n(whole.begin() + rank * part, part, out.begin());
  return out;
}

class Collectives : public ::testing::Test {
 protected:
  Collectives() : world(runtime().world()), ranks(world.size()), rank(world.rank()) {}
  ~Collectives() override { runtime().settings() = settings; }

  Communicator& world;
  const int ranks, rank;
  const CommunicationSettings settings = runtime().settings();
};

template <class T>
void expect_reductions(Communicator& world, std::int64_t part) {
  const int ranks = world.size(), rank = world.rank();
  const Owned<T> own = contribution<T>(rank, part * ranks), sum = sum_in_rank_order<T>(ranks, part * ranks);
  const Owned<T> expected = part_of(sum, rank, part);
  testing::with_exact_workspace([&](const Stream& stream, Arena& workspace) {
    Owned<T> whole = own, out({part});
    world.reduce_scatter_sum(stream, whole, out, Purpose::gradients, workspace);
    if (stream.is_dry()) return;
    EXPECT_TRUE(same_bits(whole, own));
    EXPECT_TRUE(same_bits(out, expected)) << part;
    // In its own place.
    world.reduce_scatter_sum(stream, whole, whole.tensor().rows(rank * part, (rank + 1) * part), Purpose::gradients,
                             workspace);
    EXPECT_TRUE(same_bits(part_of(whole, rank, part), expected)) << part;
  });
}

TEST_F(Collectives, ReduceScatter) {
  for (const std::int64_t part : {1, 7, 300, 5000}) {
    expect_reductions<double>(world, part);
    expect_reductions<float>(world, part);
  }
}

TEST_F(Collectives, ReduceScatterInBlocks) {
  runtime().settings().reduce_bytes = 4096;  // blocks of 256 elements at most ranks: many rounds
  for (const std::int64_t part : {255, 256, 257, 3000}) expect_reductions<double>(world, part);
}

TEST_F(Collectives, AllReduce) {
  for (const std::size_t reduce_bytes : {std::size_t{4096}, settings.reduce_bytes}) {
    runtime().settings().reduce_bytes = reduce_bytes;
    // Small ones, the largest small one, uneven parts; the last is odd for every number of ranks but 1.
    for (const std::int64_t elements : {1, 5, 2048, 2049, 30011}) {
      const Owned<double> sum = sum_in_rank_order<double>(ranks, elements);
      testing::with_exact_workspace([&](const Stream& stream, Arena& workspace) {
        Owned<double> x = contribution<double>(rank, elements);
        world.all_reduce_sum(stream, x, Purpose::gradients, workspace);
        if (!stream.is_dry()) {
          EXPECT_TRUE(same_bits(x, sum)) << elements;
        }
      });
    }
  }
}

TEST_F(Collectives, AllReduceInUnevenParts) {
  // 4 bytes above the small ones: the last part is shorter than the others.
  const Owned<float> sum = sum_in_rank_order<float>(ranks, 4097);
  testing::with_exact_workspace([&](const Stream& stream, Arena& workspace) {
    Owned<float> x = contribution<float>(rank, 4097);
    world.all_reduce_sum(stream, x, Purpose::gradients, workspace);
    if (!stream.is_dry()) {
      EXPECT_TRUE(same_bits(x, sum));
    }
  });
}

TEST_F(Collectives, AllGather) {
  for (const std::size_t message_bytes : {std::size_t{1000}, settings.message_bytes}) {
    runtime().settings().message_bytes = message_bytes;  // pieces of 1000 bytes, or whole
    for (const std::int64_t part : {1, 9, 1000}) {
      Owned<double> whole({part * ranks});
      world.all_gather(Stream::cpu(), contribution<double>(rank, part), whole, Purpose::weights);
      for (int r = 0; r < ranks; ++r) EXPECT_TRUE(same_bits(part_of(whole, r, part), contribution<double>(r, part)));
      // In place, and of another dtype.
      Owned<std::int32_t> ids({part * ranks});
      ids.fill(-1);
      for (std::int64_t i = 0; i < part; ++i) ids[rank * part + i] = static_cast<std::int32_t>(rank * 1000 + i);
      world.all_gather(Stream::cpu(), ids.tensor().rows(rank * part, (rank + 1) * part), ids, Purpose::weights);
      for (std::int64_t i = 0; i < part * ranks; ++i) ASSERT_EQ(ids[i], i / part * 1000 + i % part);
    }
  }
}

TEST_F(Collectives, BroadcastFromEveryRank) {
  for (int root = 0; root < ranks; ++root) {
    Owned<double> x = contribution<double>(rank, 100);
    world.broadcast(Stream::cpu(), x, root, Purpose::weights);
    EXPECT_TRUE(same_bits(x, contribution<double>(root, 100)));
  }
}

TEST_F(Collectives, NobodyLeavesABarrierBeforeAllHaveCome) {
  // The clock is the host's: ranks of one machine read the same.
  const auto now = [] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  };
  for (int late = 0; late < ranks; ++late) {
    if (rank == late) std::this_thread::sleep_for(std::chrono::milliseconds(20));
    Owned<double> entered({1}), left({1}), all_entered({ranks});
    entered[0] = now();
    world.barrier(Stream::cpu());
    left[0] = now();
    world.all_gather(Stream::cpu(), entered, all_entered, Purpose::control);
    for (const double t : all_entered) EXPECT_LE(t, left[0]);
  }
}

TEST_F(Collectives, SeveralAtOnceWaitedForInAnyOrder) {
  runtime().settings().reduce_bytes = 4096;  // so that each needs rounds that the waiting ranks must serve
  constexpr std::int64_t elements = 6000;
  const Stream stream = Stream::cpu();
  Arena workspace("workspace", 1 << 20);
  const Owned<double> own = contribution<double>(rank, elements);
  Owned<double> a = own, b = own, part({elements}), gathered({elements * ranks}),
                scattered = contribution<double>(rank, elements * ranks);
  std::vector<Pending> pending;
  pending.push_back(world.start_all_reduce_sum(stream, a, Purpose::gradients, workspace));
  pending.push_back(world.start_reduce_scatter_sum(stream, scattered, part, Purpose::gradients, workspace));
  pending.push_back(world.start_all_gather(stream, own, gathered, Purpose::weights));
  pending.push_back(world.start_all_reduce_sum(stream, b, Purpose::gradients, workspace));
  const std::size_t n = pending.size(), first = static_cast<std::size_t>(rank);
  for (std::size_t i = 0; i < n; ++i) {  // another order on every rank
    Pending& p = pending[rank % 2 == 0 ? (first + i) % n : (first + n - i) % n];
    if (i == 1) {
      while (!p.test()) std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
    p.wait(stream);
    EXPECT_TRUE(p.test());
  }
  const Owned<double> sum = sum_in_rank_order<double>(ranks, elements);
  EXPECT_TRUE(same_bits(a, sum));
  EXPECT_TRUE(same_bits(b, sum));
  EXPECT_TRUE(same_bits(part, part_of(sum_in_rank_order<double>(ranks, elements * ranks), rank, elements)));
  for (int r = 0; r < ranks; ++r)
    EXPECT_TRUE(same_bits(part_of(gathered, r, elements), contribution<double>(r, elements)));
}

TEST_F(Collectives, BitsDoNotDependOnTiming) {
  Arena workspace("workspace", 1 << 22);
  const Owned<float> sum = sum_in_rank_order<float>(ranks, 20000);
  for (int round = 0; round < 4; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds((rank * 7 + round * 3) % 5));
    Owned<float> x = contribution<float>(rank, 20000);
    world.all_reduce_sum(Stream::cpu(), x, Purpose::gradients, workspace);
    EXPECT_TRUE(same_bits(x, sum));
  }
}

TEST_F(Collectives, OfAnotherThreadAreRefused) {
  if (ranks == 1) return;
  bool refused = false;
  std::thread([&] {
    try {
      world.barrier(Stream::cpu());
    } catch (const InternalError&) {
      refused = true;
    }
  }).join();
  EXPECT_TRUE(refused);
}

}  // namespace
}  // namespace deltapipe
