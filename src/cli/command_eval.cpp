#include "cli/commands.h"
#include "cli/loaded_model.h"
#include "cli/options.h"
#include "core/error.h"
#include "core/file.h"
#include "data/token_dataset.h"
#include "eval/divergence.h"
#include "eval/needle.h"
#include "kernels/settings.h"

#include <nlohmann/json.hpp>

#include <cstdio>
#include <memory>
#include <optional>

namespace deltapipe {
namespace {

struct Options {
  std::string model, config, data, teacher, json;
  ComputationOptions computation;
  bool without_teacher = false;
  std::vector<std::string> overrides;
};

/// Settings: the checkpoint's own or --config, then the flags, then --set.
Config settings_of(const Options& o, const WeightSource& source) {
  std::vector<std::string> overrides;
  const auto text = [](const std::string& key, const std::string& value) {
    return key + "=" + nlohmann::json(value).dump();  // a JSON string is a TOML basic string
  };
  if (!o.data.empty()) overrides.push_back(text("data.validation", o.data));
  if (!o.teacher.empty()) overrides.push_back(text("teacher.path", o.teacher));
  overrides.insert(overrides.end(), o.overrides.begin(), o.overrides.end());
  Config config;
  if (!o.config.empty()) {
    config = load_config(o.config, overrides);
  } else if (auto own = source.config(overrides)) {
    config = *own;
  } else {
    // A folder of weights has no run of its own: the defaults, for a student that is only read.
    config = parse_config("[student]\ninit = \"folder\"\npath = \"-\"\n", "defaults", overrides);
  }
  if (o.without_teacher) config.teacher.path.clear();
  if (config.data.validation.empty()) fail<UsageError>("no held-out text: give --data FILE.h5 or set data.validation");
  return config;
}

std::int64_t sequence_length(const Config& config, const TokenDataset& data) {
  if (config.eval.sequence_length != 0) return config.eval.sequence_length;
  if (!config.stages.empty()) return config.stages.back().sequence_length;
  return std::min<std::int64_t>(2048, static_cast<std::int64_t>(data.size()));
}

void evaluate(const Options& options) {
  WeightSource student(options.model);
  const Config config = settings_of(options, student);
  std::optional<WeightSource> teacher;
  if (!config.teacher.path.empty()) {
    teacher.emplace(config.teacher.path);
    if (teacher->spec().vocabulary != student.spec().vocabulary) {
      fail<ConfigError>("teacher and student vocabularies differ: {} and {}", teacher->spec().vocabulary,
                        student.spec().vocabulary);
    }
  }
  const TokenDataset data(config.data.validation);
  if (static_cast<std::int64_t>(data.vocabulary()) > student.spec().vocabulary) {
    fail<ConfigError>("{} has a vocabulary of {}, but the model's is {}", config.data.validation, data.vocabulary(),
                      student.spec().vocabulary);
  }
  const WindowReader reader(data, sequence_length(config, data), config.data.isolate_documents);
  DivergenceResult divergence;
  NeedleResult needle;
  kernels::settings().deterministic = config.run.deterministic;
  with_models(student, teacher ? &*teacher : nullptr, options.computation.choose(config.run.device),
              [&](const Context& c, ModelSet& models, ArenaSet& arenas) {
                const Distiller distiller(models.student(), models.teacher(), config.memory.loss_block_tokens, false);
                DivergenceEvaluation evaluation(reader.sequence_length(), arenas.staging(), arenas.batch);
                Mesh alone;
                const pipeline::Stages stages(alone[Axis::pipeline], {distiller});
                divergence = evaluation.run(c, stages, alone, &reader, config.eval.tokens, arenas.activations);
                if (!config.eval.needle.lengths.empty()) {
                  needle = evaluate_needle(c, models.student(), models.teacher(), data, config.eval.needle,
                                           static_cast<std::uint64_t>(config.run.seed));
                }
              });
  std::fputs(divergence.table().c_str(), stdout);
  if (!needle.cells.empty()) std::fputs(("\nneedle retrieval\n" + needle.table()).c_str(), stdout);
  if (options.json.empty()) return;
  nlohmann::json report = nlohmann::json::parse(divergence.json());
  report["model"] = student.path().string();
  report["teacher"] = config.teacher.path;
  report["data"] = config.data.validation;
  report["sequence_length"] = reader.sequence_length();
  report["needle"] = nlohmann::json::parse(needle.json());
  write_file_atomically(options.json, report.dump(2) + "\n");
}

}  // namespace

void add_eval_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "eval", "measure perplexity, divergence from the teacher and needle retrieval on held-out text");
  auto options = std::make_shared<Options>();
  command->add_option("model", options->model, "Hugging Face folder, checkpoint, or a run's checkpoints/latest")
      ->required()
      ->type_name("FOLDER");
  command->add_option("--config", options->config, "configuration (default: the checkpoint's own)")->type_name("FILE");
  command->add_option("--data", options->data, "held-out token dataset (default: data.validation)")->type_name("FILE");
  command->add_option("--teacher", options->teacher, "teacher's model folder (default: teacher.path)")
      ->type_name("FOLDER");
  command->add_flag("--without-teacher", options->without_teacher, "measure the student alone");
  command->add_option("--json", options->json, "also write the results to this file")->type_name("FILE");
  options->computation.add_to(*command);
  command
      ->add_option("--set", options->overrides,
                   "override a key: --set eval.tokens=1000000 --set eval.needle.lengths=[1024] (repeatable)")
      ->type_name("KEY=VALUE")
      ->allow_extra_args(false);
  command->callback([options] { evaluate(*options); });
}

}  // namespace deltapipe
