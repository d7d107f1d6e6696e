#include "cli/commands.h"

#include "data/build_dataset.h"

#include <fmt/core.h>
#include <CLI/CLI.hpp>

#include <memory>

namespace deltapipe {
namespace {

void print(const std::filesystem::path& path, const BuildCounts& counts) {
  fmt::print("{}: {} documents, {} tokens, {} bytes\n", path.string(), counts.documents, counts.tokens, counts.bytes);
}

void run(const BuildOptions& options) {
  const BuildReport report = build_dataset(options);
  print(options.out, report.train);
  if (!options.validation.empty()) print(options.validation, report.validation);
  fmt::print("from {} files", report.files);
  if (report.empty_documents > 0) fmt::print(", {} empty documents left out", report.empty_documents);
  fmt::print("\n");
}

}  // namespace

void add_data_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "data",
      "make a token dataset from text or JSON lines, one token a byte (with a tokenizer: tools/tokenize_corpus.py)");
  const auto options = std::make_shared<BuildOptions>();
  command->add_option("inputs", options->inputs, "files and folders; *.jsonl holds a document a line")
      ->required()
      ->type_name("PATH");
  command->add_option("--out", options->out, "the dataset to write (.h5)")->required()->type_name("FILE");
  command->add_option("--field", options->field, "key of the text in *.jsonl")->type_name("KEY")->capture_default_str();
  CLI::Option* validation =
      command->add_option("--validation", options->validation, "a second dataset, for documents set aside")
          ->type_name("FILE");
  command->add_option("--validation-fraction", options->validation_fraction, "share of the documents set aside")
      ->needs(validation)
      ->capture_default_str();
  command->add_option("--seed", options->seed, "seed of the choice of validation documents")->capture_default_str();
  command->add_option("--suffix", options->suffixes, "of folders, take only files whose names end so (.txt,.rst)")
      ->delimiter(',')
      ->allow_extra_args(false);  // or it would swallow the inputs behind it
  command->callback([options] { run(*options); });
}

}  // namespace deltapipe
