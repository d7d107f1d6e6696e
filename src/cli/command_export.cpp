#include "checkpoints/hf_export.h"
#include "cli/commands.h"
#include "cli/model_card.h"
#include "cli/options.h"
#include "cli/tokenizer_choice.h"
#include "core/error.h"
#include "core/file.h"
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

void export_model(const Options& options) {
  WeightSource source(options.model);
  const std::optional<Config> config = source.config();
  ExportRequest request;
  request.folder = options.out;
  request.spec = source.spec();
  request.dtype = file_dtype(options, config);
  request.shard_bytes = options.shard_bytes;
  request.overwrite = options.overwrite;
  choose_tokenizer(options.tokenizer, source.is_checkpoint() ? fs::path() : source.path(), config ? &*config : nullptr,
                   request);

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
