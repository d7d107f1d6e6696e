// What every benchmark's JSON file begins with: where, what and how.
#pragma once

#include "core/error.h"

#include <nlohmann/json.hpp>

#include <fstream>
#include <iterator>
#include <regex>
#include <string>

namespace deltapipe::bench {

/// Version of the kernel driver, as it says itself; empty where it does not.
inline std::string driver_version() {
  std::ifstream file("/proc/driver/nvidia/version");
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  std::smatch match;
  return std::regex_search(text, match, std::regex(R"(\b(\d+\.\d+(\.\d+)?)\b)")) ? match[1].str() : std::string();
}

inline nlohmann::ordered_json begin_report(const std::string& benchmark, const std::string& gpu,
                                           const std::string& commit, int argc, char** argv) {
  std::string command = benchmark;
  for (int i = 1; i < argc; ++i) command += std::string(" ") + argv[i];
  return {
      {"benchmark", benchmark}, {"gpu", gpu}, {"driver", driver_version()}, {"commit", commit}, {"command", command}};
}

inline void write_report(const std::string& path, const nlohmann::ordered_json& report) {
  std::ofstream file(path);
  file << report.dump(1) << "\n";
  if (!file.flush()) fail<IoError>("cannot write {}", path);
}

}  // namespace deltapipe::bench
