#include "distill/model_set.h"

#include <fmt/format.h>

namespace deltapipe {

ArenaSet ArenaSet::measuring(Device device) {
  const auto arena = [&](const char* name) { return Arena::measuring(name, device); };
  return {arena("student weights"), arena("teacher weights"), arena("gradients"), arena("optimizer"),
          arena("batch"),           arena("activations"),     arena("workspace")};
}

ArenaSet ArenaSet::reserve() const {
  const auto real = [](const Arena& a) { return Arena(a.name(), a.peak(), a.device()); };
  return {real(student), real(teacher),     real(gradients), real(optimizer),
          real(batch),   real(activations), real(workspace)};
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
  return text + line("total", peak_bytes());
}

ModelSet::ModelSet(const ModelSpec& student, const ModelSpec* teacher, DType dtype, ArenaSet& arenas,
                   const Stream& stream)
    : student_parameters_(parameters_of(student), dtype, arenas.student) {
  student_ = std::make_unique<Transformer>(student, whole_model(student), student_parameters_, arenas.student, stream);
  if (teacher != nullptr) {
    teacher_parameters_.emplace(parameters_of(*teacher), dtype, arenas.teacher);
    teacher_ =
        std::make_unique<Transformer>(*teacher, whole_model(*teacher), *teacher_parameters_, arenas.teacher, stream);
  }
}

}  // namespace deltapipe
