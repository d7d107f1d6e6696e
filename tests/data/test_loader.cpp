#include "data/loader.h"

#include "core/error.h"
#include "core/random.h"
#include "tests/data/testing.h"

#include <algorithm>
#include <thread>

namespace deltapipe {
namespace {

using testing::Documents;
using testing::error_of;
using testing::TemporaryFolder;

const TokenDatasetInfo tiny{"tiny", "00", 50, 0, 1};

struct Sequence {
  explicit Sequence(std::int64_t length)
      : tokens(static_cast<std::size_t>(length), -7), labels(tokens), start(tokens), positions(tokens) {}
  operator SequenceSpans() { return {tokens, labels, start, positions}; }
  std::vector<std::int32_t> tokens, labels, start, positions;
  friend bool operator==(const Sequence&, const Sequence&) = default;
};

/// The definition in data/loader.h, one token at a time.
class Definition {
 public:
  explicit Definition(const Documents& documents) {
    for (const auto& document : documents) {
      const auto begin = static_cast<std::int64_t>(stream_.size());
      for (std::size_t i = 0; i < document.size(); ++i) {
        const bool last = i + 1 == document.size();
        stream_.push_back(
            {static_cast<std::int32_t>(document[i]), last ? -1 : static_cast<std::int32_t>(document[i + 1]), begin});
      }
    }
  }
  std::size_t size() const { return stream_.size(); }
  Sequence window(std::uint64_t window, std::int64_t length, bool isolate) const {
    Sequence out(length);
    const auto first = static_cast<std::int64_t>(window) * length;
    for (std::int64_t t = 0; t < length; ++t) {
      const Token& token = stream_[static_cast<std::size_t>(first + t)];
      const auto i = static_cast<std::size_t>(t);
      out.tokens[i] = token.id;
      out.labels[i] = token.next;
      out.start[i] = isolate ? static_cast<std::int32_t>(std::max<std::int64_t>(0, token.document_begin - first)) : 0;
      out.positions[i] = static_cast<std::int32_t>(t) - out.start[i];
    }
    return out;
  }

