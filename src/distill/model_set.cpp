#include "distill/model_set.h"

#include <fmt/format.h>

#include <algorithm>

namespace deltapipe {

ArenaSet ArenaSet::measuring(Device device) {
  const auto arena = [&](const char* name) { return Arena::measuring(name, device); };
  return {arena("student weights"), arena("teacher weights"), arena("gradients"),
          arena("optimizer"),       arena("batch"),           arena("activations"),
          arena("communication"),   arena("workspace"),       Arena::measuring("host")};
}

ArenaSet ArenaSet::reserve() const {
  const auto real = [](const Arena& a) { return Arena(a.name(), a.peak(), a.device()); };
  ArenaSet set{real(student),     real(teacher),       real(gradients), real(optimizer), real(batch),
               real(activations), real(communication), real(workspace), real(host)};
  set.host.page_lock();
  return set;
}

std::size_t ArenaSet::peak_bytes() const {
  std::size_t bytes = 0;
  for (const Arena* a : all()) bytes += a->peak();
  return bytes;
}

std::string ArenaSet::table() const {
  const auto line = [](std::string_view name, std::size_t bytes) {
    return fmt::format("  {:<16} {:>12.1f} MiB\n", name, static_cast<double>(bytes) / (1 << 20));
  };
  std::string text;
  for (const Arena* a : all()) text += line(a->name(), a->peak());
  text += line("total", peak_bytes());
  return host.peak() > 0 ? text + line("host, beside", host.peak()) : text;
}

namespace {

std::vector<LayerRange> or_whole(const std::vector<LayerRange>& ranges, const ModelSpec& spec) {
  return ranges.empty() ? std::vector<LayerRange>{whole_model(spec)} : ranges;
}

/// Of all ranges, each once: with tied embeddings the first and the last range name the same weight.
std::vector<ParameterSpec> parameters_of_all(const ModelSpec& spec, const std::vector<LayerRange>& ranges) {
  std::vector<ParameterSpec> list;
  for (const LayerRange& range : ranges) {
    for (const ParameterSpec& p : parameters_of(spec, range)) {
      const bool seen = std::any_of(list.begin(), list.end(), [&](const ParameterSpec& q) { return q.name == p.name; });
      if (!seen) list.push_back(p);
    }
  }
  return list;
}

}  // namespace

ModelSet::Model::Model(const ModelSpec& spec, const std::vector<LayerRange>& ranges, DType dtype, Arena& weights,
                       const Stream& stream)
    : parameters(parameters_of_all(spec, ranges), dtype, weights) {
  for (const LayerRange& range : ranges) {
    chunks.push_back(std::make_unique<Transformer>(spec, range, parameters, weights, stream));
  }
}

ModelSet::ModelSet(const ModelSpec& student, const ModelSpec* teacher, DType dtype, ArenaSet& arenas,
                   const Stream& stream, const std::vector<LayerRange>& ranges)
    : student_(student, or_whole(ranges, student), dtype, arenas.student, stream) {
  if (teacher == nullptr) return;
  teacher_ = std::make_unique<Model>(*teacher, or_whole(ranges, *teacher), dtype, arenas.teacher, stream);
}

}  // namespace deltapipe
