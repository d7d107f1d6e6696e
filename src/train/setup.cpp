// What stands before a run (run.h): device, models, first weights.
#include "core/device_memory.h"
#include "core/error.h"
#include "distill/student_init.h"
#include "train/run.h"
#include "train/weight_source.h"

namespace deltapipe {

void check_backend(const Config& config) {
  if (config.run.device == DeviceChoice::cuda) {
    if (!built_with_cuda()) fail<ConfigError>("run.device is \"cuda\", but this binary is CPU-only");
    if (compute_dtype(config.run) != DType::bf16) {
      fail<ConfigError>("run.dtype \"{}\" needs run.device = \"cpu\": CUDA trains in bfloat16",
                        name_of(config.run.dtype));
    }
    return;
  }
  if (compute_dtype(config.run) == DType::bf16) fail<ConfigError>("run.dtype \"bfloat16\" needs run.device = \"cuda\"");
  if (config.optimizer.state != StateDType::float32) {
    fail<ConfigError>("optimizer.state \"bfloat16\" needs run.device = \"cuda\"");
  }
  if (config.memory.optimizer != OptimizerPlace::device) {
    fail<ConfigError>("memory.optimizer \"host\" needs run.device = \"cuda\": on the CPU everything is in host memory");
  }
}

Device choose_device(const Config& config, MpiRuntime& runtime) {
  if (config.run.device == DeviceChoice::cpu) return {};
  Device device{Device::Kind::cuda, 0};
  runtime.together([&] {
    const int count = cuda_device_count();
    if (count == 0) fail<UsageError>("run.device is \"cuda\", but this machine shows no CUDA device");
    device.index = runtime.local_rank() % count;
    set_device(device);
  });
  return device;
}

ModelSources open_models(const Config& config, std::int64_t data_vocabulary) {
  ModelSources s;
  if (!config.teacher.path.empty()) {
    s.teacher = std::make_unique<HuggingFaceFolder>(config.teacher.path);
    s.teacher->verify();
  }
  if (config.student.init == StudentInit::folder) {
    s.student_folder = std::make_unique<HuggingFaceFolder>(config.student.path);
    s.student_folder->verify();
    s.student = s.student_folder->spec();
  } else {
    s.student = make_student_spec(config.student, s.teacher ? &s.teacher->spec() : nullptr, data_vocabulary);
  }
  return s;
}

void init_student_weights(const Config& config, const ModelSources& sources, ParameterTable& parameters,
                          const Stream& stream) {
  const auto seed = static_cast<std::uint64_t>(config.run.seed);
  switch (config.student.init) {
    case StudentInit::folder: load_weights(*sources.student_folder, parameters, stream); return;
    case StudentInit::random: init_student_randomly(config.student, seed, parameters, stream); return;
    case StudentInit::teacher:
      init_student_from_teacher(
          config.student, seed, sources.teacher->spec(),
          [&](const ParameterSpec& p, const Tensor& out) { sources.teacher->load(p, out); }, sources.student,
          parameters, stream);
      return;
  }
}

}  // namespace deltapipe
