#include "train/snapshot.h"

#include "core/error.h"
#include "core/host_staging.h"
#include "kernels/elementwise.h"

#include <cstddef>

namespace deltapipe {
namespace {

constexpr const char* master_group = "master";
constexpr const char* frozen_group = "frozen";

void check(const CheckpointReader& reader, const char* group, const Parameter& p, DType dtype) {
  for (const TensorInfo& t : reader.tensors()) {
    if (t.group != group || t.name != p.spec.name) continue;
    if (!(t.shape == p.spec.shape) || t.dtype != dtype) {
      fail<FormatError>("{}: {} of {} is {} {}, this run needs {} {}", reader.folder().string(), group, t.name,
                        name_of(t.dtype), t.shape.str(), name_of(dtype), p.spec.shape.str());
    }
    return;
  }
  fail<FormatError>("{}: holds no {} of {}: it was written for another model, or with other frozen patterns",
                    reader.folder().string(), group, p.spec.name);
}

/// Elements [begin, end) of a parameter's flat values.
void read(CheckpointReader& reader, const char* group, const Parameter& p, std::int64_t begin, std::int64_t end,
          const Tensor& out) {
  check(reader, group, p, out.dtype);
  reader.read(group, p.spec.name, begin, end, out);
}

void read_whole(CheckpointReader& reader, const char* group, const Parameter& p, const Tensor& out) {
  read(reader, group, p, 0, out.numel(), out.view({out.numel()}));
}

}  // namespace

std::vector<TensorSlice> snapshot_slices(const ParameterTable& parameters, const Optimizer& optimizer,
                                         const std::function<bool(const ParameterSpec&)>& owns, bool writes_frozen) {
  std::vector<TensorSlice> slices;
  for (const Optimizer::State& s : optimizer.state()) {
    const ParameterSpec& p = s.parameter->spec;
    if (!owns(p)) continue;
    slices.push_back({master_group, p.name, p.shape, s.begin, s.end, s.master});
    slices.push_back({"exp_avg", p.name, p.shape, s.begin, s.end, s.exp_avg});
    slices.push_back({"exp_avg_sq", p.name, p.shape, s.begin, s.end, s.exp_avg_sq});
  }
  for (const Parameter& p : parameters.all()) {
    if (p.gradient_memory || !writes_frozen || !owns(p.spec)) continue;
    slices.push_back({frozen_group, p.spec.name, p.spec.shape, 0, p.value.numel(), p.value.view({p.value.numel()})});
  }
  return slices;
}

void restore_snapshot(CheckpointReader& reader, ParameterTable& parameters, Optimizer& optimizer,
                      const Stream& stream) {
  HostStaging staging, converted;
  const auto fill = [&](const char* group, const Optimizer::State& s, const Tensor& t) {
    staging.write(stream, t, [&](const Tensor& host) { read(reader, group, *s.parameter, s.begin, s.end, host); });
  };
  for (const Optimizer::State& s : optimizer.state()) {
    fill(master_group, s, s.master);
    fill("exp_avg", s, s.exp_avg);
    fill("exp_avg_sq", s, s.exp_avg_sq);
    if (!s.has_master()) continue;
    const Tensor master = staging.read(stream, s.master);
    converted.write(stream, s.value(), [&](const Tensor& host) { kernels::copy_cast(Stream::cpu(), master, host); });
  }
  for (Parameter& p : parameters.all()) {
    if (p.gradient_memory) continue;
    staging.write(stream, p.value, [&](const Tensor& host) { read_whole(reader, frozen_group, p, host); });
  }
  const auto updates = reader.state().values.find("optimizer_updates");
  if (updates == reader.state().values.end()) {
    fail<FormatError>("{}: does not say how many optimizer updates were made", reader.folder().string());
  }
  optimizer.set_updates(static_cast<std::int64_t>(updates->second));
}

void load_checkpoint_weights(CheckpointReader& reader, ParameterTable& parameters, const Stream& stream) {
  std::vector<std::byte> memory;
  HostStaging staging;
  for (Parameter& p : parameters.all()) {
    const char* group = reader.contains(master_group, p.spec.name) ? master_group : frozen_group;
    Tensor stored;
    for (const TensorInfo& t : reader.tensors()) {
      if (t.group == group && t.name == p.spec.name) stored = Tensor(nullptr, t.dtype, t.shape);
    }
    memory.resize(stored.bytes());
    stored.data = memory.data();
    read_whole(reader, group, p, stored);
    staging.write(stream, p.value, [&](const Tensor& host) { kernels::copy_cast(Stream::cpu(), stored, host); });
  }
}

}  // namespace deltapipe
