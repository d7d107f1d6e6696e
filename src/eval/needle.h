// Needle retrieval: key-value pairs hidden in held-out text, one key repeated at the end, its value asked for.
//
// A sequence of `length` tokens is held-out text with pairs [key | value] written over it, then the asked key again;
// the model must continue with that key's value. The asked pair lies at `depth` (0: beginning, 1: just before the
// question), the others at places drawn at random. Keys and values are drawn from the tokens of the text itself, so no
// tokenizer is needed. A sample counts as found when every value token is the model's first choice given those before
// it, which is what greedy generation would produce.
#pragma once

#include "core/arena.h"
#include "core/config.h"
#include "data/token_dataset.h"
#include "model/transformer.h"

#include <cstdint>
#include <string>
#include <vector>

namespace deltapipe {

struct NeedleCell {
  std::int64_t length = 0;
  double depth = 0;
  std::int64_t keys = 0;
  std::int64_t samples = 0;
  double student_found = 0;   // share of samples
  double student_tokens = 0;  // share of value tokens
  double teacher_found = -1;  // -1: no teacher
  double teacher_tokens = -1;
};

struct NeedleResult {
  std::vector<NeedleCell> cells;
  std::string table() const;
  std::string json() const;  // an array, one object a cell
};

/// Tokens of one sample: [length] text and question, then the value_tokens expected ones.
struct NeedleSample {
  std::vector<std::int64_t> prompt;    // `length` tokens; ends with the asked key and all but the last value token
  std::vector<std::int64_t> expected;  // the value
};
/// Sample `index` of a cell: a function of (seed, cell, index) alone. Throws ConfigError when the text or the length is
/// too short for that many pairs.
NeedleSample make_needle_sample(const TokenDataset& text, const NeedleConfig& config, std::int64_t length, double depth,
                                std::int64_t keys, std::int64_t index, std::uint64_t seed);

/// `teacher` may be null. On a dry stream one sample of the longest length is measured.
NeedleResult evaluate_needle(const Context& c, const Transformer& student, const Transformer* teacher,
                             const TokenDataset& text, const NeedleConfig& config, std::uint64_t seed);

}  // namespace deltapipe
