// Forward and backward of small students through every adaptor, in arenas of the sizes that a dry run found.
#include "data/host_batch.h"
#include "distill/distiller.h"
#include "distill/model_set.h"
#include "distill/student_init.h"
#include "kernels/elementwise.h"
#include "kernels/settings.h"
#include "tests/gpu/stand_in/testing.h"
#include "tests/gpu/testing.h"

#include <memory>
#include <ostream>
#include <string>
#include <vector>

namespace deltapipe {
namespace {

using testing::gpu;

/// The smallest sizes that CUDA's KDA and attention take.
ModelSpec small_teacher() {
  ModelSpec s;
  s.model_type = "arcee";
  s.vocabulary = 258;
  s.hidden = 128;
  s.intermediate = 192;
  s.heads = 2;
  s.kv_heads = 1;
  s.head_dim = 64;
  s.max_positions = 256;
  s.mlp = Mlp::squared_relu;
  s.rope = {.theta = 10000.0, .factor = 20.0, .original_max_positions = 64};
  s.mixers.assign(3, Mixer::rope);
  return s;
}

Objective distillation(const ModelSpec& student) {
  Objective o;
  o.head.ce = 0.2f;
  o.head.kl = 0.3f;
  o.head.reverse_kl = 0.1f;
  o.head.jsd = 0.1f;
  o.head.tvd = 0.1f;
  o.hidden_cosine = 0.5;
  o.hidden_mse = 0.1;
  for (std::int64_t l = 0; l < student.layers(); ++l) o.hidden_layers.emplace_back(l, l);
  return o;
}

Objective alignment() {
  Objective o;
  o.mixer_mse = 1.0;
  return o;
}

struct Case {
  const char* name;
  bool aligns = false, recompute = false, deterministic = false;
  double gate_lower_bound = 0;
  std::vector<std::int32_t> documents = {0};  // first tokens, in each sequence
  friend void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }
};

class Job {
 public:
  explicit Job(const Case& c) : case_(c), teacher_(small_teacher()) {
    StudentConfig config;
    config.mixers = {"kda", "nope", "rope"};
    config.kda.gate_lower_bound = c.gate_lower_bound;
    student_ = make_student_spec(config, &teacher_, 0);
    const Stream dry = Stream::dry(gpu());
    build(dry);
    run(dry);
    batch_.reset();
    models_.reset();
    arenas_ = arenas_.reserve();
    build(stream_.get());
    fill_batch();
  }

  void run(const Stream& stream) {
    const Objective o = case_.aligns ? alignment() : distillation(student_);
    const Distiller distiller(models_->student(), models_->teacher(), 48, case_.recompute);
    const Context c{stream, arenas_.workspace, nullptr, nullptr};
    models_->student_parameters().zero_gradients(stream);
    kernels::fill_zero(stream, sums_.values);
    const TokenBatch batch = batch_->microbatch(0, sequences);
    if (case_.aligns) {
      distiller.align_through(c, o, 1.0, sums_, batch, arenas_.activations);
      return;
    }
    const auto scope = arenas_.activations.scope();
    TeacherState teacher;
    StudentState student;
    distiller.begin_teacher(batch, o, teacher, arenas_.activations);
    distiller.forward_teacher(c, teacher);
    distiller.begin_student(batch, student, arenas_.activations, true);
    distiller.forward_student(c, student, arenas_.activations, true);
    distiller.finish_forward(c, o, 1.0, sums_, &teacher, student);
    distiller.backward_student(c, o, 1.0, sums_, &teacher, student);
  }
  void run() {
    run(stream_.get());
    synchronize(stream_.get());
  }
  const ArenaSet& arenas() const { return arenas_; }

 private:
  static constexpr std::int64_t sequences = 2, length = 100;

  void build(const Stream& stream) {
    models_ = std::make_unique<ModelSet>(student_, &teacher_, DType::bf16, arenas_, stream);
    ParameterTable& parameters = models_->student_parameters();
    parameters.allocate_gradients(arenas_.gradients, [](const ParameterSpec&) { return true; });
    for (Parameter& p : parameters.all()) p.trainable = true;
    batch_ = std::make_unique<HostBatch>(arenas_.staging(), arenas_.batch, sequences, length);
    sums_.values = arenas_.batch.allocate(DType::f64, {LossSums::count}, "sums");
  }

  void fill_batch() {
    for (std::int64_t s = 0; s < sequences; ++s) {
      const SequenceSpans out = batch_->spans(s);
      std::int32_t start = 0;
      for (std::int32_t i = 0; i < length; ++i) {
        const auto k = static_cast<std::size_t>(i);
        for (const std::int32_t begin : case_.documents) start = begin <= i ? begin : start;
        out.tokens[k] = out.labels[k] = (7 * i + static_cast<std::int32_t>(s)) % 258;
        out.start[k] = start;
        out.positions[k] = i - start;
      }
    }
    batch_->cut(stream_.get());
  }

  Case case_;
  ModelSpec teacher_, student_;
  StreamOwner stream_{gpu()};
  ArenaSet arenas_ = ArenaSet::measuring(gpu());
  std::unique_ptr<ModelSet> models_;
  std::unique_ptr<HostBatch> batch_;
  LossSums sums_;
};

class Students : public testing::StandIn, public ::testing::WithParamInterface<Case> {
 protected:
  void SetUp() override {
    StandIn::SetUp();
    if (!IsSkipped()) set_device(gpu());
  }
  void TearDown() override { kernels::settings() = before_; }

 private:
  const std::remove_reference_t<decltype(kernels::settings())> before_ = kernels::settings();
};

TEST_P(Students, RunThroughEveryAdaptor) {
  kernels::settings().deterministic = GetParam().deterministic;
  Job job(GetParam());
  job.run();
  job.run();
  for (const Arena* arena : job.arenas().all()) EXPECT_LE(arena->peak(), arena->capacity()) << arena->name();
}

INSTANTIATE_TEST_SUITE_P(
    Cases, Students,
    ::testing::Values(Case{.name = "distillation"}, Case{.name = "alignment", .aligns = true},
                      Case{.name = "documents", .documents = {0, 1, 37, 64}},
                      Case{.name = "aligned_documents", .aligns = true, .documents = {0, 50}},
                      Case{.name = "recompute", .recompute = true},
                      Case{.name = "deterministic", .deterministic = true},
                      Case{.name = "deterministic_documents", .deterministic = true, .documents = {0, 3, 70}},
                      Case{.name = "bounded_gate", .gate_lower_bound = -5.0}),
    [](const auto& test) { return std::string(test.param.name); });

}  // namespace
}  // namespace deltapipe
