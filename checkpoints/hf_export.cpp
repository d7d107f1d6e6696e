#include "checkpoints/hf_export.h"

#include "checkpoints/byte_tokenizer.h"
#include "checkpoints/convert.h"
#include "checkpoints/embedded_files.h"
#include "checkpoints/hf_config.h"
#include "checkpoints/safetensors.h"
#include "core/error.h"
#include "core/file.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

namespace deltapipe {
namespace fs = std::filesystem;
namespace {

/// Consecutive parameters that share one weight file.
struct Shard {
  std::vector<SafetensorsEntry> entries;
  std::int64_t bytes = 0;
};

std::vector<Shard> plan_shards(const std::vector<ParameterSpec>& parameters, DType dtype, std::int64_t shard_bytes) {
  std::vector<Shard> shards(1);
  for (const ParameterSpec& p : parameters) {
    const DType t = p.keep_float32 ? DType::f32 : dtype;
    const std::int64_t bytes = p.shape.numel() * static_cast<std::int64_t>(size_of(t));
    if (!shards.back().entries.empty() && shards.back().bytes + bytes > shard_bytes) shards.emplace_back();
    shards.back().entries.push_back({p.name, t, p.shape});
    shards.back().bytes += bytes;
  }
  return shards;
}

void write_weights(const ExportRequest& request, const fs::path& folder) {
  const std::vector<ParameterSpec> parameters = parameters_of(request.spec);
  const std::vector<Shard> shards = plan_shards(parameters, request.dtype, request.shard_bytes);
  nlohmann::ordered_json weight_map = nlohmann::ordered_json::object();
  std::int64_t total = 0;
  std::size_t next = 0;
  for (std::size_t i = 0; i < shards.size(); ++i) {
    const std::string file = shards.size() == 1 ? "model.safetensors"
                                                : fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, shards.size());
    SafetensorsWriter writer(folder / file, shards[i].entries);
    for (const SafetensorsEntry& e : shards[i].entries) {
      const ParameterSpec& p = parameters[next++];
      const Tensor values = request.parameter(p);
      if (values.numel() != p.shape.numel() || !is_float(values.dtype) || !values.device.is_cpu()) {
        fail<InternalError>("export_huggingface: '{}' was given as {} {}, needed as floats of shape {} on the host",
                            p.name, name_of(values.dtype), values.shape.str(), p.shape.str());
      }
      if (values.dtype == e.dtype) {
        writer.write(e.name, values);
      } else {
        // Uninitialised: a vocabulary matrix is gigabytes.
        const auto buffer =
            std::make_unique_for_overwrite<std::byte[]>(static_cast<std::size_t>(e.shape.numel()) * size_of(e.dtype));
        const Tensor converted(buffer.get(), e.dtype, e.shape);
        convert_floats({static_cast<const std::byte*>(values.data), values.bytes()}, values.dtype, converted);
        writer.write(e.name, converted);
      }
      weight_map[e.name] = file;
    }
    writer.finish();
    total += shards[i].bytes;
  }
  if (shards.size() > 1) {
    const nlohmann::ordered_json index{{"metadata", {{"total_size", total}}}, {"weight_map", std::move(weight_map)}};
    write_file_atomically(folder / "model.safetensors.index.json", index.dump(2) + "\n");
  }
}

std::string generation_config(const ModelSpec& spec) {
  nlohmann::ordered_json j = nlohmann::ordered_json::object();
  if (spec.bos_token >= 0) j["bos_token_id"] = spec.bos_token;
  if (spec.eos_token >= 0) j["eos_token_id"] = spec.eos_token;
  return j.dump(2) + "\n";
}

bool is_tokenizer_file(const std::string& name) {
  static constexpr const char* names[] = {
      "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
      "merges.txt",     "tokenizer.model",       "added_tokens.json"};
  return std::find(std::begin(names), std::end(names), name) != std::end(names) || name.starts_with("chat_template.");
}

void copy_tokenizer(const fs::path& from, const fs::path& to) {
  std::error_code ec;
  int copied = 0;
  for (auto it = fs::directory_iterator(from, ec); !ec && it != fs::directory_iterator(); it.increment(ec)) {
    const std::string name = it->path().filename().string();
    std::error_code unreadable;
    if (!is_tokenizer_file(name) || !it->is_regular_file(unreadable)) continue;  // a link to a file counts as one
    write_file_atomically(to / name, read_file(it->path()));
    ++copied;
  }
  if (ec) fail<IoError>("cannot list tokenizer folder {}: {}", from.string(), ec.message());
  if (copied == 0) fail<IoError>("{}: no tokenizer files there (tokenizer.json, tokenizer.model, ...)", from.string());
}

void check_byte_vocabulary(const ModelSpec& s) {
  const auto differs = [](std::int64_t id, std::int64_t wanted) { return id >= 0 && id != wanted; };
  if (s.vocabulary < byte_vocabulary || differs(s.bos_token, byte_bos_token) || differs(s.eos_token, byte_eos_token)) {
    fail<ConfigError>("the byte tokenizer has {} tokens, bos {} and eos {}; the model has {}, {} and {}",
                      byte_vocabulary, byte_bos_token, byte_eos_token, s.vocabulary, s.bos_token, s.eos_token);
  }
}

void write_content(const ExportRequest& request, const std::string& config, const fs::path& folder) {
  write_file_atomically(folder / "config.json", config);
  write_file_atomically(folder / "generation_config.json", generation_config(request.spec));
  if (request.spec.model_type == "arcee_kda") {
    for (const EmbeddedFile& f : huggingface_files()) write_file_atomically(folder / f.name, f.content);
  }
  if (request.byte_tokenizer) {
    write_file_atomically(folder / "tokenizer.json", byte_tokenizer_json());
    write_file_atomically(folder / "tokenizer_config.json", byte_tokenizer_config_json(request.spec.max_positions));
  }
  if (!request.tokenizer_folder.empty()) copy_tokenizer(request.tokenizer_folder, folder);
  if (!request.model_card.empty()) write_file_atomically(folder / "README.md", request.model_card);
  write_weights(request, folder);
  sync_path(folder);
}

/// Removes itself and every folder that had to be made for it, unless kept.
class PartialFolder {
 public:
  explicit PartialFolder(fs::path path) : path_(std::move(path)) {
    std::error_code ec;
    for (fs::path p = path_.parent_path(); !fs::exists(p, ec) && !ec; p = p.parent_path()) parents_.push_back(p);
    fs::remove_all(path_, ec);  // of an export that was killed
    if (ec) fail<IoError>("cannot remove {}: {}", path_.string(), ec.message());
    try {
      make_writable_folder(path_);
    } catch (...) {
      remove();
      throw;
    }
  }
  ~PartialFolder() {
    if (!kept_) remove();
  }
  PartialFolder(const PartialFolder&) = delete;
  PartialFolder& operator=(const PartialFolder&) = delete;
  const fs::path& path() const { return path_; }
  void keep() { kept_ = true; }

