// Regular expressions on Hugging Face names, and what a stage's losses reach.
#pragma once

#include "distill/objective.h"
#include "model/spec.h"

#include <algorithm>
#include <regex>
#include <string>
#include <vector>

namespace deltapipe {

inline std::vector<std::regex> compile_patterns(const std::vector<std::string>& patterns) {
  return {patterns.begin(), patterns.end()};
}

inline bool matches_any(const std::vector<std::regex>& patterns, const std::string& name) {
  return std::any_of(patterns.begin(), patterns.end(), [&](const std::regex& r) { return std::regex_search(name, r); });
}

/// Whether a stage's losses reach this parameter: alignment ends at the mixers.
inline bool reaches(const Objective& objective, const ParameterSpec& p, const ModelSpec& student) {
  if (!objective.aligns_mixers()) return true;
  return p.layer >= 0 && p.layer < student.layers() &&
         (p.name.find(".self_attn.") != std::string::npos || p.name.ends_with(".input_layernorm.weight"));
}

}  // namespace deltapipe
