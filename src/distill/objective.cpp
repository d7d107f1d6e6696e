#include "distill/objective.h"

#include "core/error.h"

namespace deltapipe {

std::int64_t Objective::teacher_layer_of(std::int64_t student_layer) const {
  if (!has_hidden_losses()) return -1;
  for (const auto& [s, t] : hidden_layers) {
    if (s == student_layer) return t;
  }
  return -1;
}

Objective make_objective(const StageConfig& stage, const ModelSpec& student, const ModelSpec* teacher) {
  Objective o;
  o.head.ce = static_cast<float>(stage.loss.ce);
  o.head.kl = static_cast<float>(stage.loss.kl);
  o.head.reverse_kl = static_cast<float>(stage.loss.reverse_kl);
  o.head.jsd = static_cast<float>(stage.loss.jsd);
  o.head.tvd = static_cast<float>(stage.loss.tvd);
  o.head.jsd_beta = static_cast<float>(stage.loss.jsd_beta);
  o.head.temperature = static_cast<float>(stage.temperature);
  o.hidden_cosine = stage.loss.hidden_cosine;
  o.hidden_mse = stage.loss.hidden_mse;
  o.mixer_mse = stage.loss.mixer_mse;
  if (!o.needs_teacher()) return o;

  if (teacher == nullptr) fail<ConfigError>("stage '{}' has a loss that needs a teacher; set teacher.path", stage.name);
  if (teacher->vocabulary != student.vocabulary) {
    fail<ConfigError>("teacher and student vocabularies differ: {} and {}", teacher->vocabulary, student.vocabulary);
  }
  if ((o.has_hidden_losses() || o.aligns_mixers()) && teacher->hidden != student.hidden) {
    fail<ConfigError>("stage '{}' compares hidden states, but teacher and student have hidden sizes {} and {}",
                      stage.name, teacher->hidden, student.hidden);
  }
  if (o.aligns_mixers() && teacher->layers() != student.layers()) {
    fail<ConfigError>("stage '{}' aligns mixers layer by layer, but teacher and student have {} and {} layers",
                      stage.name, teacher->layers(), student.layers());
  }
  if (o.has_hidden_losses()) {
    for (const auto& [s, t] : stage.hidden_layers) {
      if (s < 0 || s >= student.layers() || t < 0 || t >= teacher->layers()) {
        fail<ConfigError>("stage '{}': hidden_layers has [{}, {}], but the student has {} and the teacher {} layers",
                          stage.name, s, t, student.layers(), teacher->layers());
      }
      if (o.teacher_layer_of(s) >= 0) {
        fail<ConfigError>("stage '{}': hidden_layers names student layer {} twice", stage.name, s);
      }
      o.hidden_layers.emplace_back(s, t);
    }
    if (o.hidden_layers.empty()) {
      if (teacher->layers() != student.layers()) {
        fail<ConfigError>("stage '{}' compares all layers, but teacher and student have {} and {}; set hidden_layers",
                          stage.name, teacher->layers(), student.layers());
      }
      for (std::int64_t l = 0; l < student.layers(); ++l) o.hidden_layers.emplace_back(l, l);
    }
  }
  return o;
}

LossReport report_losses(const Objective& o, const double* sums, std::int64_t layers, double tokens) {
  using kernels::LossSum;
  LossReport r;
  r.tokens = tokens;
  if (tokens <= 0) return r;
  const double* head = sums;
  r.ce = head[LossSum::ce] / tokens;
  r.kl = head[LossSum::kl] / tokens;
  r.reverse_kl = head[LossSum::reverse_kl] / tokens;
  r.jsd = head[LossSum::jsd] / tokens;
  r.tvd = head[LossSum::tvd] / tokens;
  r.top1_agreement = head[LossSum::top1_agree] / tokens;
  r.student_accuracy = head[LossSum::student_correct] / tokens;
  r.teacher_accuracy = head[LossSum::teacher_correct] / tokens;
  r.teacher_ce = head[LossSum::teacher_ce] / tokens;
  if (!o.hidden_layers.empty()) {
    const auto mapped = static_cast<double>(o.hidden_layers.size());
    r.hidden_cosine = sums[LossSums::hidden_cosine] / tokens / mapped;
    r.hidden_mse = sums[LossSums::hidden_mse] / tokens / mapped;
  }
  r.mixer_mse = sums[LossSums::mixer_mse] / tokens / static_cast<double>(layers);
  const auto& w = o.head;
  r.total = static_cast<double>(w.ce) * r.ce + static_cast<double>(w.kl) * r.kl +
            static_cast<double>(w.reverse_kl) * r.reverse_kl + static_cast<double>(w.jsd) * r.jsd +
            static_cast<double>(w.tvd) * r.tvd + o.hidden_cosine * r.hidden_cosine + o.hidden_mse * r.hidden_mse +
            o.mixer_mse * r.mixer_mse;
  return r;
}

}  // namespace deltapipe
