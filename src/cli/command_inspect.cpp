#include "checkpoints/hf_import.h"
#include "checkpoints/training_checkpoint.h"
#include "cli/commands.h"
#include "core/error.h"
#include "data/describe_dataset.h"

#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>

namespace deltapipe {
namespace fs = std::filesystem;
namespace {

std::string describe_model(const fs::path& path) {
  const HuggingFaceFolder folder(path);
  folder.verify();
  const ModelSpec& s = folder.spec();
  std::string mixers;
  for (const Mixer m : s.mixers) mixers += fmt::format("{}{}", mixers.empty() ? "" : " ", name_of(m));
  std::string text = fmt::format("model type       {}\nparameters       {}\nlayers           {}\nmixers           {}\n",
                                 s.model_type, count_parameters(s), s.layers(), mixers);
  text += fmt::format("hidden           {}\nintermediate     {} ({})\nvocabulary       {} (bos {}, eos {})\n", s.hidden,
                      s.intermediate, s.mlp == Mlp::gated_silu ? "gated SiLU" : "squared ReLU", s.vocabulary,
                      s.bos_token, s.eos_token);
  text += fmt::format("attention        {} heads, {} key/value heads of {}\n", s.heads, s.kv_heads, s.head_dim);
  if (s.has(Mixer::rope)) {
    text += fmt::format("rotary           theta {}{}\n", s.rope.theta,
                        s.rope.is_yarn() ? fmt::format(", YaRN factor {}", s.rope.factor) : "");
  }
  if (s.has(Mixer::kda)) {
    text += fmt::format("KDA              {} heads of {}, convolution {}, gate rank {}, gate bound {}\n", s.kda.heads,
                        s.kda.head_dim, s.kda.conv_width, s.kda.gate_rank,
                        s.kda.gate_lower_bound == 0 ? std::string("none") : fmt::format("{}", s.kda.gate_lower_bound));
  }
  text += fmt::format("embeddings       {}\n", s.tied_embeddings ? "tied" : "untied");
  for (const ParameterSpec& p : parameters_of(s)) text += fmt::format("  {:<52} {}\n", p.name, p.shape.str());
  return text;
}

std::string describe(const fs::path& path) {
  if (!fs::exists(path) && path.filename() != "latest") fail<IoError>("{}: no such file or folder", path.string());
  if (fs::is_regular_file(path)) return describe_dataset(path);
  if (fs::exists(path / "config.json")) return describe_model(path);
  return describe_checkpoint(find_checkpoint(path));
}

}  // namespace

void add_inspect_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("inspect", "describe a token dataset, a checkpoint or a model folder");
  auto path = std::make_shared<std::string>();
  command->add_option("path", *path, "dataset file, checkpoint or model folder")->required()->type_name("PATH");
  command->callback([path] { std::fputs(describe(*path).c_str(), stdout); });
}

}  // namespace deltapipe
