// Perplexity and divergence on held-out text, against the definitions computed from logits in double.
#include "eval/divergence.h"

#include "model/inference.h"
#include "tests/data/testing.h"
#include "tests/eval/loaded.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace deltapipe {
namespace {

using testing::tiny_student;
using testing::tiny_teacher;

constexpr std::int64_t length = 29;

/// Held-out text of about 1,000 tokens below 23.
class Divergence : public ::testing::Test {
 protected:
  Divergence() {
    testing::write_dataset(folder_ / "text.h5", {"tiny", "none", 23, -1, 22}, testing::random_documents(8, 50, 40, 23));
    data_.emplace(folder_ / "text.h5");
    reader_.emplace(*data_, length, true);
  }

  DivergenceResult evaluate(const ModelSpec& student, const ModelSpec* teacher, bool same_weights, std::int64_t tokens,
                            std::int64_t loss_block = 7) {
    DivergenceResult result;
    testing::with_tiny_models(
        student, teacher, DType::f64,
        [&](ModelSet& models) {
          testing::randomize(models.student_parameters(), 1, "a ");
          if (teacher != nullptr) testing::randomize(*models.teacher_parameters(), 1, same_weights ? "a " : "b ");
        },
        [&](const Context& c, ModelSet& models, ArenaSet& arenas) {
          const Distiller distiller(models.student(), models.teacher(), loss_block, false);
          DivergenceEvaluation evaluation(length, arenas.batch, arenas.batch);
          Mesh alone;
          const pipeline::Stages stages(alone[Axis::pipeline], {distiller});
          result = evaluation.run(c, stages, alone, &*reader_, tokens, arenas.activations);
        });
    return result;
  }

  struct ByHand {
    double tokens = 0, student_ce = 0, teacher_ce = 0, kl = 0, agree = 0, student_right = 0, teacher_right = 0;
  };
  /// The first `windows` windows, from the logits of both models.
  ByHand by_hand(const ModelSpec& student, const ModelSpec& teacher, std::int64_t windows) {
    ByHand sum;
    testing::with_tiny_models(
        student, &teacher, DType::f64,
        [&](ModelSet& models) {
          testing::randomize(models.student_parameters(), 1, "a ");
          testing::randomize(*models.teacher_parameters(), 1, "b ");
        },
        [&](const Context& c, ModelSet& models, ArenaSet& arenas) {
          HostBatch batch(arenas.batch, arenas.batch, 1, length);
          for (std::int64_t w = 0; w < (c.stream.is_dry() ? 1 : windows); ++w) {
            if (!c.stream.is_dry()) reader_->fill(static_cast<std::uint64_t>(w), batch.spans(0));
            const auto log_p = log_softmax(c, models.student(), batch.microbatch(0, 1));
            const auto log_t = log_softmax(c, *models.teacher(), batch.microbatch(0, 1));
            if (!c.stream.is_dry()) add(sum, batch.spans(0), log_p, log_t);
          }
        });
    return sum;
  }

 private:
  using Rows = std::vector<std::vector<double>>;

  static Rows log_softmax(const Context& c, const Transformer& model, const TokenBatch& batch) {
    Rows rows;
    for_each_logits(c, model, batch, 5, [&](std::int64_t, const Tensor& logits) {
      if (c.stream.is_dry()) return;
      const std::int64_t n = logits.dim(1);
      for (std::int64_t r = 0; r < logits.dim(0); ++r) {
        const double* z = logits.as<double>() + r * n;
        double sum = 0;
        for (std::int64_t i = 0; i < n; ++i) sum += std::exp(z[i]);
        auto& row = rows.emplace_back();
        for (std::int64_t i = 0; i < n; ++i) row.push_back(z[i] - std::log(sum));
      }
    });
    return rows;
  }

