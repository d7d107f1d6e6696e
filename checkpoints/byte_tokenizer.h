// The byte vocabulary as files of Hugging Face tokenizers: token i < 256 is byte i, then begin and end of document.
#pragma once

#include <cstdint>
#include <string>

namespace deltapipe {

inline constexpr std::int64_t byte_bos_token = 256;  // "<|bos|>"
inline constexpr std::int64_t byte_eos_token = 257;  // "<|eos|>"
inline constexpr std::int64_t byte_vocabulary = 258;

/// Text of tokenizer.json: a byte-level BPE without merges, whose decoder gives back any UTF-8 text unchanged.
std::string byte_tokenizer_json();
/// Text of tokenizer_config.json for contexts of `max_positions` tokens.
std::string byte_tokenizer_config_json(std::int64_t max_positions);

}  // namespace deltapipe
