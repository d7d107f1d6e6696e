// Writes a model as a folder in the Hugging Face format that loads with AutoModelForCausalLM.from_pretrained.
#pragma once

#include "core/tensor.h"
#include "model/spec.h"

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>

namespace deltapipe {

struct ExportRequest {
  std::filesystem::path folder;
  ModelSpec spec;
  /// Values of one parameter: host memory of f32, f64 or bf16, valid until the next call. Called once for each
  /// parameter, in the order of parameters_of(spec).
  std::function<Tensor(const ParameterSpec&)> parameter;
  DType dtype = DType::bf16;                 // of the files, f32 or bf16; A_log and dt_bias are f32 in either case
  std::int64_t shard_bytes = 5'000'000'000;  // of data a weight file; a single larger tensor gets a file of its own
  std::filesystem::path tokenizer_folder;    // its tokenizer files are copied; empty: none
  bool byte_tokenizer = false;               // write the tokenizer of the byte vocabulary instead
  std::string model_card;                    // README.md; empty: none
  bool overwrite = false;                    // replace a folder that holds an older export
};

/// Writes weights, config.json, generation_config.json, the tokenizer, the model card and, for an arcee_kda, its Python
/// modelling files into "<folder>.partial", then renames that: the folder appears whole or not at all, and after an
/// error nothing is left. An older "<folder>.partial" is removed first. UsageError: the folder exists and is not empty
/// and `overwrite` is not set, or it is set but the folder holds no config.json. ConfigError: the spec cannot be
/// expressed, or contradicts the byte vocabulary. IoError: what the operating system refuses.
void export_huggingface(const ExportRequest& request);

}  // namespace deltapipe
