// Which tokenizer goes into a written model folder.
#pragma once

#include "checkpoints/hf_export.h"
#include "core/config.h"

#include <filesystem>
#include <string>

namespace deltapipe {

/// `wanted` ("bytes" or a folder), else that of `model_folder`, else the teacher's, else the byte vocabulary when the
/// training data has it. Warns when there is none. Sets the request's tokenizer and, for bytes, its special tokens.
/// Throws UsageError when `wanted` holds none. `config` may be null, `model_folder` empty.
void choose_tokenizer(const std::string& wanted, const std::filesystem::path& model_folder, const Config* config,
                      ExportRequest& request);

}  // namespace deltapipe