  static void add(ByHand& sum, const SequenceSpans& spans, const Rows& student, const Rows& teacher) {
    const auto best = [](const std::vector<double>& row) {
      return std::max_element(row.begin(), row.end()) - row.begin();
    };
    for (std::size_t t = 0; t < spans.labels.size(); ++t) {
      const std::int32_t label = spans.labels[t];
      if (label == masked_label) continue;
      const auto& s = student[t];
      const auto& p = teacher[t];
      sum.tokens += 1;
      sum.student_ce -= s[static_cast<std::size_t>(label)];
      sum.teacher_ce -= p[static_cast<std::size_t>(label)];
      for (std::size_t i = 0; i < s.size(); ++i) sum.kl += std::exp(p[i]) * (p[i] - s[i]);
      sum.agree += best(s) == best(p);
      sum.student_right += best(s) == label;
      sum.teacher_right += best(p) == label;
    }
  }

  testing::TemporaryFolder folder_;
  std::optional<TokenDataset> data_;

 protected:
  std::optional<WindowReader> reader_;
};

TEST_F(Divergence, IsTheDefinitionOverUnmaskedTokens) {
  const ModelSpec teacher = tiny_teacher();
  const ModelSpec student = tiny_student(teacher, {"kda", "kda", "kda", "nope"});
  const std::int64_t windows = 11;
  const ByHand wanted = by_hand(student, teacher, windows);
  ASSERT_LT(wanted.tokens, static_cast<double>(windows * length)) << "nothing is masked: a weak test";
  // Up to the whole windows that fit; sums of a few hundred doubles.
  const DivergenceResult r = evaluate(student, &teacher, false, windows * length + length - 1);
  EXPECT_EQ(r.tokens, wanted.tokens);
  EXPECT_NEAR(std::log(r.student_perplexity), wanted.student_ce / wanted.tokens, 1e-12);
  ASSERT_TRUE(r.teacher);
  EXPECT_NEAR(std::log(r.teacher->teacher_perplexity), wanted.teacher_ce / wanted.tokens, 1e-12);
  EXPECT_NEAR(r.teacher->kl, wanted.kl / wanted.tokens, 1e-12);
  EXPECT_GT(r.teacher->kl, 0.01) << "two different models";
  EXPECT_DOUBLE_EQ(r.teacher->top1_agreement, wanted.agree / wanted.tokens);
  EXPECT_DOUBLE_EQ(r.student_accuracy, wanted.student_right / wanted.tokens);
  EXPECT_DOUBLE_EQ(r.teacher->teacher_accuracy, wanted.teacher_right / wanted.tokens);
}

TEST_F(Divergence, OfAModelFromItselfIsZero) {
  const ModelSpec teacher = tiny_teacher();
  ModelSpec student = tiny_student(teacher, {"rope"});
  const DivergenceResult r = evaluate(student, &teacher, true, 10'000);
  ASSERT_TRUE(r.teacher);
  EXPECT_EQ(r.teacher->kl, 0.0);
  EXPECT_EQ(r.teacher->top1_agreement, 1.0);
  EXPECT_EQ(r.teacher->teacher_perplexity, r.student_perplexity);
  EXPECT_EQ(r.teacher->teacher_accuracy, r.student_accuracy);
}

TEST_F(Divergence, ReadsAtMostTheTokensAskedForAndAtLeastOneWindow) {
  const ModelSpec student = tiny_teacher();
  const double one = evaluate(student, nullptr, false, 1).tokens;
  EXPECT_GT(one, 0);
  EXPECT_LE(one, static_cast<double>(length));
  EXPECT_EQ(evaluate(student, nullptr, false, 2 * length - 1).tokens, one);
  EXPECT_GT(evaluate(student, nullptr, false, 2 * length).tokens, one);
  const double all = evaluate(student, nullptr, false, 1'000'000).tokens;
  EXPECT_LE(all, static_cast<double>(static_cast<std::int64_t>(reader_->windows()) * length));
  EXPECT_GT(all, static_cast<double>(static_cast<std::int64_t>(reader_->windows() - 1) * length) * 0.5);
}

TEST_F(Divergence, WithoutATeacherSaysNothingAboutOne) {
  const ModelSpec student = tiny_teacher();
  const DivergenceResult r = evaluate(student, nullptr, false, 100);
  EXPECT_FALSE(r.teacher);
  for (const std::string& text : {r.line(), r.table(), r.json()}) {
    EXPECT_EQ(text.find("teacher"), std::string::npos) << text;
    EXPECT_NE(text.find("perplexity"), std::string::npos) << text;
  }
}

}  // namespace
}  // namespace deltapipe
