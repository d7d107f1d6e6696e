#include "cli/loaded_model.h"

#include "core/device_memory.h"
#include "core/error.h"
#include "core/parallel.h"

namespace deltapipe {

void with_models(WeightSource& student, WeightSource* teacher, const Computation& how, const ModelWork& work) {
  set_num_threads(0);
  set_device(how.device);
  const ModelSpec* teacher_spec = teacher != nullptr ? &teacher->spec() : nullptr;
  ArenaSet measured = ArenaSet::measuring(how.device);
  {
    const Stream dry = Stream::dry(how.device);
    ModelSet models(student.spec(), teacher_spec, how.dtype, measured, dry);
    work({dry, measured.workspace}, models, measured);
  }
  ArenaSet arenas = measured.reserve();
  const StreamOwner owner(how.device);
  const Stream stream = owner.get();
  ModelSet models(student.spec(), teacher_spec, how.dtype, arenas, stream);
  student.load(models.student_parameters(), stream);
  if (teacher != nullptr) teacher->load(*models.teacher_parameters(), stream);
  work({stream, arenas.workspace}, models, arenas);
}

void ComputationOptions::add_to(CLI::App& command) {
  command.add_option("--device", device, "where to compute: cpu or cuda")->type_name("DEVICE");
  command.add_option("--dtype", dtype, "type to compute in: float32 or float64 on the CPU, bfloat16 on CUDA")
      ->type_name("TYPE");
}

Computation ComputationOptions::choose(DeviceChoice configured) const {
  if (!device.empty() && device != "cpu" && device != "cuda") {
    fail<UsageError>("--device is '{}', accepted: cpu, cuda", device);
  }
  const bool has_cuda = cuda_device_count() > 0;
  if (device == "cuda" && !has_cuda) {
    fail<UsageError>("--device cuda: {}",
                     built_with_cuda() ? "this machine shows no CUDA device" : "this binary was built without CUDA");
  }
  const bool cuda = device.empty() ? configured == DeviceChoice::cuda && has_cuda : device == "cuda";
  if (dtype.empty()) return cuda ? Computation{{Device::Kind::cuda, 0}, DType::bf16} : Computation{};
  if (cuda && dtype == "bfloat16") return {{Device::Kind::cuda, 0}, DType::bf16};
  if (!cuda && dtype == "float32") return {{}, DType::f32};
  if (!cuda && dtype == "float64") return {{}, DType::f64};
  fail<UsageError>("--dtype is '{}', accepted on {}", dtype, cuda ? "CUDA: bfloat16" : "the CPU: float32, float64");
}

}  // namespace deltapipe
