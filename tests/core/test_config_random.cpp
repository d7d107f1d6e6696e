// Random valid configs survive printing and reading; damaged texts are read or refused, and nothing else.
#include "core/config.h"
#include "core/error.h"
#include "core/random.h"
#include "tests/core/config_testing.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <exception>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

namespace deltapipe {
namespace {

using config_testing::is_one_line;
using config_testing::recipe;

/// Random values over the whole accepted range of every key.
class RandomConfig {
 public:
  explicit RandomConfig(std::uint64_t seed) : random_(seed, "config") {}

  Config next() {
    Config c;
    c.run.name = name("._-");
    c.run.dir = any_string();
    c.run.seed = integer(0, std::numeric_limits<std::int64_t>::max());
    pick(c.run.device);
    pick(c.run.dtype);
    c.run.threads = integer(0, 65536);
    c.run.deterministic = coin();
    pick(c.run.log_level);
    c.student.init = static_cast<StudentInit>(integer(0, 2));
    if (coin() || c.student.init == StudentInit::teacher) c.teacher.path = "t" + any_string();
    c.student.path = "s" + any_string();
    c.student.mixers = list<std::string>(1, 5, [&] {
      return std::vector<std::string>{"kda", "nope", "rope"}[below(3)];
    });
    c.student.kda = {.heads = size(0),
                     .head_dim = size(0),
                     .conv_width = size(1),
                     .gate_rank = size(0),
                     .gate_lower_bound = -5.0 * unit()};
    pick(c.student.kda.conv_init);
    c.student.attention.kv_heads = size(0);
    StudentModelConfig& m = c.student.model;
    pick(m.type);
    m.vocabulary = size(0);
    m.hidden = size(1);
    m.layers = size(1);
    m.intermediate = size(1);
    m.kv_heads = integer(1, 1000);
    m.heads = m.kv_heads * integer(1, 1000);
    m.head_dim = 2 * integer(1, 1000);
    m.max_positions = size(1);
    m.norm_eps = positive();
    m.tied_embeddings = coin();
    m.init_std = positive();
    m.rope_theta = positive();
    m.rope_factor = coin() ? 1.0 : 1.0 + positive();
    m.rope_original_max_positions = size(1);
    m.rope_beta_slow = 1.0 + unit();
    m.rope_beta_fast = 2.0 + positive();
    c.data = {any_string(), any_string(), coin()};
    c.memory.recompute = coin();
    c.memory.loss_block_tokens = size(1);
    pick(c.memory.optimizer);
    c.optimizer.beta1 = unit();
    c.optimizer.beta2 = unit();
    c.optimizer.epsilon = positive();
    c.optimizer.weight_decay = unit();
    c.optimizer.clip_norm = coin() ? 0.0 : positive();
    c.optimizer.max_skipped_steps = count();
    pick(c.optimizer.state);
    c.optimizer.groups = list<OptimizerGroupConfig>(0, 3, [&] {
      return OptimizerGroupConfig{pattern(), positive(), coin()};
    });
    const std::size_t stages = below(4);
    for (std::size_t i = 0; i < stages; ++i) c.stages.push_back(stage(i, !c.teacher.path.empty()));
    c.checkpoint = {count() - 1, count()};
    c.eval.every_steps = count() - 1;
    c.eval.tokens = count();
    c.eval.sequence_length = size(0);
    c.eval.needle.lengths = list<std::int64_t>(0, 4, [&] { return size(1); });
    c.eval.needle.depths = list<double>(1, 4, [&] { return unit(); });
    c.eval.needle.keys = list<std::int64_t>(1, 4, [&] { return size(1); });
    c.eval.needle.key_tokens = size(1);
    c.eval.needle.value_tokens = size(1);
    c.eval.needle.samples = size(1);
    c.log.every_steps = count();
    c.mesh.data = integer(0, 64);
    c.mesh.pipeline = integer(1, 64);
    c.mesh.sequence = integer(1, 64);
    pick(c.mesh.layout);
    c.mesh.timeout_s = positive();
    pick(c.pipeline.schedule);
    if (c.pipeline.schedule == PipelineSchedule::interleaved) c.pipeline.chunks = integer(1, 8);
    if (c.pipeline.schedule == PipelineSchedule::zero_bubble) c.pipeline.put_off_layers = size(0);
    pick(c.pipeline.teacher);
    c.pipeline.kept_teacher = size(0);
    c.pipeline.layers = list<std::int64_t>(0, 4, [&] { return size(1); });
    if (coin()) c.trace.steps = {integer(1, 100), integer(100, 200)};
    return c;
  }