 private:
  void remove() noexcept {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
    for (const fs::path& p : parents_) fs::remove(p, ignored);  // innermost first, only while empty
  }
  fs::path path_;
  std::vector<fs::path> parents_;
  bool kept_ = false;
};

void rename_folder(const fs::path& from, const fs::path& to) {
  std::error_code ec;
  fs::rename(from, to, ec);
  if (ec) fail<IoError>("cannot rename {} to {}: {}", from.string(), to.string(), ec.message());
}

/// True when `target` holds files that an export would replace.
bool must_replace(const fs::path& target, bool overwrite) {
  std::error_code ec;
  const fs::file_status status = fs::status(target, ec);
  if (!fs::exists(status)) return false;  // includes what cannot be examined: making the folder will say why
  if (!fs::is_directory(status)) fail<UsageError>("{} exists and is not a folder; choose another", target.string());
  if (fs::is_empty(target, ec)) return false;
  if (ec) fail<IoError>("cannot list {}: {}", target.string(), ec.message());
  if (!overwrite) {
    fail<UsageError>("{} exists and is not empty; choose another folder or give --overwrite", target.string());
  }
  if (!fs::exists(target / "config.json", ec)) {
    fail<UsageError>("{} is not empty and has no config.json: not a model folder, and not overwritten",
                     target.string());
  }
  return true;
}

}  // namespace

void export_huggingface(const ExportRequest& request) {
  require(request.dtype == DType::f32 || request.dtype == DType::bf16, "export_huggingface: dtype must be f32 or bf16");
  require(request.shard_bytes > 0, "export_huggingface: shard_bytes must be positive");
  require(!request.byte_tokenizer || request.tokenizer_folder.empty(), "export_huggingface: two tokenizers");
  const std::string config = write_huggingface_config(request.spec, request.dtype);
  if (request.byte_tokenizer) check_byte_vocabulary(request.spec);
  fs::path target = fs::absolute(request.folder).lexically_normal();
  if (!target.has_filename()) target = target.parent_path();  // "out/"
  const bool replace = must_replace(target, request.overwrite);

  PartialFolder partial(target.string() + ".partial");
  write_content(request, config, partial.path());
  if (replace) {
    const fs::path old = target.string() + ".replaced";
    std::error_code ignored;
    fs::remove_all(old, ignored);
    rename_folder(target, old);
    try {
      rename_folder(partial.path(), target);
    } catch (...) {
      fs::rename(old, target, ignored);
      throw;
    }
    partial.keep();
    fs::remove_all(old, ignored);
  } else {
    rename_folder(partial.path(), target);
    partial.keep();
  }
  sync_path(target.parent_path());
}

}  // namespace deltapipe
