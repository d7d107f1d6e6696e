#include "cli/options.h"

#include "core/error.h"
#include "core/file.h"

#include <charconv>

namespace deltapipe {

void TokenOptions::add_to(CLI::App& command) {
  auto* a = command.add_option("--tokens", list, "token ids, separated by commas")->type_name("IDS");
  auto* b = command.add_option("--tokens-file", file, "file of token ids, separated by white space or commas")
                ->type_name("FILE");
  a->excludes(b);
}

std::vector<std::int64_t> TokenOptions::read() const {
  if (!given()) fail<UsageError>("no tokens: give --tokens or --tokens-file");
  const std::string text = list.empty() ? read_file(file) : list;
  std::vector<std::int64_t> tokens;
  const char* p = text.data();
  const char* end = p + text.size();
  const auto is_separator = [](char c) { return c == ',' || c == ' ' || c == '\n' || c == '\t' || c == '\r'; };
  while (true) {
    while (p != end && is_separator(*p)) ++p;
    if (p == end) break;
    std::int64_t id = 0;
    const auto [next, error] = std::from_chars(p, end, id);
    if (error != std::errc() || (next != end && !is_separator(*next))) {
      fail<UsageError>("'{}' is not a token id", std::string(p, std::min<std::ptrdiff_t>(end - p, 20)));
    }
    tokens.push_back(id);
    p = next;
  }
  if (tokens.empty()) fail<UsageError>("no tokens given");
  return tokens;
}

}  // namespace deltapipe
