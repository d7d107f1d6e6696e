// Needle retrieval: where key-value pairs lie, what is asked, and how answers are counted.
#include "eval/needle.h"

#include "core/error.h"
#include "model/inference.h"
#include "tests/data/testing.h"
#include "tests/eval/loaded.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>
#include <vector>

namespace deltapipe {
namespace {

using testing::error_of;
using testing::TemporaryFolder;
using Tokens = std::vector<std::int64_t>;

NeedleConfig config_of(std::int64_t key_tokens, std::int64_t value_tokens) {
  NeedleConfig c;
  c.key_tokens = key_tokens;
  c.value_tokens = value_tokens;
  return c;
}

Tokens part(const Tokens& all, std::int64_t begin, std::int64_t count) {
  return {all.begin() + begin, all.begin() + begin + count};
}

/// A text whose token number i is i, so that every token tells where it comes from.
class Needle : public ::testing::Test {
 protected:
  static constexpr std::int64_t text_tokens = 5000;
  Needle() {
    std::vector<std::uint32_t> document(text_tokens);
    std::iota(document.begin(), document.end(), 0u);
    testing::write_dataset(folder_ / "text.h5", {"count", "none", text_tokens, 17, 4999}, {document});
    text_.emplace(folder_ / "text.h5");
  }
  const TokenDataset& text() const { return *text_; }
  TokenDataset dataset(const std::string& name, std::uint64_t vocabulary, std::int64_t eos,
                       const testing::Documents& documents) {
    testing::write_dataset(folder_ / name, {"tiny", "none", vocabulary, -1, eos}, documents);
    return TokenDataset(folder_ / name);
  }

