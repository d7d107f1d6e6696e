// Contents for checkpoint tests: every value is a function of (step, group, name, element), so that any process can
// make and verify them.
#pragma once

#include "checkpoints/training_checkpoint.h"
#include "core/random.h"

#include <cstring>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <vector>

namespace deltapipe::samples {

/// Random bits of any dtype, NaNs and subnormals among them.
inline std::vector<std::byte> content_of(std::int64_t step, const TensorInfo& t) {
  const RandomStream random(static_cast<std::uint64_t>(step), t.group + "/" + t.name);
  std::vector<std::byte> bytes(static_cast<std::size_t>(t.shape.numel()) * size_of(t.dtype));
  for (std::size_t i = 0; i < bytes.size(); i += 8) {
    const std::uint64_t bits = random.bits(i / 8);
    std::memcpy(bytes.data() + i, &bits, std::min<std::size_t>(8, bytes.size() - i));
  }
  return bytes;
}

/// Tensors as of a small model, of every dtype that optimizers keep and of one to four dimensions.
inline std::vector<TensorInfo> tensors() {
  std::vector<TensorInfo> all;
  for (const char* group : {"exp_avg", "exp_avg_sq", "master"}) {
    const DType moments = group[0] == 'm' ? DType::f64 : DType::bf16;
    all.push_back({group, "lm_head.weight", DType::f32, {37, 13}});
    all.push_back({group, "model.layers.0.conv1d.weight", DType::f32, {12, 1, 4}});
    all.push_back({group, "model.layers.0.mlp.up_proj.weight", moments, {3, 2, 5, 7}});
    all.push_back({group, "model.norm.weight", moments, {19}});
  }
  return all;
}

inline TensorSlice slice_of(const TensorInfo& t, std::vector<std::byte>& content, std::int64_t begin,
                            std::int64_t end) {
  const auto offset = static_cast<std::size_t>(begin) * size_of(t.dtype);
  return {t.group, t.name, t.shape, begin, end, Tensor(content.data() + offset, t.dtype, {end - begin})};
}

inline TrainingState state_of(std::int64_t step) {
  TrainingState s;
  s.step = step;
  s.stage = 1;
  s.stage_step = step / 2;
  s.data_epoch = 3;
  s.data_position = 18446744073709551615u;
  s.tokens_seen = static_cast<std::uint64_t>(step) * 32768;
  s.skipped_steps = 2;
  s.skipped_in_a_row = 1;
  s.seeds = {{"data", 17}, {"init", 18446744073709551614u}};
  s.values = {{"loss_average", 0.1}, {"tiny", 5e-324}};
  s.mesh = {2, 3, 4};
  s.config_toml = "# größe \"quoted\" \\ \n[model]\nteacher = 'x'\n";
  return s;
}

/// All tensors whole, with the memory they point to.
struct Step {
  explicit Step(std::int64_t step, const std::vector<TensorInfo>& infos = tensors()) : state(state_of(step)) {
    for (const TensorInfo& t : infos) {
      contents.push_back(content_of(step, t));
      slices.push_back(slice_of(t, contents.back(), 0, t.shape.numel()));
    }
  }
  TrainingState state;
  std::vector<std::vector<std::byte>> contents;
  std::vector<TensorSlice> slices;
};

/// Reads everything in `folder` and compares; throws when anything differs.
inline void verify(const std::filesystem::path& folder) {
  CheckpointReader reader(folder);
  const std::int64_t step = reader.state().step;
  if (reader.state() != state_of(step)) throw std::runtime_error("state differs in " + folder.string());
  for (const TensorInfo& t : reader.tensors()) {
    std::vector<std::byte> back(static_cast<std::size_t>(t.shape.numel()) * size_of(t.dtype));
    reader.read(t.group, t.name, 0, t.shape.numel(), {back.data(), t.dtype, t.shape});
    if (back != content_of(step, t)) throw std::runtime_error(t.name + " differs in " + folder.string());
  }
}

}  // namespace deltapipe::samples
