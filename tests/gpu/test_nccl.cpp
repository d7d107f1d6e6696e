// Communicators over NCCL, on one GPU that all ranks share. Values are small integers, so that every order of a sum
// gives the same bits.
#include "comm/mesh.h"
#include "comm/nccl_communicator.h"
#include "comm/sequence_parallel.h"
#include "tests/comm/testing.h"
#include "tests/gpu/testing.h"

#include <chrono>
#include <thread>

namespace deltapipe {
namespace {

using testing::gpu_stream;
using testing::Owned;
using testing::runtime;

/// This rank's: its own where there are enough, else shared.
Device gpu() { return {Device::Kind::cuda, runtime().local_rank() % std::max(1, cuda_device_count())}; }

/// On this rank's device.
struct OnDevice : testing::OnDevice {
  OnDevice(DType dtype, const Shape& shape) : testing::OnDevice(dtype, shape, gpu()) {}
  OnDevice(DType dtype, const Owned<double>& x) : testing::OnDevice(dtype, x, gpu()) {}
};

Owned<double> contribution(int rank, std::int64_t elements) {
  Owned<double> x({elements});
  for (std::int64_t i = 0; i < elements; ++i) x[i] = static_cast<double>((i * 7 + rank * 3) % 11 - 5);
  return x;
}

Owned<double> sum_of(int ranks, std::int64_t elements) {
  Owned<double> sum({elements});
  sum.fill(0);
  for (int rank = 0; rank < ranks; ++rank) {
    const Owned<double> x = contribution(rank, elements);
    for (std::int64_t i = 0; i < elements; ++i) sum[i] += x[i];
  }
  return sum;
}

Owned<double> part_of(const Owned<double>& whole, int rank, std::int64_t part) {
  Owned<double> out({part});
  std::copy_n(whole.begin() + rank * part, part, out.begin());
  return out;
}

class Nccl : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    if (cuda_device_count() == 0) return;
    if (runtime().local_size() > cuda_device_count()) let_ranks_share_a_device(runtime().rank());
    set_device(gpu());
    communicator = runtime().on_device(runtime().world(), gpu()).release();
  }
  static void TearDownTestSuite() {
    delete communicator;
    communicator = nullptr;
  }
  void SetUp() override {
    if (communicator == nullptr) GTEST_SKIP() << "no CUDA device";
    communicator->reset_traffic();
    runtime().settings().timeout_s = 60;  // what hangs says so
  }
  void TearDown() override { runtime().settings() = settings; }

  Communicator& world() { return *communicator; }
  int ranks() { return runtime().size(); }
  int rank() { return runtime().rank(); }

  static Communicator* communicator;
  const CommunicationSettings settings = runtime().settings();
  Arena workspace{"workspace", 0, gpu()};
};
Communicator* Nccl::communicator = nullptr;

TEST_F(Nccl, Sums) {
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16}) {
    for (const std::int64_t part : {1, 7, 5000}) {
      const std::int64_t n = part * ranks();
      const Owned<double> own = contribution(rank(), n), sum = sum_of(ranks(), n);
      OnDevice whole(dtype, own), out(dtype, Shape{part});
      world().reduce_scatter_sum(gpu_stream(), whole, out, Purpose::gradients, workspace);
      EXPECT_TRUE(testing::same_bits(out.host(), part_of(sum, rank(), part)));
      EXPECT_TRUE(testing::same_bits(whole.host(), own));
      const Tensor in_place = whole.tensor().rows(rank() * part, (rank() + 1) * part);
      world().reduce_scatter_sum(gpu_stream(), whole, in_place, Purpose::gradients, workspace);
      EXPECT_TRUE(testing::same_bits(part_of(whole.host(), rank(), part), part_of(sum, rank(), part)));
      whole.write(own);
      world().all_reduce_sum(gpu_stream(), whole, Purpose::gradients, workspace);
      EXPECT_TRUE(testing::same_bits(whole.host(), sum));
    }
  }
}

