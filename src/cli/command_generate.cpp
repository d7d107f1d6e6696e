#include "cli/commands.h"
#include "cli/loaded_model.h"
#include "cli/options.h"
#include "core/error.h"
#include "data/byte_vocabulary.h"
#include "model/inference.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cstdio>
#include <memory>

namespace deltapipe {
namespace {

struct Options {
  std::string model, text;
  TokenOptions tokens;
  std::int64_t count = 64;
  ComputationOptions computation;
};

void generate(const Options& options) {
  const bool as_text = !options.text.empty();
  if (as_text == options.tokens.given()) {
    fail<UsageError>("{}: give --text, --tokens or --tokens-file", as_text ? "more than one prompt" : "no prompt");
  }
  WeightSource source(options.model);
  if (as_text && source.spec().vocabulary != byte_vocabulary::size) {
    fail<UsageError>("--text needs a model of the byte vocabulary ({} tokens), this one has {}: give --tokens",
                     byte_vocabulary::size, source.spec().vocabulary);
  }
  std::vector<std::int64_t> prompt;
  if (as_text) {
    for (const char c : options.text) prompt.push_back(static_cast<unsigned char>(c));
  } else {
    prompt = options.tokens.read();
  }
  std::vector<std::int64_t> next;
  with_models(source, nullptr, options.computation.choose(), [&](const Context& c, ModelSet& models, ArenaSet&) {
    next = generate_greedily(c, models.student(), prompt, options.count);
  });
  if (as_text) {
    for (const std::int64_t t : next) {
      if (t < 256) std::putchar(static_cast<int>(t));
    }
    std::putchar('\n');
  } else {
    fmt::print("{}\n", fmt::join(next, ","));
  }
}

}  // namespace

void add_generate_command(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("generate", "continue a prompt, greedily and without caches: slow, for a look at a model");
  auto options = std::make_shared<Options>();
  command->add_option("model", options->model, "Hugging Face folder or checkpoint")->required()->type_name("FOLDER");
  command->add_option("--text", options->text, "prompt as text, for models of the byte vocabulary")->type_name("TEXT");
  command->add_option("--count", options->count, "tokens to generate")
      ->type_name("N")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  options->tokens.add_to(*command);
  options->computation.add_to(*command);
  command->callback([options] { generate(*options); });
}

}  // namespace deltapipe
