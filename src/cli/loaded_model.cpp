#include "cli/loaded_model.h"

#include "core/error.h"
#include "core/parallel.h"

namespace deltapipe {

void with_models(WeightSource& student, WeightSource* teacher, DType dtype, const ModelWork& work) {
  set_num_threads(0);
  const ModelSpec* teacher_spec = teacher != nullptr ? &teacher->spec() : nullptr;
  ArenaSet measured = ArenaSet::measuring(Device());
  {
    const Stream dry = Stream::dry(Device());
    ModelSet models(student.spec(), teacher_spec, dtype, measured, dry);
    work({dry, measured.workspace}, models, measured);
  }
  ArenaSet arenas = measured.reserve();
  ModelSet models(student.spec(), teacher_spec, dtype, arenas, Stream::cpu());
  student.load(models.student_parameters());
  if (teacher != nullptr) teacher->load(*models.teacher_parameters());
  work({Stream::cpu(), arenas.workspace}, models, arenas);
}

DType inference_dtype(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "float64") return DType::f64;
  fail<UsageError>("--dtype is '{}', accepted: float32, float64", name);
}

}  // namespace deltapipe
