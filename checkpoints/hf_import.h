// A model in the Hugging Face format on disk: config.json with model.safetensors or with shards and their index.
#pragma once

#include "checkpoints/safetensors.h"
#include "core/tensor.h"
#include "model/spec.h"

#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace deltapipe {

/// Opens config.json (see checkpoints/hf_config.h for what is accepted) and every weight file, reading headers only.
/// `model.safetensors` is taken before `model.safetensors.index.json`, as transformers does. FormatError and IoError
/// name the file; weights in PyTorch's pickle format are refused with a hint.
class HuggingFaceFolder {
 public:
  explicit HuggingFaceFolder(const std::filesystem::path& path);

  const std::filesystem::path& path() const { return path_; }
  const ModelSpec& spec() const { return spec_; }

  /// Every parameter of the spec is there with its shape and a floating dtype, and nothing else is, except
  /// rotary_emb.inv_freq buffers and the lm_head.weight of a tied model. FormatError names file and tensor.
  void verify() const;

  /// The file's values of one parameter, converted to out's dtype (f32, f64 or bf16; rounding to nearest even). `out`
  /// is host memory of the parameter's number of elements. Checks that tensor as verify() does. Safe to call from
  /// several threads.
  void load(const ParameterSpec& parameter, const Tensor& out) const;

 private:
  struct Location {
    const SafetensorsTensor* tensor;
    const SafetensorsFile* file;
  };
  void open_weights();
  void open_shards(const std::filesystem::path& index);
  void add_file(const SafetensorsFile& file);
  const SafetensorsTensor& checked(const ParameterSpec& parameter) const;

  std::filesystem::path path_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, Location, std::less<>> tensors_;
  ModelSpec spec_;
};

}  // namespace deltapipe
