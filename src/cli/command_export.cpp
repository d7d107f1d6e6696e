#include "checkpoints/hf_export.h"
#include "cli/commands.h"
#include "cli/model_card.h"
#include "cli/options.h"
#include "core/error.h"
#include "core/file.h"
#include "core/log.h"
#include "data/byte_vocabulary.h"
#include "data/token_dataset.h"
#include "kernels/elementwise.h"
#include "train/run.h"
#include "train/weight_source.h"

#include <fmt/format.h>

#include <filesystem>
#include <memory>

namespace deltapipe {
namespace fs = std::filesystem;
namespace {

struct Options {
  std::string model, out, dtype, tokenizer, evaluation, name;
  std::int64_t shard_bytes = 5'000'000'000;
  bool overwrite = false;
};

DType file_dtype(const Options& o, const std::optional<Config>& config) {
  if (o.dtype == "float32") return DType::f32;
  if (o.dtype == "bfloat16") return DType::bf16;
  if (!o.dtype.empty()) fail<UsageError>("--dtype is '{}', accepted: float32, bfloat16", o.dtype);
  return config && compute_dtype(config->run) != DType::bf16 ? DType::f32 : DType::bf16;
}

bool has_tokenizer(const fs::path& folder) {
  return fs::exists(folder / "tokenizer.json") || fs::exists(folder / "tokenizer.model");
}

bool uses_byte_vocabulary(const Config& config) {
  return !config.data.train.empty() && fs::exists(config.data.train) &&
         TokenDataset(config.data.train).tokenizer_hash() == byte_vocabulary::tokenizer_hash();
}

/// --tokenizer, else the teacher's, else the model folder's own, else the byte vocabulary of the training data.
void choose_tokenizer(const Options& o, const WeightSource& source, const std::optional<Config>& config,
                      ExportRequest& request) {
  if (o.tokenizer == "bytes") {
    request.byte_tokenizer = true;
  } else if (!o.tokenizer.empty()) {
    if (!has_tokenizer(o.tokenizer)) fail<UsageError>("{} holds no tokenizer.json or tokenizer.model", o.tokenizer);
    request.tokenizer_folder = o.tokenizer;
  } else if (config && !config->teacher.path.empty() && has_tokenizer(config->teacher.path)) {
    request.tokenizer_folder = config->teacher.path;
  } else if (!source.is_checkpoint() && has_tokenizer(source.path())) {
    request.tokenizer_folder = source.path();
  } else if (config && uses_byte_vocabulary(*config)) {
    request.byte_tokenizer = true;
  } else {
    log::warn("no tokenizer found, the export has none; --tokenizer FOLDER (or \"bytes\") gives it one");
  }
}

void export_model(const Options& options) {
  WeightSource source(options.model);
  const std::optional<Config> config = source.config();
  ExportRequest request;
  request.folder = options.out;
  request.spec = source.spec();
  request.dtype = file_dtype(options, config);
  request.shard_bytes = options.shard_bytes;
  request.overwrite = options.overwrite;
  choose_tokenizer(options, source, config, request);
  if (request.byte_tokenizer) {
    request.spec.bos_token = byte_vocabulary::bos;
    request.spec.eos_token = byte_vocabulary::eos;
  }

  ModelCardFacts facts;
  facts.name = !options.name.empty() ? options.name : fs::path(options.out).lexically_normal().filename().string();
  facts.spec = &request.spec;
  if (config) facts.teacher = config->teacher.path;
  if (const TrainingState* s = source.state()) {
    facts.training = fmt::format("Trained by deltapipe for {} steps on {} tokens.", s->step, s->tokens_seen);
  }
  if (!options.evaluation.empty()) {
    facts.evaluation_file = options.evaluation;
    facts.evaluation_json = read_file(options.evaluation);
  }
  request.model_card = write_model_card(facts);

  Arena measured = Arena::measuring("weights");
  ParameterTable(parameters_of(request.spec), DType::f32, measured);
  Arena memory("weights", measured.peak());
  ParameterTable parameters(parameters_of(request.spec), DType::f32, memory);
  source.load(parameters);
  request.parameter = [&](const ParameterSpec& p) { return parameters.at(p.name).value; };
  export_huggingface(request);
  fmt::print("exported {} parameters to {}\n", count_parameters(request.spec), options.out);
}

}  // namespace

void add_export_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("export", "write a checkpoint as a Hugging Face model folder");
  auto options = std::make_shared<Options>();
  command->add_option("model", options->model, "checkpoint, a run's checkpoints/latest, or a model folder")
      ->required()
      ->type_name("FOLDER");
  command->add_option("--out", options->out, "folder to write")->required()->type_name("FOLDER");
  command->add_option("--dtype", options->dtype, "type of the weights: float32 or bfloat16 (default: the run's)")
      ->type_name("TYPE");
  command
      ->add_option("--tokenizer", options->tokenizer,
                   "folder to copy tokenizer files from, or \"bytes\" (default: the teacher's)")
      ->type_name("FOLDER");
  command->add_option("--eval", options->evaluation, "results of `deltapipe eval --json`, for the model card")
      ->type_name("FILE");
  command->add_option("--name", options->name, "model name on the card (default: the folder's)")->type_name("NAME");
  command->add_option("--shard-bytes", options->shard_bytes, "most bytes that a weight file holds")
      ->type_name("BYTES")
      ->check(CLI::PositiveNumber);
  command->add_flag("--overwrite", options->overwrite, "replace an older export in that folder");
  command->callback([options] { export_model(*options); });
}

}  // namespace deltapipe
