#include "train/metrics.h"

#include "core/error.h"
#include "core/file.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <sstream>

namespace deltapipe {
namespace {

/// JSON has no NaN or infinity: null stands for both.
nlohmann::json number(double x) { return std::isfinite(x) ? nlohmann::json(x) : nlohmann::json(nullptr); }

/// (name, value) of the losses that a stage looks at, weighted or not.
std::vector<std::pair<const char*, double>> terms(const Objective& o, const LossReport& r) {
  std::vector<std::pair<const char*, double>> list;
  const auto add = [&](bool used, const char* name, double value) {
    if (used) list.emplace_back(name, value);
  };
  add(o.has_head_losses(), "ce", r.ce);
  add(o.has_head_losses() && o.needs_teacher(), "kl", r.kl);
  add(o.head.reverse_kl > 0, "reverse_kl", r.reverse_kl);
  add(o.head.jsd > 0, "jsd", r.jsd);
  add(o.head.tvd > 0, "tvd", r.tvd);
  add(o.hidden_cosine > 0, "hidden_cosine", r.hidden_cosine);
  add(o.hidden_mse > 0, "hidden_mse", r.hidden_mse);
  add(o.mixer_mse > 0, "mixer_mse", r.mixer_mse);
  return list;
}

std::string clock(double seconds) {
  const auto s = static_cast<std::int64_t>(std::max(0.0, seconds) + 0.5);
  return fmt::format("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60);
}

}  // namespace

MetricsFile::MetricsFile(const std::filesystem::path& path, std::int64_t last_step) : path_(path) {
  std::string kept;
  if (std::filesystem::exists(path)) {
    std::istringstream old(read_file(path));
    for (std::string text; std::getline(old, text);) {
      const auto j = nlohmann::json::parse(text, nullptr, false);
      if (j.is_object() && j.contains("step") && j["step"].is_number_integer() && j["step"] <= last_step) {
        kept += text + "\n";
      }
    }
  }
  write_file_atomically(path, kept);
  file_.open(path, std::ios::app);
  if (!file_) fail<IoError>("cannot open {}: {}", path.string(), std::strerror(errno));
}

void MetricsFile::line(const std::string& text) {
  file_ << text << '\n' << std::flush;
  if (!file_) fail<IoError>("cannot write {}: {}", path_.string(), std::strerror(errno));
}

void MetricsFile::write(const StepMetrics& m) {
  const LossReport& r = m.report.losses;
  nlohmann::json j{{"step", m.step},
                   {"stage", m.stage},
                   {"stage_step", m.stage_step},
                   {"tokens", m.tokens_seen},
                   {"loss_tokens", r.tokens},
                   {"loss", number(r.total)},
                   {"learning_rate", m.report.learning_rate},
                   {"gradient_norm", number(m.report.gradient_norm)},
                   {"tokens_per_second", m.tokens_per_second},
                   {"seconds", m.seconds},
                   {"skipped", m.skipped}};
  if (m.mfu > 0) j["mfu"] = m.mfu;
  const std::pair<const char*, double> losses[] = {{"ce", r.ce},
                                                   {"kl", r.kl},
                                                   {"reverse_kl", r.reverse_kl},
                                                   {"jsd", r.jsd},
                                                   {"tvd", r.tvd},
                                                   {"mixer_mse", r.mixer_mse},
                                                   {"hidden_cosine", r.hidden_cosine},
                                                   {"hidden_mse", r.hidden_mse},
                                                   {"top1_agreement", r.top1_agreement},
                                                   {"student_accuracy", r.student_accuracy}};
  for (const auto& [name, value] : losses) {
    if (value != 0) j[name] = number(value);
  }
  for (const TrafficMetrics& t : m.traffic) {
    j["traffic"][t.axis][t.purpose] = {{"messages", t.messages}, {"bytes", t.bytes}};
  }
  line(j.dump());
}

void MetricsFile::write_end(const RunResult& r) {
  nlohmann::json memory = nlohmann::json::array();
  for (const RankMemoryUse& rank : r.memory) {
    nlohmann::json arenas;
    for (const ArenaUse& a : rank) arenas[a.name] = {{"planned", a.planned_bytes}, {"peak", a.peak_bytes}};
    memory.push_back(arenas);
  }
  nlohmann::json j{{"end", true},
                   {"step", r.steps},
                   {"tokens", r.tokens},
                   {"skipped", r.skipped},
                   {"stopped_by_signal", r.stopped_by_signal},
                   {"seconds", r.seconds},
                   {"peak_rss_bytes", r.peak_rss_bytes},
                   {"memory", memory}};
  if (r.device_bytes > 0) j["device_bytes"] = r.device_bytes;
  line(j.dump());
}

void MetricsFile::write_evaluation(std::int64_t step, const std::string& stage, const DivergenceResult& result) {
  nlohmann::json j = nlohmann::json::parse(result.json());
  j["eval"] = true;
  j["step"] = step;
  j["stage"] = stage;
  line(j.dump());
}

ConsoleProgress::ConsoleProgress(std::uint64_t total_tokens, std::uint64_t done_tokens)
    : total_tokens_(total_tokens), first_tokens_(done_tokens), begin_(std::chrono::steady_clock::now()) {}

std::string ConsoleProgress::line(const StepMetrics& m, std::int64_t stage_steps, const Objective& objective) {
  std::string text = fmt::format("{} {}/{}", m.stage, m.stage_step, stage_steps);
  text += m.report.applied ? fmt::format("  loss {:.4f}", m.report.losses.total)
                           : std::string("  SKIPPED: loss or gradient not finite");
  for (const auto& [name, value] : terms(objective, m.report.losses)) text += fmt::format("  {} {:.4f}", name, value);
  const double elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
  const auto done = static_cast<double>(m.tokens_seen - first_tokens_);
  const auto rest = static_cast<double>(total_tokens_ - std::min(total_tokens_, m.tokens_seen));
  const std::string mfu = m.mfu > 0 ? fmt::format("  MFU {:.1f} %", 100 * m.mfu) : "";
  text += fmt::format("  grad {:.3g}  lr {:.3g}  {:.0f} tokens/s{}  {:.1f} %  left {}", m.report.gradient_norm,
                      m.report.learning_rate, m.tokens_per_second, mfu,
                      100.0 * static_cast<double>(m.tokens_seen) / static_cast<double>(total_tokens_),
                      clock(done > 0 ? rest * elapsed / done : 0));
  return text;
}

}  // namespace deltapipe
