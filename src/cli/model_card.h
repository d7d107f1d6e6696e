// README.md of an exported model.
#pragma once

#include "model/spec.h"

#include <string>

namespace deltapipe {

struct ModelCardFacts {
  std::string name;
  const ModelSpec* spec = nullptr;
  std::string teacher;          // path or name; empty: none
  std::string training;         // sentence about steps and tokens; empty: none
  std::string evaluation_file;  // name of the file that held it, for messages
  std::string evaluation_json;  // text of `deltapipe eval --json`; empty: not measured
};

/// Markdown with a YAML header. Numbers come from the evaluation alone; what was not measured is said to be so.
/// Throws FormatError when the evaluation is not JSON of ours.
std::string write_model_card(const ModelCardFacts& facts);

}  // namespace deltapipe
