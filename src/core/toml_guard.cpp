#include "core/toml_guard.h"

#include <fmt/format.h>

#include <algorithm>

namespace deltapipe {
namespace {

// toml++ parses and frees nested tables by recursion, and bounds the depth of values but not of dotted keys: a line of
// a hundred thousand dots would overflow the stack. 200 dots still leave room for an array of 200 numbers on one line.
constexpr std::size_t max_dots_a_line = 200;
constexpr std::size_t max_text_bytes = std::size_t{1} << 20;  // a run's file has a few kilobytes

/// The index after the string that opens at text[at], a quote of either kind; text.size() when TOML ends there, since
/// no string goes on to the end of the text or, of the short kinds, to the end of a line. Counts lines.
std::size_t skip_string(std::string_view text, std::size_t at, std::size_t& line) {
  const char quote = text[at];
  const std::string fence(3, quote);
  const bool is_long = text.substr(at).starts_with(fence);
  at += is_long ? 3 : 1;
  for (; at < text.size(); ++at) {
    if (text[at] == '\\' && quote == '"') {
      if (++at < text.size() && text[at] == '\n') ++line;
    } else if (text[at] == '\n') {
      if (!is_long) return text.size();
      ++line;
    } else if (text[at] == quote && !is_long) {
      return at + 1;
    } else if (text[at] == quote && text.substr(at).starts_with(fence)) {
      at += 3;  // up to two quotes of the content may stand before the closing three
      for (int i = 0; i < 2 && at < text.size() && text[at] == quote; ++i) ++at;
      return at;
    }
  }
  return text.size();
}

}  // namespace

// Characters: toml++ 3.3 takes U+00A1 to U+0499 and some others for impossible where it skips whitespace.
std::optional<TomlRefusal> refuse_toml(std::string_view text) {
  if (text.size() > max_text_bytes) {
    return TomlRefusal{1, fmt::format("{} bytes, more than {}", text.size(), max_text_bytes)};
  }
  std::size_t line = 1, dots = 0;
  std::size_t at = text.starts_with("\xEF\xBB\xBF") ? 3 : 0;  // the byte order mark
  while (at < text.size()) {
    const char c = text[at];
    if (c == '"' || c == '\'') {
      at = skip_string(text, at, line);
      continue;
    }
    if (c == '#') {
      at = std::min(text.find('\n', at), text.size());
      continue;
    }
    if (c == '\n') {
      ++line;
      dots = 0;
    } else if (c == '.' && ++dots > max_dots_a_line) {
      return TomlRefusal{line, fmt::format("more than {} dots in one line", max_dots_a_line)};
    } else if (static_cast<unsigned char>(c) >= 0x80) {
      return TomlRefusal{line, "a character beyond ASCII outside of strings and comments"};
    }
    ++at;
  }
  return std::nullopt;
}

}  // namespace deltapipe