TEST_F(Nccl, GathersAndBroadcasts) {
  constexpr std::int64_t part = 333;
  Owned<double> truth({part * ranks()});
  for (int r = 0; r < ranks(); ++r) {
    const Owned<double> x = contribution(r, part);
    std::copy(x.begin(), x.end(), truth.begin() + r * part);
  }
  const OnDevice own(DType::bf16, contribution(rank(), part));
  OnDevice whole(DType::bf16, Shape{part * ranks()});
  world().all_gather(gpu_stream(), own, whole, Purpose::weights);
  EXPECT_TRUE(testing::same_bits(whole.host(), truth));
  whole.poison();
  const Tensor place = whole.tensor().rows(rank() * part, (rank() + 1) * part);
  copy(gpu_stream(), own, place);
  world().all_gather(gpu_stream(), place, whole, Purpose::weights);
  EXPECT_TRUE(testing::same_bits(whole.host(), truth));
  for (int root = 0; root < ranks(); ++root) {
    OnDevice x(DType::f32, contribution(rank(), part));
    world().broadcast(gpu_stream(), x, root, Purpose::weights);
    EXPECT_TRUE(testing::same_bits(x.host(), contribution(root, part)));
  }
}

TEST_F(Nccl, ExchangesMatchByTag) {
  if (ranks() == 1) return;
  const int next = (rank() + 1) % ranks(), before = (rank() + ranks() - 1) % ranks();
  const OnDevice a(DType::f32, contribution(rank(), 100)), b(DType::f32, contribution(rank() + 50, 70));
  const OnDevice got_a(DType::f32, Shape{100}), got_b(DType::f32, Shape{70});
  const Transfer sends[] = {{next, a, 4}, {next, b, 2}};
  const Transfer receives[] = {{before, got_b, 2}, {before, got_a, 4}};  // another order
  world().exchange(gpu_stream(), sends, receives, Purpose::kda_state);
  EXPECT_TRUE(testing::same_bits(got_a.host(), contribution(before, 100)));
  EXPECT_TRUE(testing::same_bits(got_b.host(), contribution(before + 50, 70)));
  EXPECT_EQ(world().traffic(Purpose::kda_state), (Traffic{2, 680, 1}));
}

// Two kinds of messages to the next stage and one back; receivers take them in another order than they were sent, and
// every rank starts all its sends before it waits for one.
TEST_F(Nccl, StagesNeedNotBeInStep) {
  if (ranks() == 1) return;
  constexpr std::int64_t n = 1 << 18;  // more than NCCL sends ahead of a receive
  const int next = (rank() + 1) % ranks(), before = (rank() + ranks() - 1) % ranks();
  const Stream stream = gpu_stream();
  const Route routes[] = {{next, 0, true},    {next, 1, true},    {before, 2, true},
                          {before, 0, false}, {before, 1, false}, {next, 2, false}};
  world().connect(routes);
  for (int round = 0; round < 3; ++round) {
    const OnDevice teacher(DType::f32, contribution(rank(), n)), student(DType::f32, contribution(rank() + 20, n)),
        gradient(DType::f32, contribution(rank() + 40, n));
    const OnDevice got_teacher(DType::f32, Shape{n}), got_student(DType::f32, Shape{n}),
        got_gradient(DType::f32, Shape{n});
    const Transfer sends[] = {{next, teacher, 0}, {next, student, 1}, {before, gradient, 2}};
    std::vector<Pending> pending;
    for (const Transfer& t : sends) {
      const Purpose purpose = t.tag == 2 ? Purpose::hidden_gradient : Purpose::hidden_state;
      pending.push_back(world().start_exchange(stream, {&t, 1}, {}, purpose));
    }
    world().receive(stream, got_gradient, next, Purpose::hidden_gradient, 2);
    world().receive(stream, got_student, before, Purpose::hidden_state, 1);
    world().receive(stream, got_teacher, before, Purpose::hidden_state, 0);
    for (Pending& p : pending) p.wait(stream);
    EXPECT_TRUE(testing::same_bits(got_teacher.host(), contribution(before, n)));
    EXPECT_TRUE(testing::same_bits(got_student.host(), contribution(before + 20, n)));
    EXPECT_TRUE(testing::same_bits(got_gradient.host(), contribution(next + 40, n)));
  }
}

