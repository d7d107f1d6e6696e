// The vocabulary that needs no tokenizer: every byte is a token. Ids 0..255 are the byte values, 256 begins and 257
// ends a document. Any file is text to it, valid UTF-8 or not, and comes back byte by byte.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace deltapipe::byte_vocabulary {

inline constexpr std::uint32_t bos = 256;
inline constexpr std::uint32_t eos = 257;
inline constexpr std::uint64_t size = 258;
inline constexpr std::string_view name = "bytes";

/// Appends one id a byte to `ids`; no special tokens.
void encode(std::string_view text, std::vector<std::uint32_t>& ids);
/// The bytes of `ids`; special tokens give nothing. Throws FormatError for an id outside the vocabulary.
std::string decode(std::span<const std::uint32_t> ids);
/// Names this vocabulary in datasets and checkpoints; derived from its description, the same in every build.
std::string tokenizer_hash();

}  // namespace deltapipe::byte_vocabulary
