#include "eval/needle.h"

#include "core/error.h"
#include "core/random.h"
#include "model/inference.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <bit>
#include <cmath>

namespace deltapipe {
namespace {

/// Tokens of the text at random places, but for those that begin and end documents.
std::vector<std::int64_t> draw_tokens(const TokenDataset& text, RandomStream& r, std::int64_t count) {
  constexpr int most_in_a_row = 10000;  // special tokens: a text with others is left by then
  std::vector<std::int64_t> tokens;
  for (int special = 0; static_cast<std::int64_t>(tokens.size()) < count; ++special) {
    if (special == most_in_a_row) {
      fail<ConfigError>("eval.needle: {} holds hardly any tokens but bos and eos", text.path().string());
    }
    std::uint32_t t = 0;
    text.read(r.next_below(text.size()), std::span(&t, 1));
    if (static_cast<std::int64_t>(t) != text.bos() && static_cast<std::int64_t>(t) != text.eos()) {
      tokens.push_back(t);
      special = 0;
    }
  }
  return tokens;
}

/// Right answers of one model: whether all value tokens are right, and how many.
std::pair<bool, std::int64_t> ask(const Context& c, const Transformer& model, const NeedleSample& sample) {
  const auto scope = c.workspace.scope();
  const PromptBatch input(sample.prompt, model.spec().vocabulary);
  const auto n = static_cast<std::int64_t>(sample.prompt.size());
  const auto answers = static_cast<std::int64_t>(sample.expected.size());
  const Tensor x = c.workspace.allocate(model.dtype(), {n, model.spec().hidden}, "hidden state");
  const Tensor logits = c.workspace.allocate(model.dtype(), {answers, model.spec().vocabulary}, "logits");
  final_hidden_states(c, model, input.batch(c), x);
  model.head().forward(c, x.rows(n - answers, n), logits);
  if (c.stream.is_dry()) return {false, 0};
  const std::vector<std::int64_t> got = argmax_rows(c.stream, logits);
  std::int64_t right = 0;
  for (std::size_t i = 0; i < got.size(); ++i) right += got[i] == sample.expected[i];
  return {right == answers, right};
}

}  // namespace

NeedleSample make_needle_sample(const TokenDataset& text, const NeedleConfig& config, std::int64_t length, double depth,
                                std::int64_t keys, std::int64_t index, std::uint64_t seed) {
  const std::int64_t pair = config.key_tokens + config.value_tokens;
  // The prompt ends with the asked key and all but the last of its value's tokens: predictions at the last
  // value_tokens positions are the answer.
  const std::int64_t question = config.key_tokens + config.value_tokens - 1;
  const std::int64_t room = length - question;
  const std::int64_t slots = room / pair;
  if (slots < keys) {
    fail<ConfigError>("eval.needle: a text of {} tokens has room for {} key-value pairs of {} tokens, not for {}",
                      length, std::max<std::int64_t>(slots, 0), pair, keys);
  }
  if (static_cast<std::int64_t>(text.size()) < room) {
    fail<ConfigError>("eval.needle: {} has {} tokens, too few for a text of {}", text.path().string(), text.size(),
                      length);
  }
  RandomStream r(seed, fmt::format("needle {} {} {} {}", length, std::bit_cast<std::uint64_t>(depth), keys, index));
  const std::uint64_t begin = r.next_below(text.size() - static_cast<std::uint64_t>(room) + 1);
  std::vector<std::uint32_t> haystack(static_cast<std::size_t>(room));
  text.read(begin, haystack);
  NeedleSample sample;
  sample.prompt.assign(haystack.begin(), haystack.end());
  // Pairs lie on a grid of slots, so that none overwrites another.
  std::vector<std::int64_t> used{
      std::clamp<std::int64_t>(std::llround(depth * static_cast<double>(slots - 1)), 0, slots - 1)};
  std::vector<std::vector<std::int64_t>> all_keys;
  std::vector<std::int64_t> asked_key, asked_value;
  for (std::int64_t k = 0; k < keys; ++k) {
    std::vector<std::int64_t> key;
    int attempts = 0;
    do {
      if (++attempts > 1000) {
        fail<ConfigError>("eval.needle: the tokens of {} do not make {} different keys of {} tokens",
                          text.path().string(), keys, config.key_tokens);
      }
      key = draw_tokens(text, r, config.key_tokens);
    } while (std::find(all_keys.begin(), all_keys.end(), key) != all_keys.end());
    all_keys.push_back(key);
    const std::vector<std::int64_t> value = draw_tokens(text, r, config.value_tokens);
    std::int64_t slot = used[0];
    if (k == 0) {
      asked_key = key;
      asked_value = value;
    } else {
      do {
        slot = static_cast<std::int64_t>(r.next_below(static_cast<std::uint64_t>(slots)));
      } while (std::find(used.begin(), used.end(), slot) != used.end());
      used.push_back(slot);
    }
    const auto at = sample.prompt.begin() + slot * pair;
    std::copy(key.begin(), key.end(), at);
    std::copy(value.begin(), value.end(), at + config.key_tokens);
  }
  sample.prompt.insert(sample.prompt.end(), asked_key.begin(), asked_key.end());
  sample.prompt.insert(sample.prompt.end(), asked_value.begin(), asked_value.end() - 1);
  sample.expected = asked_value;
  return sample;
}

NeedleResult evaluate_needle(const Context& c, const Transformer& student, const Transformer* teacher,
                             const TokenDataset& text, const NeedleConfig& config, std::uint64_t seed) {
  NeedleResult result;
  if (c.stream.is_dry()) {
    const std::int64_t longest = *std::max_element(config.lengths.begin(), config.lengths.end());
    const NeedleSample sample = make_needle_sample(text, config, longest, 0.5, 1, 0, seed);
    ask(c, student, sample);
    if (teacher != nullptr) ask(c, *teacher, sample);
    return result;
  }
  for (const std::int64_t length : config.lengths) {
    for (const std::int64_t keys : config.keys) {
      for (const double depth : config.depths) {
        NeedleCell cell{.length = length, .depth = depth, .keys = keys, .samples = config.samples};
        double student_found = 0, student_tokens = 0, teacher_found = 0, teacher_tokens = 0;
        for (std::int64_t i = 0; i < config.samples; ++i) {
          const NeedleSample sample = make_needle_sample(text, config, length, depth, keys, i, seed);
          const auto [found, tokens] = ask(c, student, sample);
          student_found += found;
          student_tokens += static_cast<double>(tokens);
          if (teacher != nullptr) {
            const auto [t_found, t_tokens] = ask(c, *teacher, sample);
            teacher_found += t_found;
            teacher_tokens += static_cast<double>(t_tokens);
          }
        }
        const auto samples = static_cast<double>(config.samples);
        const double tokens = samples * static_cast<double>(config.value_tokens);
        cell.student_found = student_found / samples;
        cell.student_tokens = student_tokens / tokens;
        if (teacher != nullptr) {
          cell.teacher_found = teacher_found / samples;
          cell.teacher_tokens = teacher_tokens / tokens;
        }
        result.cells.push_back(cell);
      }
    }
  }
  return result;
}

std::string NeedleResult::table() const {
  const bool teacher = !cells.empty() && cells[0].teacher_found >= 0;
  std::string text = fmt::format("{:>8} {:>6} {:>5} {:>8} {:>15} {:>15}", "tokens", "depth", "keys", "samples",
                                 "student found", "student tokens");
  if (teacher) text += fmt::format(" {:>15} {:>15}", "teacher found", "teacher tokens");
  text += '\n';
  for (const NeedleCell& x : cells) {
    text += fmt::format("{:>8} {:>6.2f} {:>5} {:>8} {:>13.1f} % {:>13.1f} %", x.length, x.depth, x.keys, x.samples,
                        100 * x.student_found, 100 * x.student_tokens);
    if (teacher) text += fmt::format(" {:>13.1f} % {:>13.1f} %", 100 * x.teacher_found, 100 * x.teacher_tokens);
    text += '\n';
  }
  return text;
}

std::string NeedleResult::json() const {
  nlohmann::json list = nlohmann::json::array();
  for (const NeedleCell& x : cells) {
    nlohmann::json j{{"length", x.length},
                     {"depth", x.depth},
                     {"keys", x.keys},
                     {"samples", x.samples},
                     {"student_found", x.student_found},
                     {"student_tokens", x.student_tokens}};
    if (x.teacher_found >= 0) {
      j["teacher_found"] = x.teacher_found;
      j["teacher_tokens"] = x.teacher_tokens;
    }
    list.push_back(j);
  }
  return list.dump();
}

}  // namespace deltapipe
