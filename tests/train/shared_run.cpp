#include "tests/train/shared_run.h"

#include "checkpoints/hf_export.h"
#include "core/file.h"
#include "core/log.h"
#include "plan/plan.h"
#include "tests/comm/testing.h"
#include "tests/data/testing.h"
#include "tests/distill/tiny.h"

#include <fmt/format.h>

#include <array>
#include <cstdlib>
#include <sstream>

namespace deltapipe::testing {
namespace fs = std::filesystem;
namespace {

void make_teacher(const fs::path& folder) {
  const ModelSpec spec = tiny_teacher();
  Arena weights("teacher", std::size_t{1} << 20);
  ParameterTable table(parameters_of(spec), DType::f32, weights);
  randomize(table, 3, "teacher ");
  export_huggingface({.folder = folder,
                      .spec = spec,
                      .parameter = [&](const ParameterSpec& p) { return table.at(p.name).value; },
                      .dtype = DType::f32,
                      .tokenizer_folder = {},
                      .model_card = {}});
}

}  // namespace

SharedRun::SharedRun() {
  log::configure(log::Level::warn, runtime().rank(), runtime().size());
  std::array<char, 256> name{};
  runtime().together([&] {
    if (runtime().rank() != 0) return;
    const std::string pattern = (fs::temp_directory_path() / "deltapipe-run-XXXXXX").string();
    require(pattern.size() < name.size(), "the folder's name is too long");
    pattern.copy(name.data(), pattern.size());
    require(mkdtemp(name.data()) != nullptr, "cannot make a folder");
    path_ = name.data();
    make_teacher(path_ / "teacher");
    for (const auto& [file, seed] : {std::pair{"train.h5", 1}, std::pair{"validation.h5", 2}}) {
      write_dataset(path_ / file, {"tiny", "none", 23, -1, 22},
                    random_documents(static_cast<std::uint64_t>(seed), 60, 40, 23));
    }
  });
  runtime().world().broadcast(Stream::cpu(), Tensor(name.data(), DType::u8, {std::ssize(name)}), 0, Purpose::control);
  path_ = name.data();
}

SharedRun::~SharedRun() {
  std::error_code ignored;
  if (runtime().rank() == 0) fs::remove_all(path_, ignored);
}

Config SharedRun::config(const std::vector<std::string>& overrides) const {
  const std::string text = fmt::format(
      "[run]\ndir = '{0}/run'\nthreads = 1\n[teacher]\npath = '{0}/teacher'\n[student.kda]\n"
      "gate_rank = 3\n[data]\ntrain = '{0}/train.h5'\nvalidation = '{0}/validation.h5'\n"
      "[[stage]]\nname = 'align'\nsteps = 2\nsequence_length = 48\nbatch_sequences = 4\nlearning_rate = 1e-2\n"
      "[stage.loss]\nmixer_mse = 1.0\n"
      "[[stage]]\nname = 'distill'\nsteps = 4\nsequence_length = 48\nbatch_sequences = 4\nlearning_rate = 5e-3\n"
      "[stage.loss]\nkl = 1.0\nhidden_cosine = 0.5\n[eval]\ntokens = 384\n",
      path_.string());
  return parse_config(text, "run.toml", overrides);
}

TrainingPlan SharedRun::plan(const Config& config) const {
  const PlannedModels models = read_planned_models(config);
  return make_training_plan(config, models.student, &*models.teacher, plan_mesh(config, runtime().size()));
}

RunResult SharedRun::run(const Config& config) const {
  runtime().together([&] {
    if (runtime().rank() == 0) fs::remove_all(path_ / "run");
  });
  const RunResult result = run_training(config, {}, runtime());
  runtime().world().barrier(Stream::cpu());
  return result;
}

std::vector<nlohmann::json> SharedRun::metrics() const {
  std::vector<nlohmann::json> lines;
  std::istringstream text(read_file(path_ / "run/metrics.jsonl"));
  for (std::string line; std::getline(text, line);) lines.push_back(nlohmann::json::parse(line));
  return lines;
}

nlohmann::json SharedRun::trace() const { return nlohmann::json::parse(read_file(path_ / "run/trace.json")); }

}  // namespace deltapipe::testing
