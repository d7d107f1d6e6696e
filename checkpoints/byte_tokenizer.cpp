#include "checkpoints/byte_tokenizer.h"

#include <nlohmann/json.hpp>

namespace deltapipe {
namespace {

using nlohmann::ordered_json;

/// GPT-2's alphabet: printable bytes of Latin-1 stand for themselves, the others for U+0100 onward in byte order.
/// Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.2.
std::string character_of(unsigned byte) {
  const auto printable = [](unsigned b) { return (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174; };
  unsigned code = byte;
  if (!printable(byte)) {
    code = 256;
    for (unsigned b = 0; b < byte; ++b) code += printable(b) ? 0 : 1;
  }
  if (code < 0x80) return std::string(1, static_cast<char>(code));
  return {static_cast<char>(0xc0 | (code >> 6)), static_cast<char>(0x80 | (code & 0x3f))};  // below U+0800
}

ordered_json special_token(const char* text) {
  return {{"content", text}, {"single_word", false}, {"lstrip", false},
          {"rstrip", false}, {"normalized", false},  {"special", true}};
}

ordered_json with_id(std::int64_t id, ordered_json token) {
  token["id"] = id;
  return token;
}

}  // namespace

std::string byte_tokenizer_json() {
  ordered_json vocabulary;
  for (unsigned b = 0; b < 256; ++b) vocabulary[character_of(b)] = b;
  const ordered_json byte_level{
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", false}, {"use_regex", false}};
  ordered_json j;
  j["version"] = "1.0";
  j["truncation"] = nullptr;
  j["padding"] = nullptr;
  j["added_tokens"] = ordered_json::array();
  j["added_tokens"].push_back(with_id(byte_bos_token, special_token("<|bos|>")));
  j["added_tokens"].push_back(with_id(byte_eos_token, special_token("<|eos|>")));
  j["normalizer"] = nullptr;
  j["pre_tokenizer"] = byte_level;
  j["post_processor"] = nullptr;
  j["decoder"] = byte_level;
  j["model"] = {{"type", "BPE"},
                {"dropout", nullptr},
                {"unk_token", nullptr},
                {"continuing_subword_prefix", nullptr},
                {"end_of_word_suffix", nullptr},
                {"fuse_unk", false},
                {"byte_fallback", false},
                {"ignore_merges", false},
                {"vocab", vocabulary},
                {"merges", ordered_json::array()}};
  return j.dump(2) + "\n";
}

std::string byte_tokenizer_config_json(std::int64_t max_positions) {
  ordered_json j;
  j["tokenizer_class"] = "PreTrainedTokenizerFast";
  j["bos_token"] = "<|bos|>";
  j["eos_token"] = "<|eos|>";
  j["clean_up_tokenization_spaces"] = false;
  j["model_max_length"] = max_positions;
  j["added_tokens_decoder"] = {{std::to_string(byte_bos_token), special_token("<|bos|>")},
                               {std::to_string(byte_eos_token), special_token("<|eos|>")}};
  return j.dump(2) + "\n";
}

}  // namespace deltapipe
