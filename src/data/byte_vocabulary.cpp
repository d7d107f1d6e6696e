#include "data/byte_vocabulary.h"

#include "core/error.h"
#include "core/file.h"

namespace deltapipe::byte_vocabulary {

void encode(std::string_view text, std::vector<std::uint32_t>& ids) {
  ids.reserve(ids.size() + text.size());
  for (const char c : text) ids.push_back(static_cast<unsigned char>(c));
}

std::string decode(std::span<const std::uint32_t> ids) {
  std::string text;
  text.reserve(ids.size());
  for (const std::uint32_t id : ids) {
    if (id >= size) fail<FormatError>("token id {} is outside the byte vocabulary of {} ids", id, size);
    if (id < 256) text.push_back(static_cast<char>(static_cast<unsigned char>(id)));
  }
  return text;
}

std::string tokenizer_hash() {
  constexpr std::string_view description = "deltapipe byte vocabulary 1: ids 0..255 = bytes, 256 = bos, 257 = eos";
  return hash_hex(std::as_bytes(std::span(description)));
}

}  // namespace deltapipe::byte_vocabulary
