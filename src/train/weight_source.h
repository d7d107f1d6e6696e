// A model's weights wherever they lie: a Hugging Face folder or a training checkpoint.
#pragma once

#include "checkpoints/hf_import.h"
#include "checkpoints/training_checkpoint.h"
#include "core/config.h"
#include "core/stream.h"
#include "model/parameters.h"
#include "model/spec.h"

#include <filesystem>
#include <memory>
#include <optional>

namespace deltapipe {

class WeightSource {
 public:
  /// `path`: a Hugging Face folder, a training checkpoint, a folder of checkpoints or its "latest". Verifies names,
  /// shapes and checksums. Throws IoError or FormatError.
  explicit WeightSource(const std::filesystem::path& path);

  const std::filesystem::path& path() const { return path_; }
  const ModelSpec& spec() const { return spec_; }
  bool is_checkpoint() const { return reader_ != nullptr; }
  /// The run that wrote a checkpoint; null for a Hugging Face folder.
  const TrainingState* state() const { return reader_ ? &reader_->state() : nullptr; }
  /// That run's configuration; nothing for a Hugging Face folder.
  std::optional<Config> config(std::span<const std::string> overrides = {}) const;

  /// `stream` is of the parameters' device.
  void load(ParameterTable& parameters, const Stream& stream = Stream::cpu());

 private:
  std::filesystem::path path_;
  std::unique_ptr<HuggingFaceFolder> folder_;
  std::unique_ptr<CheckpointReader> reader_;
  ModelSpec spec_;
};

/// Every weight of `parameters`, on any device, from a folder that was verified. `stream` is of that device.
void load_weights(const HuggingFaceFolder& folder, ParameterTable& parameters, const Stream& stream);

}  // namespace deltapipe