TEST_F(Nccl, StartedOperationsRunBesideTheStream) {
  constexpr std::int64_t n = 1 << 20;
  OnDevice x(DType::f32, contribution(rank(), n)), y(DType::f32, Shape{n});
  Pending pending = world().start_all_reduce_sum(gpu_stream(), x, Purpose::gradients, workspace);
  synchronize(gpu_stream());  // does not wait for the sum
  pending.wait(gpu_stream());
  copy(gpu_stream(), x, y);  // sees it
  EXPECT_TRUE(testing::same_bits(y.host(), sum_of(ranks(), n)));
  Pending polled = world().start_all_reduce_sum(gpu_stream(), y, Purpose::gradients, workspace);
  while (!polled.test()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

TEST_F(Nccl, HostMemoryGoesOverMpi) {
  float tokens = static_cast<float>(rank() + 1);
  world().all_reduce_sum(gpu_stream(), Tensor(&tokens, DType::f32, {1}), Purpose::control, workspace);
  EXPECT_EQ(tokens, static_cast<float>(ranks() * (ranks() + 1) / 2));
  world().barrier(gpu_stream());
}

TEST_F(Nccl, TrafficIsARings) {
  const std::int64_t part = 64;
  const auto others = static_cast<std::uint64_t>(ranks() - 1), bytes = static_cast<std::uint64_t>(part) * 4;
  OnDevice whole(DType::f32, contribution(rank(), part * ranks())), own(DType::f32, contribution(rank(), part));
  world().all_gather(gpu_stream(), own, whole, Purpose::weights);
  world().reduce_scatter_sum(gpu_stream(), whole, own, Purpose::gradients, workspace);
  world().all_reduce_sum(gpu_stream(), whole, Purpose::data, workspace);
  const std::uint64_t round = ranks() == 1 ? 0 : 1;
  EXPECT_EQ(world().traffic(Purpose::weights), (Traffic{others, others * bytes, round}));
  EXPECT_EQ(world().traffic(Purpose::gradients), (Traffic{others, others * bytes, round}));
  EXPECT_EQ(world().traffic(Purpose::data), (Traffic{2 * others, 2 * others * bytes, round}));
  synchronize(gpu_stream());
}

TEST_F(Nccl, SequenceParallelKeysOnTheDevice) {
  for (const LayoutKind kind : {LayoutKind::contiguous, LayoutKind::zigzag}) {
    const SequenceParallel sequence(world(), kind);
    const std::int64_t tokens = 4 * sequence.layout().segments();
    Owned<double> whole({2, tokens, 6});
    for (std::int64_t i = 0; i < whole.size(); ++i) whole[i] = static_cast<double>(i % 251);
    const Owned<double> local = testing::cut(sequence.layout(), rank(), whole);
    const OnDevice x(DType::f32, local), gathered(DType::f32, whole.shape()), back(DType::f32, local.shape());
    testing::with_planned_workspace([&](const Stream& stream, Arena& arena) {
      sequence.gather_keys(stream, x, gathered, arena);
      sequence.scatter_key_gradients(stream, gathered, back, arena);
    });
    EXPECT_TRUE(testing::same_bits(gathered.host(), whole));
    Owned<double> summed = local;
    for (double& value : summed) value *= ranks();
    EXPECT_TRUE(testing::same_bits(back.host(), summed));
  }
}

TEST_F(Nccl, AMeshOnTheDevice) {
  Mesh mesh(runtime(), {1, ranks() % 2 == 0 ? 2 : 1, 0}, gpu());
  for (const Axis axis : {Axis::pipeline, Axis::sequence, Axis::world}) {
    OnDevice x(DType::f32, contribution(0, 5));
    mesh[axis].all_reduce_sum(gpu_stream(), x, Purpose::gradients, workspace);
    Owned<double> truth = contribution(0, 5);
    for (double& value : truth) value *= mesh[axis].size();
    EXPECT_TRUE(testing::same_bits(x.host(), truth)) << name_of(axis);
  }
}

TEST_F(Nccl, ASilentRankEndsTheWait) {
  if (ranks() == 1) return;
  const auto broken = runtime().on_device(runtime().world(), gpu());
  OnDevice x(DType::f32, contribution(rank(), 1000));
  broken->all_reduce_sum(gpu_stream(), x, Purpose::gradients, workspace);  // connects
  synchronize(gpu_stream());
  runtime().settings().timeout_s = 2;
  if (rank() == 0) std::this_thread::sleep_for(std::chrono::seconds(5));
  // Every rank but 0 waits in vain; 0 then finds nobody.
  const auto begin = std::chrono::steady_clock::now();
  const std::string message = testing::communication_error([&] {
    broken->all_reduce_sum(gpu_stream(), x, Purpose::gradients, workspace);
    synchronize(gpu_stream());  // ends when the watchdog has aborted NCCL's kernel
    broken->barrier(gpu_stream());
    broken->all_reduce_sum(gpu_stream(), x, Purpose::gradients, workspace);
  });
  const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - begin;
  EXPECT_NE(message.find("all_reduce_sum (gradients) on axis world"), std::string::npos) << message;
  EXPECT_LT(waited.count(), 20) << message;
  runtime().settings() = settings;
  runtime().world().barrier(Stream::cpu());
}

}  // namespace
}  // namespace deltapipe
