#include "core/log.h"

#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include <memory>
#include <string>

namespace deltapipe::log {
namespace {

spdlog::logger& logger() {
  static const std::shared_ptr<spdlog::logger> instance = [] {
    auto l = std::make_shared<spdlog::logger>("deltapipe", std::make_shared<spdlog::sinks::stderr_color_sink_mt>());
    l->set_pattern("%H:%M:%S %^%l%$ %v");
    return l;
  }();
  return *instance;
}

spdlog::level::level_enum native(Level level) {
  switch (level) {
    case Level::debug: return spdlog::level::debug;
    case Level::info: return spdlog::level::info;
    case Level::warn: return spdlog::level::warn;
    case Level::error: return spdlog::level::err;
  }
  return spdlog::level::off;
}

}  // namespace

void configure(Level level, int rank, int ranks) {
  if (ranks > 1) logger().set_pattern("%H:%M:%S %^%l%$ [rank " + std::to_string(rank) + "] %v");
  logger().set_level(native(rank != 0 && level < Level::warn ? Level::warn : level));
}

void write(Level level, std::string_view line) { logger().log(native(level), "{}", line); }

}  // namespace deltapipe::log
