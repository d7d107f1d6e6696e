#include "plan/plan.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <iterator>

namespace deltapipe {
namespace {

std::string in_words(double seconds) {
  if (seconds < 1) return fmt::format("{:.3g} ms", seconds * 1e3);
  if (seconds < 600) return fmt::format("{:.3g} s", seconds);
  if (seconds < 48 * 3600) return fmt::format("{:.1f} h", seconds / 3600);
  return fmt::format("{:.1f} days", seconds / 86400);
}

/// Rows of cells under a head, columns as wide as their widest cell: the first `left` aligned left, the others right.
std::string to_table(const std::vector<std::vector<std::string>>& rows, std::size_t left) {
  std::vector<std::size_t> widths(rows.front().size(), 0);
  for (const auto& row : rows) {
    for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  std::string text;
  for (const auto& row : rows) {
    std::string line;
    for (std::size_t i = 0; i < row.size(); ++i) {
      line += i < left ? fmt::format("  {:<{}}", row[i], widths[i]) : fmt::format("  {:>{}}", row[i], widths[i]);
    }
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + "\n";
  }
  return text;
}

std::string layers_of(const LayerRange& r) {
  return r.size() == 1 ? fmt::format("{}", r.first) : fmt::format("{}-{}", r.first, r.last - 1);
}

std::string model_line(const char* who, const ModelSpec& spec) {
  const auto kda = std::count(spec.mixers.begin(), spec.mixers.end(), Mixer::kda);
  return fmt::format("{} {}: {:.2f} M parameters, {} layers{}\n", who, spec.model_type,
                     static_cast<double>(count_parameters(spec)) / 1e6, spec.layers(),
                     kda > 0 ? fmt::format(", {} of them KDA", kda) : "");
}

std::string describe_partition(const RunPlan& plan) {
  const TrainingPlan& t = plan.training;
  std::vector<std::vector<std::string>> rows{{"stage", "pipeline rank", "layers", "cost"}};
  for (std::size_t s = 0; s < t.partition.size(); ++s) {
    rows.push_back({fmt::format("{}", s), fmt::format("{}", s % static_cast<std::size_t>(t.mesh.pipeline)),
                    layers_of(t.partition[s]), fmt::format("{:.1f} %", 100 * plan.stage_shares[s])});
  }
  return fmt::format("stages of the pipeline, and their shares of the cost of a microbatch of '{}'\n",
                     t.config.stages.back().name) +
         to_table(rows, 3);
}

/// Of each pipeline rank the one that needs most.
std::string describe_memory(const RunPlan& plan) {
  const MeshShape& mesh = plan.training.mesh;
  std::vector<std::vector<std::string>> rows{{"pipeline rank"}};
  for (const auto& [name, bytes] : plan.memory.front().arenas) {
    rows.front().push_back(name.substr(0, name.find(" weights")));  // the title says what they are of the models
  }
  rows.front().push_back("total");
  const bool uses_host =
      std::any_of(plan.memory.begin(), plan.memory.end(), [](const RankMemory& m) { return m.host > 0; });
  if (uses_host) rows.front().push_back("host, beside");
  const auto mebibytes = [](std::size_t bytes) {
    return fmt::format("{:.1f}", static_cast<double>(bytes) / (std::size_t{1} << 20));
  };
  for (int p = 0; p < mesh.pipeline; ++p) {
    const RankMemory* most = nullptr;
    for (const RankMemory& m : plan.memory) {
      if (m.at.pipeline == p && (most == nullptr || m.total() > most->total())) most = &m;
    }
    std::vector<std::string> row{fmt::format("{}", p)};
    for (const auto& [name, bytes] : most->arenas) row.push_back(mebibytes(bytes));
    row.push_back(mebibytes(most->total()));
    if (uses_host) row.push_back(mebibytes(most->host));
    rows.push_back(row);
  }
  return fmt::format(
             "memory in MiB (student, teacher: weights){}\n",
             mesh.data * mesh.sequence > 1 ? ", of the rank that needs most among those of a pipeline rank" : "") +
         to_table(rows, 1);
}

std::string describe_times(const RunPlan& plan) {
  std::vector<std::vector<std::string>> rows{{"stage", "schedule", "microbatches", "step", "bubble", "in flight",
                                              "teacher kept", "tokens/s", "a rank", "steps", "in all"}};
  for (const StageTime& t : plan.times) {
    int in_flight = 0, kept = 0;
    for (const pipeline::RankPeak& p : t.simulation.peaks) {
      in_flight = std::max(in_flight, p.in_flight);
      kept = std::max(kept, p.kept_teacher);
    }
    rows.push_back({t.name, t.schedule, fmt::format("{}", t.simulation.microbatches), in_words(t.simulation.step_s),
                    fmt::format("{:.1f} %", 100 * t.simulation.bubble), fmt::format("{}", in_flight),
                    fmt::format("{}", kept), fmt::format("{:.0f}", t.tokens_per_second()),
                    fmt::format("{:.0f}", t.tokens_per_second() / plan.training.mesh.size()),
                    fmt::format("{}", t.steps), in_words(t.seconds())});
  }
  return fmt::format(
             "time if every rank were {} ({:g} TFLOP/s and {:g} TB/s sustained, {:g} GB/s to other ranks): a model's, "
             "not "
             "measured\n",
             plan.device.name, plan.device.compute.flops * 1e-12, plan.device.compute.bandwidth * 1e-12,
             plan.device.link_bytes_s * 1e-9) +
         to_table(rows, 2);
}

}  // namespace

std::string describe(const RunPlan& plan) {
  const TrainingPlan& t = plan.training;
  const MeshShape& m = t.mesh;
  std::string text = fmt::format("{} rank{}: data {} x pipeline {} x sequence {}", m.size(), m.size() == 1 ? "" : "s",
                                 m.data, m.pipeline, m.sequence);
  if (m.sequence > 1) text += fmt::format(" ({})", name_of(t.layout()));
  text += fmt::format("; {} on {}\n", name_of(compute_dtype(t.config.run)), name_of(t.config.run.device));
  text += model_line("student", t.student);
  if (t.teacher) text += model_line("teacher", *t.teacher);
  return text + "\n" + describe_partition(plan) + "\n" + describe_memory(plan) + "\n" + describe_times(plan);
}

std::string to_json(const RunPlan& plan) {
  using nlohmann::json;
  const TrainingPlan& t = plan.training;
  json root;
  root["mesh"] = {{"data", t.mesh.data},
                  {"pipeline", t.mesh.pipeline},
                  {"sequence", t.mesh.sequence},
                  {"layout", name_of(t.layout())}};
  root["dtype"] = name_of(compute_dtype(t.config.run));
  root["device"] = name_of(t.config.run.device);
  root["partition"] = json::array();
  for (std::size_t s = 0; s < t.partition.size(); ++s) {
    root["partition"].push_back({{"pipeline_rank", s % static_cast<std::size_t>(t.mesh.pipeline)},
                                 {"first_layer", t.partition[s].first},
                                 {"layers", t.partition[s].size()},
                                 {"cost_share", plan.stage_shares[s]}});
  }
  root["memory"] = json::array();
  for (const RankMemory& m : plan.memory) {
    json arenas;
    for (const auto& [name, bytes] : m.arenas) arenas[name] = bytes;
    root["memory"].push_back({{"rank", m.rank},
                              {"data", m.at.data},
                              {"pipeline", m.at.pipeline},
                              {"sequence", m.at.sequence},
                              {"arenas", arenas},
                              {"total", m.total()},
                              {"host", m.host}});
  }
  root["time_model"] = {{"device", plan.device.name},
                        {"flops_per_second", plan.device.compute.flops},
                        {"memory_bytes_per_second", plan.device.compute.bandwidth},
                        {"link_bytes_per_second", plan.device.link_bytes_s}};
  root["stages"] = json::array();
  for (const StageTime& s : plan.times) {
    json peaks = json::array();
    for (const pipeline::RankPeak& p : s.simulation.peaks) {
      peaks.push_back({{"in_flight", p.in_flight}, {"kept_teacher", p.kept_teacher}});
    }
    root["stages"].push_back({{"name", s.name},
                              {"schedule", s.schedule},
                              {"microbatches", s.simulation.microbatches},
                              {"steps", s.steps},
                              {"tokens_per_step", s.tokens},
                              {"step_seconds", s.simulation.step_s},
                              {"update_seconds", s.simulation.update_s},
                              {"bubble", s.simulation.bubble},
                              {"tokens_per_second", s.tokens_per_second()},
                              {"pipeline_ranks", peaks}});
  }
  return root.dump(2) + "\n";
}

}  // namespace deltapipe
