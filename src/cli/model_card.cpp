#include "cli/model_card.h"

#include "core/error.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

namespace deltapipe {
namespace {

std::string layers_line(const ModelSpec& s) {
  std::string line;
  for (const Mixer m : {Mixer::kda, Mixer::nope, Mixer::rope}) {
    const auto n = std::count(s.mixers.begin(), s.mixers.end(), m);
    if (n == 0) continue;
    const char* what = m == Mixer::kda    ? "Kimi Delta Attention"
                       : m == Mixer::nope ? "full attention without positions"
                                          : "full attention with rotary positions";
    line += fmt::format("{}{} {}", line.empty() ? "" : ", ", n, what);
  }
  return line;
}

std::string measured(const nlohmann::json& j) {
  std::string text = "| held-out measure | value |\n|---|---|\n";
  const auto row = [&](const char* key, const char* name) {
    if (j.contains(key) && j[key].is_number()) text += fmt::format("| {} | {:.4f} |\n", name, j[key].get<double>());
  };
  row("teacher_perplexity", "teacher perplexity");
  row("student_perplexity", "perplexity");
  row("kl", "KL(teacher, this model), nats a token");
  row("top1_agreement", "top-1 agreement with the teacher");
  row("tokens", "tokens measured");
  if (j.contains("needle") && j["needle"].is_array() && !j["needle"].empty()) {
    text += "\n| needle length | depth | keys | found | teacher found |\n|---|---|---|---|---|\n";
    for (const auto& x : j["needle"]) {
      text += fmt::format(
          "| {} | {:.2f} | {} | {:.1f} % | {} |\n", x.at("length").get<std::int64_t>(), x.at("depth").get<double>(),
          x.at("keys").get<std::int64_t>(), 100 * x.at("student_found").get<double>(),
          x.contains("teacher_found") ? fmt::format("{:.1f} %", 100 * x.at("teacher_found").get<double>())
                                      : std::string("-"));
    }
  }
  return text;
}

}  // namespace

std::string write_model_card(const ModelCardFacts& facts) {
  const ModelSpec& s = *facts.spec;
  const bool custom = s.model_type == "arcee_kda";
  std::string text = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- " + s.model_type +
                     "\n---\n\n# " + facts.name + "\n\n";
  text += fmt::format("A `{}` causal language model: {} layers ({}), hidden size {}, vocabulary {}, {} parameters.\n",
                      s.model_type, s.layers(), layers_line(s), s.hidden, s.vocabulary, count_parameters(s));
  if (!facts.teacher.empty()) text += "\nDistilled from `" + facts.teacher + "`.";
  if (!facts.training.empty()) text += (facts.teacher.empty() ? "\n" : " ") + facts.training;
  if (!facts.teacher.empty() || !facts.training.empty()) text += "\n";
  text +=
      "\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
      "model = AutoModelForCausalLM.from_pretrained(folder";
  text += custom ? ", trust_remote_code=True)\n" : ")\n";
  text +=
      "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
      "ids = tokenizer(\"Once\", return_tensors=\"pt\")\n"
      "print(tokenizer.decode(model.generate(**ids, max_new_tokens=64)[0]))\n```\n\n## Measured\n\n";
  if (facts.evaluation_json.empty()) return text + "Nothing was measured for this export.\n";
  const auto j = nlohmann::json::parse(facts.evaluation_json, nullptr, false);
  if (!j.is_object()) fail<FormatError>("{}: is not a JSON object", facts.evaluation_file);
  try {
    return text + measured(j);
  } catch (const nlohmann::json::exception& e) {
    fail<FormatError>("{}: is not a file of `deltapipe eval --json`: {}", facts.evaluation_file, e.what());
  }
}

}  // namespace deltapipe