 private:
  TemporaryFolder folder_;
  std::optional<TokenDataset> text_;
};

TEST_F(Needle, PairLiesAtItsDepthAndIsAskedForAtTheEnd) {
  for (const auto& [key_tokens, value_tokens] : {std::pair{4, 4}, std::pair{1, 1}, std::pair{3, 5}, std::pair{6, 1}}) {
    const NeedleConfig config = config_of(key_tokens, value_tokens);
    const std::int64_t length = 211, pair = key_tokens + value_tokens, room = length - pair + 1, slots = room / pair;
    for (const double depth : {0.0, 0.1, 0.5, 0.9, 1.0}) {
      const NeedleSample s = make_needle_sample(text(), config, length, depth, 1, 3, 7);
      ASSERT_EQ(s.prompt.size(), static_cast<std::size_t>(length));
      ASSERT_EQ(s.expected.size(), static_cast<std::size_t>(value_tokens));
      const std::int64_t at = std::llround(depth * static_cast<double>(slots - 1)) * pair;
      const Tokens key = part(s.prompt, at, key_tokens);
      EXPECT_EQ(part(s.prompt, at + key_tokens, value_tokens), s.expected);
      // The end: the key again and its value but for the last token. The predictions at the last value_tokens
      // positions are then the value.
      EXPECT_EQ(part(s.prompt, room, key_tokens), key);
      EXPECT_EQ(part(s.prompt, room + key_tokens, value_tokens - 1), part(s.expected, 0, value_tokens - 1));
      // Everything else is one stretch of the text.
      const std::int64_t begin = at == 0 ? s.prompt[static_cast<std::size_t>(pair)] - pair : s.prompt[0];
      for (std::int64_t i = 0; i < room; ++i) {
        const bool in_pair = i >= at && i < at + pair;
        EXPECT_TRUE(in_pair || s.prompt[static_cast<std::size_t>(i)] == begin + i) << i;
      }
      EXPECT_LE(static_cast<double>(at + pair), static_cast<double>(room));
      EXPECT_TRUE(depth > 0.0 || at == 0) << at;
      EXPECT_TRUE(depth < 1.0 || at + 2 * pair > room) << "the last place before the question is free";
    }
  }
}

TEST_F(Needle, OtherPairsLieBesideItAndDifferFromIt) {
  const NeedleConfig config = config_of(4, 4);
  for (const std::int64_t keys : {2, 5, 12}) {
    const std::int64_t length = 103, room = 96;  // twelve places: keys = 12 fills every one
    for (std::int64_t i = 0; i < 20; ++i) {
      const NeedleSample s = make_needle_sample(text(), config, length, 0.5, keys, i, 7);
      ASSERT_EQ(s.prompt.size(), static_cast<std::size_t>(length));
      const Tokens key = part(s.prompt, room, 4);
      std::set<Tokens> found;
      std::int64_t pairs = 0, asked = 0;
      for (std::int64_t at = 0; at < room; at += 8) {
        const Tokens here = part(s.prompt, at, 8);
        bool is_text = true;
        for (std::size_t k = 1; k < 8; ++k) is_text = is_text && here[k] == here[k - 1] + 1;
        if (is_text) continue;
        ++pairs;
        found.insert(part(here, 0, 4));
        if (part(here, 0, 4) == key) {
          ++asked;
          EXPECT_EQ(part(here, 4, 4), s.expected);
          EXPECT_EQ(at, std::llround(0.5 * 11) * 8);
        }
      }
      EXPECT_EQ(pairs, keys);
      EXPECT_EQ(asked, 1);
      EXPECT_EQ(found.size(), static_cast<std::size_t>(keys)) << "a key twice";
    }
  }
}

TEST_F(Needle, SamplesAreAFunctionOfTheirArguments) {
  const NeedleConfig config = config_of(4, 4);
  const auto make = [&](std::int64_t length, double depth, std::int64_t keys, std::int64_t index, std::uint64_t seed) {
    const NeedleSample s = make_needle_sample(text(), config, length, depth, keys, index, seed);
    Tokens all = s.prompt;
    all.insert(all.end(), s.expected.begin(), s.expected.end());
    return all;
  };
  const Tokens first = make(200, 0.5, 2, 0, 1);
  EXPECT_EQ(make(200, 0.5, 2, 0, 1), first);
  std::set<Tokens> all{first,
                       make(200, 0.4, 2, 0, 1),
                       make(200, 0.5, 3, 0, 1),
                       make(200, 0.5, 2, 1, 1),
                       make(200, 0.5, 2, 0, 2),
                       make(201, 0.5, 2, 0, 1)};
  EXPECT_EQ(all.size(), 6u);
  EXPECT_EQ(make(200, 0.5, 2, 0, 1), first);
}

TEST_F(Needle, KeysAndValuesHoldNoSpecialTokens) {
  // Nearly all tokens are eos: pairs must still be made of the others.
  testing::Documents documents(400, {5});
  documents.push_back({0, 1, 2, 3, 4});
  const TokenDataset sparse = dataset("sparse.h5", 6, 5, documents);
  for (std::int64_t i = 0; i < 5; ++i) {
    const NeedleSample s = make_needle_sample(sparse, config_of(4, 4), 50, 0.3, 2, i, 1);
    for (const std::int64_t t : s.expected) EXPECT_NE(t, 5);
    for (std::int64_t k = 0; k < 4; ++k) EXPECT_NE(s.prompt[static_cast<std::size_t>(43 + k)], 5);
  }
}

TEST_F(Needle, SaysWhatDoesNotFit) {
  const NeedleConfig config = config_of(4, 4);
  EXPECT_NO_THROW(make_needle_sample(text(), config, 15, 0.5, 1, 0, 1));  // 8 for the pair, 7 for the question
  EXPECT_MENTIONS(error_of<ConfigError>([&] { make_needle_sample(text(), config, 14, 0.5, 1, 0, 1); }), "14 tokens");
  const std::string full = error_of<ConfigError>([&] { make_needle_sample(text(), config, 102, 0.5, 12, 0, 1); });
  EXPECT_MENTIONS(full, "room for 11");
  EXPECT_MENTIONS(full, "not for 12");
  const std::string shorter = error_of<ConfigError>([&] { make_needle_sample(text(), config, 6000, 0.5, 1, 0, 1); });
  EXPECT_MENTIONS(shorter, "text.h5");
  EXPECT_MENTIONS(shorter, "5000 tokens");
  const TokenDataset same = dataset("same.h5", 4, 3, {std::vector<std::uint32_t>(300, 1)});
  EXPECT_MENTIONS(error_of<ConfigError>([&] { make_needle_sample(same, config, 100, 0.5, 2, 0, 1); }),
                  "2 different keys");
  const TokenDataset special = dataset("special.h5", 4, 3, testing::Documents(300, {3}));
  EXPECT_MENTIONS(error_of<ConfigError>([&] { make_needle_sample(special, config, 100, 0.5, 1, 0, 1); }),
                  "bos and eos");
}

/// Runs the evaluation on tiny random models of three tokens, where guesses are often right.
NeedleResult evaluate(const TokenDataset& text, const NeedleConfig& config, const ModelSpec& student,
                      const ModelSpec* teacher, const std::function<void(ModelSet&)>& fill) {
  NeedleResult result;
  testing::with_tiny_models(student, teacher, DType::f64, fill, [&](const Context& c, ModelSet& models, ArenaSet&) {
    result = evaluate_needle(c, models.student(), models.teacher(), text, config, 5);
  });
  return result;
}

// A model whose weights are all zero prefers token 0 everywhere: it is right exactly where the value's token is 0.
TEST_F(Needle, CountsAnAlwaysEqualAnswerAsItShould) {
  const TokenDataset coins = dataset("coins.h5", 3, 2, testing::random_documents(1, 200, 60, 2));
  NeedleConfig config = config_of(6, 2);
  config.lengths = {40, 60};
  config.depths = {0.0, 0.7};
  config.keys = {1, 3};
  config.samples = 16;
  ModelSpec model = testing::tiny_teacher();
  model.vocabulary = 3;
  const NeedleResult r = evaluate(coins, config, model, nullptr, [](ModelSet& models) {
    for (Parameter& p : models.student_parameters().all()) std::fill_n(p.value.as<double>(), p.value.numel(), 0.0);
  });
  ASSERT_EQ(r.cells.size(), 8u);
  double total = 0;
  std::size_t cell = 0;
  for (const std::int64_t length : config.lengths) {
    for (const std::int64_t keys : config.keys) {
      for (const double depth : config.depths) {
        double found = 0, right = 0;
        for (std::int64_t i = 0; i < config.samples; ++i) {
          const Tokens value = make_needle_sample(coins, config, length, depth, keys, i, 5).expected;
          const auto zeros = std::count(value.begin(), value.end(), 0);
          right += static_cast<double>(zeros);
          found += zeros == 2;
        }
        const NeedleCell& x = r.cells[cell++];
        EXPECT_EQ(x.length, length);
        EXPECT_EQ(x.keys, keys);
        EXPECT_EQ(x.depth, depth);
        EXPECT_DOUBLE_EQ(x.student_found, found / 16);
        EXPECT_DOUBLE_EQ(x.student_tokens, right / 32);
        EXPECT_LT(x.teacher_found, 0) << "no teacher";
        total += found;
      }
    }
  }
  EXPECT_GT(total, 0);
  EXPECT_LT(total, 8 * 16);
}

// Against argmax over the logits of the whole prompt.
TEST_F(Needle, AsksBothModelsAtTheLastPositions) {
  const TokenDataset coins = dataset("coins.h5", 3, 2, testing::random_documents(1, 200, 60, 2));
  NeedleConfig config = config_of(3, 2);
  config.lengths = {45};
  config.depths = {0.5};
  config.keys = {2};
  config.samples = 20;
  ModelSpec teacher = testing::tiny_teacher();
  teacher.vocabulary = 3;
  const ModelSpec student = testing::tiny_student(teacher, {"kda", "nope"});
  const auto fill = [](ModelSet& models) {
    testing::randomize(models.student_parameters(), 1, "a ");
    testing::randomize(*models.teacher_parameters(), 1, "b ");
  };
  const NeedleResult r = evaluate(coins, config, student, &teacher, fill);
  double found[2] = {}, right[2] = {};
  testing::with_tiny_models(student, &teacher, DType::f64, fill, [&](const Context& c, ModelSet& models, ArenaSet&) {
    for (std::int64_t i = 0; i < config.samples; ++i) {
      const NeedleSample s = make_needle_sample(coins, config, 45, 0.5, 2, i, 5);
      const PromptBatch prompt(s.prompt, 3);
      int m = 0;
      for (const Transformer* model : {&models.student(), models.teacher()}) {
        Tokens best;
        for_each_logits(c, *model, prompt.batch(c), 10, [&](std::int64_t, const Tensor& logits) {
          if (c.stream.is_dry()) return;
          for (const std::int64_t t : argmax_rows(c.stream, logits)) best.push_back(t);
        });
        if (!c.stream.is_dry()) {
          const double n = (best[43] == s.expected[0] ? 1 : 0) + (best[44] == s.expected[1] ? 1 : 0);
          right[m] += n;
          found[m] += n == 2;
        }
        ++m;
      }
    }
  });
  ASSERT_EQ(r.cells.size(), 1u);
  EXPECT_DOUBLE_EQ(r.cells[0].student_found, found[0] / 20);
  EXPECT_DOUBLE_EQ(r.cells[0].student_tokens, right[0] / 40);
  EXPECT_DOUBLE_EQ(r.cells[0].teacher_found, found[1] / 20);
  EXPECT_DOUBLE_EQ(r.cells[0].teacher_tokens, right[1] / 40);
  EXPECT_GT(right[0] + right[1], 0);
}

}  // namespace
}  // namespace deltapipe
