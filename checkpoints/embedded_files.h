// Files of checkpoints/huggingface/, put into the program at build time by embed_files.cmake.
#pragma once

#include <span>
#include <string_view>

namespace deltapipe {

struct EmbeddedFile {
  std::string_view name;  // without folder
  std::string_view content;
};

/// configuration_arcee_kda.py and modeling_arcee_kda.py.
std::span<const EmbeddedFile> huggingface_files();

}  // namespace deltapipe
