#include "checkpoints/hf_import.h"

#include "checkpoints/convert.h"
#include "checkpoints/hf_config.h"
#include "checkpoints/strict_json.h"
#include "core/error.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <set>

namespace deltapipe {
namespace fs = std::filesystem;
namespace {

/// Names that the file system cannot even look up count as absent.
bool is_there(const fs::path& path) {
  std::error_code ignored;
  return fs::exists(path, ignored);
}

bool is_conv(const std::string& name) { return name.ends_with("conv1d.weight"); }

/// Depthwise convolutions are written as [width, 1, W] or as [width, W].
bool fits(const Shape& found, const ParameterSpec& p) {
  if (found == p.shape) return true;
  return is_conv(p.name) && p.shape.rank() == 3 && found == Shape{p.shape[0], p.shape[2]};
}

std::string expected_shape(const ParameterSpec& p) {
  if (!is_conv(p.name) || p.shape.rank() != 3) return p.shape.str();
  return fmt::format("{} or {}", p.shape.str(), Shape{p.shape[0], p.shape[2]}.str());
}

}  // namespace

HuggingFaceFolder::HuggingFaceFolder(const fs::path& path) : path_(path) {
  const fs::path config = path / "config.json";
  if (!is_there(config)) {
    fail<IoError>("{}: no config.json there; expected a folder in the Hugging Face format", path.string());
  }
  open_weights();
  spec_ = read_huggingface_config(config, [this](const std::string& name) -> std::optional<Shape> {
    const auto it = tensors_.find(name);
    return it == tensors_.end() ? std::nullopt : std::optional(it->second.tensor->shape);
  });
}

void HuggingFaceFolder::open_weights() {
  const fs::path single = path_ / "model.safetensors", index = path_ / "model.safetensors.index.json";
  if (is_there(single)) {
    files_.emplace_back(single);
    add_file(files_.back());
    return;
  }
  if (is_there(index)) {
    open_shards(index);
    return;
  }
  const bool pickle = is_there(path_ / "pytorch_model.bin") || is_there(path_ / "pytorch_model.bin.index.json");
  fail<IoError>("{}: neither model.safetensors nor model.safetensors.index.json there{}", path_.string(),
                pickle ? "; convert pytorch_model.bin to safetensors first" : "");
}

void HuggingFaceFolder::add_file(const SafetensorsFile& file) {
  for (const SafetensorsTensor& t : file.tensors()) {
    const auto [it, fresh] = tensors_.emplace(t.name, Location{&t, &file});
    if (!fresh) {
      fail<FormatError>("{}: tensor '{}' is also in {}", file.path().string(), printable(t.name),
                        it->second.file->path().string());
    }
  }
}

void HuggingFaceFolder::open_shards(const fs::path& index) {
  const std::string name = index.string();
  const nlohmann::json root = parse_json(read_file(index), name);
  if (!root.is_object() || !root.contains("weight_map") || !root["weight_map"].is_object()) {
    fail<FormatError>("{}: has no 'weight_map' object", name);
  }
  std::set<std::string> shards;
  for (const auto& [tensor, shard] : root["weight_map"].items()) {
    const std::string file = shard.is_string() ? shard.get<std::string>() : "";
    // Shards lie beside their index: a name with a folder in it could reach anywhere.
    if (file.empty() || file.find('\0') != std::string::npos || file == "." || file == ".." ||
        fs::path(file).filename() != file) {
      fail<FormatError>("{}: tensor '{}' is said to be in {}, which is not a file name", name, printable(tensor),
                        printable(shard.dump()));
    }
    shards.insert(file);
  }
  if (shards.empty()) fail<FormatError>("{}: 'weight_map' is empty", name);
  files_.reserve(shards.size());  // tensors_ points into the elements
  for (const std::string& file : shards) {
    if (!is_there(path_ / file)) fail<FormatError>("{}: shard '{}' is missing", name, printable(file));
    files_.emplace_back(path_ / file);
    add_file(files_.back());
  }
  for (const auto& [tensor, shard] : root["weight_map"].items()) {
    const auto it = tensors_.find(tensor);
    if (it == tensors_.end() || it->second.file->path().filename() != shard.get<std::string>()) {
      fail<FormatError>("{}: tensor '{}' is not in the shard '{}' that the index names", name, printable(tensor),
                        printable(shard.get<std::string>()));
    }
  }
  for (const auto& [tensor, location] : tensors_) {
    if (!root["weight_map"].contains(tensor)) {
      fail<FormatError>("{}: tensor '{}' of {} is not in the index", name, printable(tensor),
                        location.file->path().string());
    }
  }
}

const SafetensorsTensor& HuggingFaceFolder::checked(const ParameterSpec& p) const {
  const auto it = tensors_.find(p.name);
  if (it == tensors_.end()) {
    fail<FormatError>("{}: tensor '{}' is missing; expected shape {}",
                      files_.size() == 1 ? files_[0].path().string() : path_.string(), p.name, expected_shape(p));
  }
  const auto& [tensor, file] = it->second;
  if (!fits(tensor->shape, p)) {
    fail<FormatError>("{}: tensor '{}' has shape {}, expected {} from config.json", file->path().string(), p.name,
                      tensor->shape.str(), expected_shape(p));
  }
  if (!tensor->dtype || !is_float(*tensor->dtype)) {
    fail<FormatError>("{}: tensor '{}' is of type {}, expected F32, F16, BF16 or F64", file->path().string(), p.name,
                      tensor->dtype_name);
  }
  return *tensor;
}

void HuggingFaceFolder::verify() const {
  std::set<std::string> wanted;
  for (const ParameterSpec& p : parameters_of(spec_)) {
    checked(p);
    wanted.insert(p.name);
  }
  constexpr int shown = 5;
  int unexpected = 0;
  std::string list;
  for (const auto& [name, location] : tensors_) {
    if (wanted.contains(name) || name.ends_with("rotary_emb.inv_freq")) continue;
    if (spec_.tied_embeddings && name == "lm_head.weight") continue;
    if (++unexpected <= shown) list += fmt::format("{}'{}'", list.empty() ? "" : ", ", printable(name));
  }
  if (unexpected > 0) {
    fail<FormatError>("{}: {} tensors that a model of type {} with this config.json does not have: {}{}",
                      path_.string(), unexpected, spec_.model_type, list, unexpected > shown ? ", ..." : "");
  }
}

void HuggingFaceFolder::load(const ParameterSpec& parameter, const Tensor& out) const {
  if (out.numel() != parameter.shape.numel()) {
    fail<InternalError>("HuggingFaceFolder::load: '{}' of shape {} into {}", parameter.name, parameter.shape.str(),
                        out.shape.str());
  }
  const SafetensorsTensor& t = checked(parameter);
  convert_floats(t.bytes, *t.dtype, out);
}

}  // namespace deltapipe
