#include "train/weight_source.h"

#include "checkpoints/hf_config.h"
#include "core/error.h"
#include "core/host_staging.h"
#include "train/snapshot.h"

namespace deltapipe {
namespace fs = std::filesystem;

WeightSource::WeightSource(const fs::path& path) : path_(path) {
  if (fs::exists(path / "config.json")) {
    folder_ = std::make_unique<HuggingFaceFolder>(path);
    folder_->verify();
    spec_ = folder_->spec();
    return;
  }
  path_ = find_checkpoint(path);
  reader_ = std::make_unique<CheckpointReader>(path_);
  spec_ = parse_huggingface_config(reader_->state().model_config, path_.string() + ": model configuration");
}

std::optional<Config> WeightSource::config(std::span<const std::string> overrides) const {
  if (!reader_) return std::nullopt;
  return parse_config(reader_->state().config_toml, path_.string() + ": configuration", overrides);
}

void WeightSource::load(ParameterTable& parameters, const Stream& stream) {
  if (reader_) {
    load_checkpoint_weights(*reader_, parameters, stream);
  } else {
    load_weights(*folder_, parameters, stream);
  }
}

void load_weights(const HuggingFaceFolder& folder, ParameterTable& parameters, const Stream& stream) {
  HostStaging staging;
  for (Parameter& p : parameters.all()) {
    staging.write(stream, p.value, [&](const Tensor& host) { folder.load(p.spec, host); });
  }
}

}  // namespace deltapipe