  std::size_t below(std::size_t n) { return static_cast<std::size_t>(random_.next_below(n)); }
  bool coin() { return below(2) == 0; }

 private:
  StageConfig stage(std::size_t i, bool teacher) {
    StageConfig s;
    s.name = name("_-") + std::to_string(i);
    s.sequence_length = integer(1, 1 << 20);
    s.microbatch_sequences = integer(1, 64);
    s.batch_sequences = s.microbatch_sequences * integer(1, 64);
    (coin() ? s.tokens : s.steps) = integer(1, 1 << 28);
    s.learning_rate = positive();
    s.warmup = unit();
    pick(s.schedule);
    s.final_learning_rate = unit();
    s.temperature = positive();
    s.frozen = list<std::string>(0, 3, [&] { return pattern(); });
    s.hidden_layers = list<LayerPair>(0, 4, [&] { return LayerPair{size(0), size(0)}; });
    if (!teacher) {
      s.loss.ce = positive();
    } else if (coin()) {
      s.loss.mixer_mse = positive();
    } else {
      s.loss.kl = positive();
      for (double* w :
           {&s.loss.ce, &s.loss.reverse_kl, &s.loss.jsd, &s.loss.tvd, &s.loss.hidden_cosine, &s.loss.hidden_mse}) {
        if (coin()) *w = positive();
      }
    }
    s.loss.jsd_beta = 0.25 + 0.5 * unit();
    return s;
  }

  double unit() { return coin() ? random_.next_uniform() : static_cast<double>(below(10)) / 10.0; }
  /// Over 60 orders of magnitude, and whole numbers among them.
  double positive() {
    return coin() ? static_cast<double>(1 + below(1000)) : std::pow(10.0, 60.0 * random_.next_uniform() - 30.0);
  }
  std::int64_t integer(std::int64_t least, std::int64_t most) {
    return least + static_cast<std::int64_t>(random_.next_below(static_cast<std::uint64_t>(most - least) + 1));
  }
  std::int64_t size(std::int64_t least) { return coin() ? least : integer(least, std::int64_t{1} << 30); }
  std::int64_t count() { return coin() ? 1 : integer(1, std::int64_t{1} << 60); }
  template <Choice E>
  void pick(E& value) {
    value = static_cast<E>(below(words_of<E>.size()));
  }
  template <class T, class F>
  std::vector<T> list(std::size_t least, std::size_t most, const F& element) {
    std::vector<T> v(least + below(most - least + 1));
    for (T& e : v) e = element();
    return v;
  }
  std::string name(std::string_view punctuation) {
    const std::string characters = "abcXYZ019" + std::string(punctuation);
    std::string s = "n";
    for (std::size_t n = below(12); n > 0; --n) s += characters[below(characters.size())];
    return s;
  }
  std::string pattern() {
    static const std::vector<std::string> parts{"norm",  "\\.weight$", "^model\\.", "(a|b)+", "[0-9]{1,3}",
                                                "\"q\"", "\\d*",       "embed",     "(?:x)?", "#="};
    std::string s = parts[below(parts.size())];
    for (std::size_t n = below(3); n > 0; --n) s += parts[below(parts.size())];
    return s;
  }
  /// Every ASCII character, quotes, backslashes and control characters among them, and some of more bytes.
  std::string any_string() {
    std::string s;
    for (std::size_t n = below(12); n > 0; --n) {
      static const std::vector<std::string> wide{"\u00e9", "\u4e2d", "\U0001f600"};
      if (below(8) == 0) {
        s += wide[below(wide.size())];
      } else {
        s += static_cast<char>(below(128));
      }
    }
    return s;
  }

