#include "cli/tokenizer_choice.h"

#include "core/error.h"
#include "core/log.h"
#include "data/byte_vocabulary.h"
#include "data/token_dataset.h"

namespace deltapipe {
namespace fs = std::filesystem;
namespace {

bool has_tokenizer(const fs::path& folder) {
  return !folder.empty() && (fs::exists(folder / "tokenizer.json") || fs::exists(folder / "tokenizer.model"));
}

bool uses_byte_vocabulary(const Config& config) {
  return !config.data.train.empty() && fs::exists(config.data.train) &&
         TokenDataset(config.data.train).tokenizer_hash() == byte_vocabulary::tokenizer_hash();
}

}  // namespace

void choose_tokenizer(const std::string& wanted, const fs::path& model_folder, const Config* config,
                      ExportRequest& request) {
  if (wanted == "bytes") {
    request.byte_tokenizer = true;
  } else if (!wanted.empty()) {
    if (!has_tokenizer(wanted)) fail<UsageError>("{} holds no tokenizer.json or tokenizer.model", wanted);
    request.tokenizer_folder = wanted;
  } else if (has_tokenizer(model_folder)) {
    request.tokenizer_folder = model_folder;
  } else if (config != nullptr && has_tokenizer(config->teacher.path)) {
    request.tokenizer_folder = config->teacher.path;
  } else if (config != nullptr && uses_byte_vocabulary(*config)) {
    request.byte_tokenizer = true;
  } else {
    log::warn("no tokenizer found, the export has none; --tokenizer FOLDER (or \"bytes\") gives it one");
  }
  if (request.byte_tokenizer) {
    request.spec.bos_token = byte_vocabulary::bos;
    request.spec.eos_token = byte_vocabulary::eos;
  }
}

}  // namespace deltapipe
