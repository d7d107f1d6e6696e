#include "checkpoints/hf_export.h"
#include "cli/commands.h"
#include "cli/model_card.h"
#include "cli/options.h"
#include "cli/tokenizer_choice.h"
#include "core/log.h"
#include "data/token_dataset.h"
#include "train/run.h"

#include <fmt/format.h>

#include <filesystem>
#include <memory>

namespace deltapipe {
namespace fs = std::filesystem;
namespace {

struct Options {
  ConfigOptions config;
  std::string out, tokenizer;
  bool overwrite = false;
};

void init_student(const Options& options) {
  const Config config = options.config.load();
  log::configure(config.run.log_level, 0, 1);
  std::int64_t vocabulary = 0;
  if (config.student.init == StudentInit::random && !config.data.train.empty()) {
    vocabulary = static_cast<std::int64_t>(TokenDataset(config.data.train).vocabulary());
  }
  const ModelSources sources = open_models(config, vocabulary);
  Arena measured = Arena::measuring("student weights");
  ParameterTable(parameters_of(sources.student), DType::f32, measured);
  Arena memory("student weights", measured.peak());
  ParameterTable parameters(parameters_of(sources.student), DType::f32, memory);
  init_student_weights(config, sources, parameters);

  ExportRequest request;
  request.folder = options.out.empty() ? run_dir(config.run) / "student-init" : fs::path(options.out);
  request.spec = sources.student;
  request.dtype = compute_dtype(config.run) == DType::bf16 ? DType::bf16 : DType::f32;
  request.overwrite = options.overwrite;
  choose_tokenizer(options.tokenizer, sources.student_folder ? sources.student_folder->path() : fs::path(), &config,
                   request);
  request.model_card = write_model_card({.name = config.run.name + ", untrained",
                                         .spec = &request.spec,
                                         .teacher = config.teacher.path,
                                         .training = "Not trained yet.",
                                         .evaluation_file = {},
                                         .evaluation_json = {}});
  request.parameter = [&](const ParameterSpec& p) { return parameters.at(p.name).value; };
  export_huggingface(request);
  fmt::print("untrained student of {} parameters in {}\n", count_parameters(request.spec), request.folder.string());
}

}  // namespace

void add_init_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("init", "write the untrained student that `train` would start from");
  auto options = std::make_shared<Options>();
  options->config.add_to(*command);
  command->add_option("--out", options->out, "folder to write (default: student-init in the run's folder)")
      ->type_name("FOLDER");
  command->add_option("--tokenizer", options->tokenizer, "folder to copy tokenizer files from, or \"bytes\"");
  command->add_flag("--overwrite", options->overwrite, "replace an older model in that folder");
  command->callback([options] { init_student(*options); });
}

}  // namespace deltapipe
