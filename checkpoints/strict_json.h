// JSON texts from outside: strict parsing, and safe quoting of what they contain.
#pragma once

#include <nlohmann/json_fwd.hpp>

#include <string>
#include <string_view>

namespace deltapipe {

/// The whole text as one JSON value. FormatError, beginning with `source` (a file name), for anything that is not UTF-8
/// JSON, a key that stands twice in one object, a NUL byte, a byte order mark, or more than 32 levels of nesting.
nlohmann::json parse_json(std::string_view text, const std::string& source);

/// `text` made fit for one line of an error message: control bytes and invalid UTF-8 become \xNN, at most 200 bytes are
/// shown.
std::string printable(std::string_view text);

}  // namespace deltapipe
