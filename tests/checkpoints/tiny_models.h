// Models of a few hundred weights and folders that hold them, written by hand for the import and export tests.
#pragma once

#include "checkpoints/convert.h"
#include "checkpoints/hf_config.h"
#include "checkpoints/safetensors.h"
#include "core/file.h"
#include "core/random.h"
#include "model/spec.h"
#include "tests/checkpoints/testing.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace deltapipe::testing {

inline ModelSpec tiny_arcee() {
  ModelSpec s;
  s.model_type = "arcee";
  s.vocabulary = 260;
  s.hidden = 8;
  s.intermediate = 7;
  s.heads = 4;
  s.kv_heads = 2;
  s.head_dim = 2;
  s.max_positions = 4096;
  s.norm_eps = 1.1e-5;
  s.rope = {.theta = 12345.678, .factor = 3.7, .original_max_positions = 1024, .beta_fast = 31.5, .mscale = 0.9};
  s.mixers.assign(2, Mixer::rope);
  s.bos_token = 256;
  s.eos_token = 257;
  return s;
}

inline ModelSpec tiny_llama() {
  ModelSpec s = tiny_arcee();
  s.model_type = "llama";
  s.mlp = Mlp::gated_silu;
  s.tied_embeddings = true;
  s.rope = {.theta = 500000};
  s.bos_token = -1;
  return s;
}

/// Every kind of mixer, KDA sizes unlike those of attention, a bounded gate.
inline ModelSpec tiny_hybrid() {
  ModelSpec s = tiny_arcee();
  s.model_type = "arcee_kda";
  s.mixers = {Mixer::kda, Mixer::nope, Mixer::rope};
  s.kda = {.heads = 3, .head_dim = 4, .conv_width = 4, .gate_rank = 5, .gate_lower_bound = -4.5};
  return s;
}

/// Random tensors by name.
class Weights {
 public:
  Weights(const ModelSpec& spec, DType dtype) : spec_(spec) {
    for (const ParameterSpec& p : parameters_of(spec)) add(p.name, dtype, p.shape);
  }

  /// Adds or replaces.
  void add(const std::string& name, DType dtype, const Shape& shape) {
    RandomStream random(11, name);
    std::vector<std::byte> bytes(static_cast<std::size_t>(shape.numel()) * size_of(dtype));
    for (std::int64_t i = 0; i < shape.numel(); ++i) {
      const double x = random.next_normal();
      const auto f = static_cast<float>(x);
      const BFloat16 b = to_bfloat16(x);
      const Float16 h{static_cast<std::uint16_t>(random.next_below(0x7c00) | (x < 0 ? 0x8000 : 0))};  // finite
      const void* value = &x;
      if (dtype == DType::f32 || dtype == DType::i32) value = &f;
      if (dtype == DType::bf16) value = &b;
      if (dtype == DType::f16) value = &h;
      std::memcpy(bytes.data() + static_cast<std::size_t>(i) * size_of(dtype), value, size_of(dtype));
    }
    data_[name] = {std::move(bytes), {name, dtype, shape}};
  }
  void erase(const std::string& name) { data_.erase(name); }
  Tensor at(const std::string& name) const {
    const auto& [bytes, entry] = data_.at(name);
    return {const_cast<std::byte*>(bytes.data()), entry.dtype, entry.shape};
  }

  /// config.json and one weight file, or two with an index.
  void write_folder(const std::filesystem::path& folder, bool sharded) const {
    write_text(folder / "config.json", write_huggingface_config(spec_, DType::f32));
    std::vector<SafetensorsEntry> files[2];
    std::size_t i = 0;
    for (const auto& [name, item] : data_) files[sharded && 2 * i++ >= data_.size() ? 1 : 0].push_back(item.second);
    std::string map;
    for (int f = 0; f < (sharded ? 2 : 1); ++f) {
      const std::string file = sharded ? fmt::format("model-{:05}-of-00002.safetensors", f + 1) : "model.safetensors";
      SafetensorsWriter writer(folder / file, files[f]);
      for (const SafetensorsEntry& e : files[f]) {
        writer.write(e.name, at(e.name));
        map += fmt::format("{}\"{}\":\"{}\"", map.empty() ? "" : ",", e.name, file);
      }
      writer.finish();
    }
    if (sharded) {
      write_text(folder / "model.safetensors.index.json",
                 fmt::format(R"({{"metadata":{{"total_size":1}},"weight_map":{{{}}}}})", map));
    }
  }

 private:
  ModelSpec spec_;
  std::map<std::string, std::pair<std::vector<std::byte>, SafetensorsEntry>> data_;
};

}  // namespace deltapipe::testing
