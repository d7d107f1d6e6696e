#include "eval/divergence.h"

#include "core/device_memory.h"
#include "kernels/elementwise.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>

namespace deltapipe {

DivergenceEvaluation::DivergenceEvaluation(std::int64_t length, Arena& host, Arena& batch, const SequenceLayout& layout,
                                           int sequence_rank)
    : batch_(host, batch, 1, length, layout, sequence_rank),
      sums_{batch.allocate(DType::f64, {LossSums::count}, "evaluation sums")},
      host_sums_(batch.device().is_cpu() ? sums_.values
                                         : host.allocate(DType::f64, {LossSums::count}, "evaluation sums, host")) {}

DivergenceResult DivergenceEvaluation::run(const Context& c, const pipeline::Stages& stages, Mesh& mesh,
                                           const WindowReader* reader, std::int64_t max_tokens, Arena& activations) {
  const bool has_teacher = stages.has_teacher();
  kernels::DistillWeights weights;
  weights.ce = 1;
  weights.kl = has_teacher ? 1 : 0;
  const std::int64_t available = reader == nullptr ? 1 : static_cast<std::int64_t>(reader->windows());
  const std::int64_t windows = std::clamp<std::int64_t>(max_tokens / batch_.length(), 1, available);
  kernels::fill_zero(c.stream, sums_.values);
  const auto first = c.stream.is_dry() ? 0 : std::int64_t{mesh.coordinate().data};
  for (std::int64_t w = first; w < (c.stream.is_dry() ? 1 : windows); w += mesh.shape().data) {
    if (!c.stream.is_dry()) {
      synchronize(c.stream);  // the window before has left host memory
      reader->fill(static_cast<std::uint64_t>(w), batch_.spans(0));
      batch_.cut(c.stream);
    }
    stages.evaluate(c, batch_.microbatch(0, 1), weights, sums_, microbatch_, activations);
  }
  mesh[Axis::world].all_reduce_sum(c.stream, sums_.values, Purpose::control, c.workspace);
  DivergenceResult result;
  if (c.stream.is_dry()) return result;
  copy(c.stream, sums_.values, host_sums_);
  synchronize(c.stream);
  const double* sums = host_sums_.as<double>();
  const double tokens = sums[kernels::LossSum::tokens];
  const LossReport report = report_losses(Objective(), sums, 1, tokens);
  result.tokens = tokens;
  result.student_perplexity = std::exp(report.ce);
  result.student_accuracy = report.student_accuracy;
  if (has_teacher) {
    result.teacher = DivergenceResult::AgainstTeacher{std::exp(report.teacher_ce), report.teacher_accuracy, report.kl,
                                                      report.top1_agreement};
  }
  return result;
}

std::string DivergenceResult::line() const {
  std::string text = fmt::format("perplexity {:.4f}", student_perplexity);
  if (teacher) {
    text += fmt::format(" (teacher {:.4f})  KL {:.4f}  top-1 agreement {:.1f} %", teacher->teacher_perplexity,
                        teacher->kl, 100.0 * teacher->top1_agreement);
  }
  return text;
}

std::string DivergenceResult::table() const {
  std::string text = fmt::format("{:<34}{:>12.0f}\n", "held-out tokens", tokens);
  const auto row = [&](const char* name, double value) { text += fmt::format("{:<34}{:>12.4f}\n", name, value); };
  if (teacher) {
    row("teacher perplexity", teacher->teacher_perplexity);
    row("student perplexity", student_perplexity);
    row("teacher next-token accuracy", teacher->teacher_accuracy);
    row("student next-token accuracy", student_accuracy);
    row("KL(teacher || student), nats/token", teacher->kl);
    row("top-1 agreement", teacher->top1_agreement);
  } else {
    row("perplexity", student_perplexity);
    row("next-token accuracy", student_accuracy);
  }
  return text;
}

std::string DivergenceResult::json() const {
  nlohmann::json j{
      {"tokens", tokens}, {"student_perplexity", student_perplexity}, {"student_accuracy", student_accuracy}};
  if (teacher) {
    j["teacher_perplexity"] = teacher->teacher_perplexity;
    j["teacher_accuracy"] = teacher->teacher_accuracy;
    j["kl"] = teacher->kl;
    j["top1_agreement"] = teacher->top1_agreement;
  }
  return j.dump();
}

}  // namespace deltapipe
