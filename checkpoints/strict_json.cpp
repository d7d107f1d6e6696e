#include "checkpoints/strict_json.h"

#include "core/error.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include <set>
#include <vector>

namespace deltapipe {
namespace {

constexpr int max_depth = 32;  // config.json needs 3, a safetensors header 3

/// Length of the valid UTF-8 sequence at the front of `s`, 0 when there is none.
std::size_t utf8_length(std::string_view s) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(s[i]); };
  const auto first = byte(0);
  const std::size_t n = first < 0x80 ? 1 : first >= 0xc2 && first < 0xe0 ? 2 : (first & 0xf0) == 0xe0 ? 3 : 4;
  if (n == 4 && (first < 0xf0 || first > 0xf4)) return 0;
  if (n > s.size()) return 0;
  for (std::size_t i = 1; i < n; ++i) {
    if ((byte(i) & 0xc0) != 0x80) return 0;
  }
  // Overlong forms, surrogates and code points past U+10FFFF show in the second byte.
  if ((first == 0xe0 && byte(1) < 0xa0) || (first == 0xed && byte(1) >= 0xa0)) return 0;
  if ((first == 0xf0 && byte(1) < 0x90) || (first == 0xf4 && byte(1) >= 0x90)) return 0;
  return n;
}

}  // namespace

std::string printable(std::string_view text) {
  constexpr std::size_t limit = 200;
  std::string out;
  while (!text.empty()) {
    if (out.size() >= limit) return out + "...";
    const auto c = static_cast<unsigned char>(text[0]);
    const std::size_t n = utf8_length(text);
    if (n == 0 || c < 0x20 || c == 0x7f) {
      out += fmt::format("\\x{:02x}", c);
      text.remove_prefix(1);
    } else {
      out += text.substr(0, n);
      text.remove_prefix(n);
    }
  }
  return out;
}

nlohmann::json parse_json(std::string_view text, const std::string& source) {
  using nlohmann::json;
  // The parser skips a byte order mark and takes NUL for the end of the text: both would hide bytes from us.
  if (text.starts_with("\xef\xbb\xbf")) fail<FormatError>("{}: JSON text begins with a byte order mark", source);
  if (text.find('\0') != std::string_view::npos) fail<FormatError>("{}: JSON text contains a NUL byte", source);
  std::vector<std::set<std::string>> keys;  // of the open objects, outermost first
  const auto check = [&](int depth, json::parse_event_t event, json& parsed) {
    if (depth > max_depth) fail<FormatError>("{}: JSON text is nested deeper than {} levels", source, max_depth);
    if (event == json::parse_event_t::object_start) keys.emplace_back();
    if (event == json::parse_event_t::object_end) keys.pop_back();
    if (event == json::parse_event_t::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!keys.back().insert(key).second) {
        fail<FormatError>("{}: duplicate key '{}'; each may stand once", source, printable(key));
      }
    }
    return true;
  };
  try {
    return json::parse(text, check);
  } catch (const json::exception& e) {
    fail<FormatError>("{}: not valid JSON: {}", source, printable(e.what()));
  }
}

}  // namespace deltapipe
