// What toml++ must not be given. It is a parser for files that are meant well: a few kinds of text overflow its stack
// or run into undefined behaviour, and those are refused before it sees them.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

namespace deltapipe {

struct TomlRefusal {
  std::size_t line;  // from 1
  std::string reason;
};

/// Refuses texts of more than 1 MiB, lines of more than 200 dots outside of strings and comments, and characters beyond
/// ASCII there, where TOML has none. Everything else that is no TOML is left to toml++.
std::optional<TomlRefusal> refuse_toml(std::string_view text);

}  // namespace deltapipe