  RandomStream random_;
};

TEST(Config, RandomConfigsSurviveTheRoundTrip) {
  RandomConfig random(1);
  for (int i = 0; i < 500; ++i) {
    const Config c = random.next();
    const std::string text = to_toml(c);
    ASSERT_NO_THROW({ ASSERT_EQ(parse_config(text, "run.toml"), c) << text; }) << text;
  }
}

/// A few changes to a text: bytes changed, dropped and added, tokens put in, lines doubled, pieces copied, the end cut.
std::string mutated(std::string s, RandomConfig& random) {
  static const std::vector<std::string> tokens{
      "[",      "]",      "[[stage]]\n", "=",       "\n",     ".",          "\"",
      "'''",    "\"\"\"", "{",           "}",       "#",      ",",          "-1",
      "0x7f",   "1e999",  "nan",         "-inf",    "true",   "\\u",        "\\",
      "\xff",   "\r",     "\t",          "a.b",     "= =",    "1979-05-27", "07:32",
      "[stage", "(((",    "*",           "[^",      "{9999}", "1_0",        "0.5",
      "\xc3",   "\u00e9", "\ufe70",      "[=",      "x=1",    "0",          "[stage.loss]",
      "loss.",  "steps=", "[0,",         "[[run]]", "]]\n",   "''",         "1.0",
      "+",      "-"};
  for (std::size_t n = 1 + random.below(4); n > 0; --n) {
    const std::size_t at = random.below(s.size() + 1);
    switch (random.below(7)) {
      case 0:
        if (at < s.size()) s[at] = static_cast<char>(random.below(256));
        break;
      case 1: s.erase(at, 1 + random.below(20)); break;
      case 2: s.insert(at, tokens[random.below(tokens.size())]); break;
      case 3: {  // the line after `at`, once more
        const std::size_t begin = s.find('\n', at);
        if (begin != std::string::npos) s.insert(begin, s.substr(begin, s.find('\n', begin + 1) - begin));
        break;
      }
      case 4:
        if (random.below(10) == 0) s.resize(at);
        break;
      case 5: {
        const std::size_t digit = s.find_first_of("0123456789", at);
        if (digit != std::string::npos) s[digit] = static_cast<char>('0' + random.below(10));
        break;
      }
      case 6: {
        const std::string piece = s.substr(at, random.below(60));
        s.insert(random.below(s.size() + 1), piece);
        break;
      }
    }
  }
  return s;
}

// Any other exception, a crash or a message of several lines fails the test.
TEST(Config, MutatedTextsParseOrThrowConfigError) {
  RandomConfig random(2);
  int accepted = 0, refused = 0;
  for (int i = 0; i < 3000; ++i) {
    const std::string text = mutated(i % 2 == 0 ? recipe : to_toml(random.next()), random);
    try {
      const Config c = parse_config(text, "run.toml");
      ++accepted;
      EXPECT_EQ(parse_config(to_toml(c), "printed"), c) << text;
    } catch (const ConfigError& e) {
      ++refused;
      EXPECT_TRUE(is_one_line(e.what())) << e.what();
    } catch (const std::exception& e) {
      FAIL() << "another exception: " << e.what() << "\n" << text;
    }
  }
  // Both outcomes are common, or the mutations would test little.
  EXPECT_GT(accepted, 300);
  EXPECT_GT(refused, 300);
}

TEST(Config, MutatedOverridesParseOrThrowConfigError) {
  RandomConfig random(3);
  const std::vector<std::string> seeds{"run.seed=11",
                                       "student.mixers=[\"kda\", 'nope']",
                                       "stage.0.loss.mixer_mse=0.5",
                                       "data.train=../data-1/train_0.h5",
                                       "optimizer.group.1.pattern='^model\\.norm'",
                                       "stage.1.hidden_layers=[[2, 5]]"};
  int accepted = 0, refused = 0;
  for (int i = 0; i < 3000; ++i) {
    const std::vector<std::string> overrides{mutated(seeds[random.below(seeds.size())], random)};
    try {
      parse_config(recipe, "run.toml", overrides);
      ++accepted;
    } catch (const ConfigError& e) {
      ++refused;
      EXPECT_TRUE(is_one_line(e.what())) << e.what();
    } catch (const std::exception& e) {
      FAIL() << "another exception: " << e.what() << "\n" << overrides[0];
    }
  }
  EXPECT_GT(accepted, 100);
  EXPECT_GT(refused, 100);
}

}  // namespace
}  // namespace deltapipe
