// A whole training run: stages one after another, with evaluation, metrics, checkpoints, signals and resume.
#pragma once

#include "checkpoints/hf_import.h"
#include "comm/mpi_runtime.h"
#include "core/config.h"
#include "model/spec.h"
#include "train/metrics.h"
#include "train/trainer.h"

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>

namespace deltapipe {

struct RunOptions {
  /// "none", "auto" (the newest whole checkpoint of the run, when there is one) or a checkpoint's folder.
  std::string resume = "none";
  /// Allows a run folder that holds checkpoints already to be begun anew, or to go on from a checkpoint's folder where
  /// it holds later ones, which "auto" would prefer: they are removed.
  bool restart = false;
};

/// Run folder: config.toml (resolved), metrics.jsonl, checkpoints/step-N/, and lock, a file held (FileLock) while a job
/// runs: another job waits for it for half of mesh.timeout_s, then throws UsageError. Throws the typed errors of
/// core/error.h; NumericError after optimizer.max_skipped_steps non-finite steps in a row.
///
/// Every rank of `runtime` calls it with the same arguments and has the result. An error that every rank sees or that
/// one rank has while setting up or writing a checkpoint is thrown on all (MpiRuntime::together); any other leaves the
/// ranks apart, and the caller ends them with MpiRuntime::abort_all.
RunResult run_training(const Config& config, const RunOptions& options, MpiRuntime& runtime);

/// Throws ConfigError when this binary cannot do what the configuration asks of the device.
void check_backend(const Config& config);

/// The device that this rank computes on: on CUDA one of its host's, dealt out in turn; from here on it is this
/// thread's. Collective. Throws UsageError where there is none.
Device choose_device(const Config& config, MpiRuntime& runtime);

/// The models that a configuration speaks of, opened but not loaded.
struct ModelSources {
  std::unique_ptr<HuggingFaceFolder> teacher;         // null: no teacher
  std::unique_ptr<HuggingFaceFolder> student_folder;  // null unless student.init = "folder"
  ModelSpec student;
};
ModelSources open_models(const Config& config, std::int64_t data_vocabulary);

/// Fills the student's first weights, as student.init says. `stream` is of the parameters' device.
void init_student_weights(const Config& config, const ModelSources& sources, ParameterTable& parameters,
                          const Stream& stream = Stream::cpu());

}  // namespace deltapipe
