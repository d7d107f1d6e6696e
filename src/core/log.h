// Console log lines on standard error. Only rank 0 speaks below `warn`.
#pragma once

#include <fmt/core.h>

#include <string_view>
#include <utility>

namespace deltapipe::log {

enum class Level { debug, info, warn, error };

/// Lines below `level` are dropped. `rank` is named in each line when `ranks` > 1.
void configure(Level level, int rank, int ranks);
void write(Level level, std::string_view line);

template <class... Args>
void debug(fmt::format_string<Args...> f, Args&&... args) {
  write(Level::debug, fmt::format(f, std::forward<Args>(args)...));
}
template <class... Args>
void info(fmt::format_string<Args...> f, Args&&... args) {
  write(Level::info, fmt::format(f, std::forward<Args>(args)...));
}
template <class... Args>
void warn(fmt::format_string<Args...> f, Args&&... args) {
  write(Level::warn, fmt::format(f, std::forward<Args>(args)...));
}
template <class... Args>
void error(fmt::format_string<Args...> f, Args&&... args) {
  write(Level::error, fmt::format(f, std::forward<Args>(args)...));
}

}  // namespace deltapipe::log