 private:
  struct Token {
    std::int32_t id, next;
    std::int64_t document_begin;
  };
  std::vector<Token> stream_;
};

TEST(WindowReader, EqualsTheDefinition) {
  const TemporaryFolder folder;
  for (std::uint64_t seed = 0; seed < 12; ++seed) {
    const std::uint64_t longest = std::vector<std::uint64_t>{1, 3, 40, 200}[seed % 4];
    const Documents documents = testing::random_documents(seed, 60, longest, 50);
    const Definition expected(documents);
    testing::write_dataset(folder / "a.h5", tiny, documents);
    const TokenDataset dataset(folder / "a.h5");
    for (const std::int64_t length : {1, 2, 7, 16, 33, 60}) {
      for (const bool isolate : {true, false}) {
        const WindowReader reader(dataset, length, isolate);
        ASSERT_EQ(reader.windows(), expected.size() / static_cast<std::size_t>(length));
        for (std::uint64_t w = 0; w < reader.windows(); ++w) {
          Sequence got(length);
          reader.fill(w, got);
          ASSERT_EQ(got, expected.window(w, length, isolate)) << seed << ' ' << length << ' ' << w;
        }
      }
    }
  }
}

TEST(WindowReader, CornersByHand) {
  const TemporaryFolder folder;
  testing::write_dataset(folder / "a.h5", tiny, {{10, 11, 12, 13, 14}, {20}, {30, 31}, {40, 41, 42, 43}});
  const TokenDataset dataset(folder / "a.h5");  // 12 tokens: windows 10..13 | 14 20 30 31 | 40..43
  const WindowReader reader(dataset, 4, true);
  ASSERT_EQ(reader.windows(), 3u);
  Sequence s(4);
  reader.fill(0, s);
  EXPECT_EQ(s.labels, (std::vector<std::int32_t>{11, 12, 13, 14}));  // the last one lies in the next window
  reader.fill(1, s);
  EXPECT_EQ(s.tokens, (std::vector<std::int32_t>{14, 20, 30, 31}));
  EXPECT_EQ(s.labels, (std::vector<std::int32_t>{-1, -1, 31, -1}));
  EXPECT_EQ(s.start, (std::vector<std::int32_t>{0, 1, 2, 2}));
  EXPECT_EQ(s.positions, (std::vector<std::int32_t>{0, 0, 0, 1}));
  reader.fill(2, s);
  EXPECT_EQ(s.labels, (std::vector<std::int32_t>{41, 42, 43, -1}));  // the end of the stream

  const WindowReader joined(dataset, 4, false);
  joined.fill(1, s);
  EXPECT_EQ(s.labels, (std::vector<std::int32_t>{-1, -1, 31, -1}));
  EXPECT_EQ(s.start, (std::vector<std::int32_t>{0, 0, 0, 0}));
  EXPECT_EQ(s.positions, (std::vector<std::int32_t>{0, 1, 2, 3}));

  const WindowReader tail(dataset, 5, true);  // 2 windows; tokens 10 and 11 of the stream are left over
  EXPECT_EQ(tail.windows(), 2u);
  Sequence five(5);
  tail.fill(1, five);
  EXPECT_EQ(five.tokens, (std::vector<std::int32_t>{20, 30, 31, 40, 41}));
  EXPECT_EQ(five.labels, (std::vector<std::int32_t>{-1, 31, -1, 41, 42}));
}

TEST(WindowReader, RefusesWrongCalls) {
  const TemporaryFolder folder;
  testing::write_dataset(folder / "a.h5", tiny, {{1, 2, 3}});
  const TokenDataset dataset(folder / "a.h5");
  const std::string message = error_of<ConfigError>([&] { WindowReader(dataset, 4, true); });
  EXPECT_MENTIONS(message, "a.h5: 3 tokens are fewer than one sequence of 4");
  EXPECT_THROW(WindowReader(dataset, 0, true), ConfigError);
  EXPECT_THROW(WindowReader(dataset, -5, true), ConfigError);
  const WindowReader reader(dataset, 3, true);
  Sequence three(3), two(2);
  EXPECT_THROW(reader.fill(1, three), InternalError);
  EXPECT_THROW(reader.fill(0, two), InternalError);
  reader.fill(0, three);
}

TEST(WindowReader, NamesDamagedTokens) {
  const TemporaryFolder folder;
  const auto path = folder / "a.h5";
  testing::write_dataset(path, {"wide", "00", 60, -1, -1}, {{1, 2, 3, 4, 55, 6}});
  // The same bytes with one token turned into an id that the vocabulary does not have.
  std::string bytes = read_file(path);
  const char before[] = {55, 0, 0, 0, 6, 0, 0, 0};
  const std::size_t at = bytes.find(std::string(before, sizeof before));
  ASSERT_NE(at, std::string::npos);
  bytes[at] = 60;
  testing::write_text(path, bytes);
  const TokenDataset dataset(path);
  const WindowReader reader(dataset, 2, true);
  Sequence s(2);
  reader.fill(0, s);
  for (const std::uint64_t window : {1u, 2u}) {  // as the label after window 1, as a token of window 2
    EXPECT_MENTIONS(error_of<FormatError>([&] { reader.fill(window, s); }), "/tokens[4] is 60");
  }
}

TEST(SequenceLoader, ShowsEveryWindowOnceAnEpoch) {
  const TemporaryFolder folder;
  const Documents documents = testing::random_documents(8, 100, 60, 50);
  const Definition expected(documents);
  testing::write_dataset(folder / "a.h5", tiny, documents);
  const TokenDataset dataset(folder / "a.h5");
  const SequenceLoader loader(dataset, 16, 42, true);
  const std::uint64_t n = loader.windows();
  ASSERT_GT(n, 100u);
  std::vector<std::vector<std::uint64_t>> orders;
  for (std::uint64_t epoch = 0; epoch < 3; ++epoch) {
    std::vector<std::uint64_t> order;
    for (std::uint64_t i = 0; i < n; ++i) {
      const std::uint64_t position = epoch * n + i;
      const std::uint64_t window = loader.window_of(position);
      order.push_back(window);
      Sequence got(16);
      loader.fill(position, got);
      ASSERT_EQ(got, expected.window(window, 16, true)) << position;
    }
    orders.push_back(order);
    std::sort(order.begin(), order.end());
    for (std::uint64_t i = 0; i < n; ++i) ASSERT_EQ(order[i], i);
  }
  EXPECT_NE(orders[0], orders[1]);
  EXPECT_NE(orders[1], orders[2]);
}

TEST(SequenceLoader, IsAPureFunctionOfItsArguments) {
  const TemporaryFolder folder;
  testing::write_dataset(folder / "a.h5", tiny, testing::random_documents(9, 100, 60, 50));
  const TokenDataset dataset(folder / "a.h5"), again(folder / "a.h5");
  const SequenceLoader one(dataset, 8, 5, true), two(again, 8, 5, true), other_seed(dataset, 8, 6, true);
  int different = 0;
  for (std::uint64_t p = 3 * one.windows(); p-- > 0;) {  // backwards on purpose: nothing depends on what came before
    Sequence a(8), b(8), c(8);
    one.fill(p, a);
    two.fill(p, b);
    other_seed.fill(p, c);
    ASSERT_EQ(a, b);
    different += a == c ? 0 : 1;
    ASSERT_EQ(one.position_of(one.state_at(p)), p);
    ASSERT_LT(one.state_at(p).position, one.windows());
  }
  EXPECT_GT(different, static_cast<int>(2 * one.windows()));
  EXPECT_EQ(one.state_at(2 * one.windows() + 3), (LoaderState{2, 3}));
}

TEST(SequenceLoader, ServesSeveralThreads) {
  const TemporaryFolder folder;
  const Documents documents = testing::random_documents(10, 300, 60, 50);
  const Definition expected(documents);
  testing::write_dataset(folder / "a.h5", tiny, documents);
  const TokenDataset dataset(folder / "a.h5");
  const SequenceLoader loader(dataset, 32, 1, true);
  std::vector<Sequence> got(200, Sequence(32));
  std::vector<std::thread> threads;
  for (std::size_t k = 0; k < 4; ++k) {
    threads.emplace_back([&, k] {
      for (std::size_t p = k; p < got.size(); p += 4) loader.fill(p, got[p]);
    });
  }
  for (auto& thread : threads) thread.join();
  for (std::size_t p = 0; p < got.size(); ++p) {
    ASSERT_EQ(got[p], expected.window(loader.window_of(p), 32, true));
  }
}

}  // namespace
}  // namespace deltapipe
