// A KDA layer's and an attention layer's mixer of AFM-4.5B's student, forward and backward, with one sequence over all
// ranks: what sequence parallelism costs by itself. Under mpirun, a rank a GPU; one rank is what the others are held
// against.
#include "comm/mesh.h"
#include "comm/sequence_parallel.h"
#include "core/device_memory.h"
#include "data/host_batch.h"
#include "distill/model_set.h"
#include "distill/student_init.h"
#include "kernels/settings.h"
#include "model/attention.h"
#include "model/kda_mixer.h"
#include "tools/bench/report.h"
#include "train/run.h"

#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

namespace deltapipe::bench {
namespace {

struct Options {
  std::vector<std::int64_t> tokens{32768, 131072, 524288};
  std::string layout = "zigzag", out, commit = DELTAPIPE_COMMIT;
  int repetitions = 10;
};

ModelSpec layers_of_afm() {
  ModelSpec s;
  s.model_type = "arcee_kda";
  s.vocabulary = 128004;
  s.hidden = 2560;
  s.intermediate = 18432;
  s.heads = 20;
  s.kv_heads = 4;
  s.head_dim = 128;
  s.max_positions = 65536;
  s.kda.heads = 20;
  s.kda.head_dim = 128;
  s.kda.conv_width = 4;
  s.kda.gate_rank = 128;
  s.mixers = {Mixer::kda, Mixer::nope};
  return s;
}

constexpr const char* kda_prefix = "model.layers.0.self_attn.";
constexpr const char* attention_prefix = "model.layers.1.self_attn.";

/// A mixer with its weights, gradients, one sequence and all that its two passes need; sizes found by a dry run.
template <class Layer>
class Job {
 public:
  using Make = Layer (*)(const ModelSpec&, ParameterTable&);

  Job(const ModelSpec& spec, std::int64_t layer, Make make, std::int64_t tokens, Mesh& mesh, LayoutKind layout,
      const StreamOwner& stream, Device device)
      : spec_(spec), layer_(layer), make_(make), tokens_(tokens), mesh_(mesh), layout_(layout, mesh.shape().sequence) {
    if (mesh.shape().sequence > 1) sequence_.emplace(mesh[Axis::sequence], layout);
    ArenaSet measured = ArenaSet::measuring(device);
    build(measured, Stream::dry(device));
    run();
    parts_.reset();
    arenas_.emplace(measured.reserve());
    build(*arenas_, stream.get());
  }

  void run() { parts_->run(); }

 private:
  struct Parts {
    Parts(const Job& job, ArenaSet& arenas, const Stream& stream)
        : context{stream, arenas.workspace, job.sequence_ ? &*job.sequence_ : nullptr, nullptr},
          parameters(layer_parameters_of(job.spec_, job.layer_), DType::bf16, arenas.student),
          layer(prepare(job, arenas)),
          batch(arenas.staging(), arenas.batch, 1, job.tokens_, job.layout_, job.mesh_.coordinate().sequence),
          local(batch.microbatch(0, 1)),
          h(arenas.activations.allocate(DType::bf16, {local.size(), job.spec_.hidden}, "layer input")),
          out(arenas.activations.allocate(DType::bf16, h.shape, "layer output")),
          dh(arenas.activations.allocate(DType::bf16, h.shape, "layer input's gradient")),
          keep(arenas.activations) {
      if (stream.is_dry()) return;
      for (Parameter& p : parameters.all()) init_freshly(p, StudentConfig(), 1, stream);
      parameters.zero_gradients(stream);
      // One document; inputs of the size that a norm leaves.
      const SequenceSpans spans = batch.spans(0);
      std::iota(spans.positions.begin(), spans.positions.end(), 0);
      for (const auto& s : {spans.tokens, spans.labels, spans.start}) std::fill(s.begin(), s.end(), 0);
      batch.cut(stream);
      Parameter input;
      input.spec = {"input", h.shape, 0};
      input.value = h;
      StudentConfig config;
      config.model.init_std = 1;
      init_freshly(input, config, 2, stream);
    }
    Layer prepare(const Job& job, ArenaSet& arenas) {
      parameters.allocate_gradients(arenas.gradients, [](const ParameterSpec&) { return true; });
      for (Parameter& p : parameters.all()) p.trainable = true;
      return job.make_(job.spec_, parameters);
    }
    void run() {
      const auto scope = keep.scope();
      typename Layer::Saved saved;
      layer.forward(context, local, h, out, saved, keep);
      layer.backward(context, local, out, h, saved, dh);
    }

    Context context;
    ParameterTable parameters;
    Layer layer;
    HostBatch batch;
    TokenBatch local;
    Tensor h, out, dh;
    Arena& keep;
  };

  void build(ArenaSet& arenas, const Stream& stream) { parts_.emplace(*this, arenas, stream); }

  ModelSpec spec_;
  std::int64_t layer_;
  Make make_;
  std::int64_t tokens_;
  Mesh& mesh_;
  SequenceLayout layout_;
  std::optional<SequenceParallel> sequence_;
  std::optional<ArenaSet> arenas_;
  std::optional<Parts> parts_;
};

struct Row {
  std::string layer;
  std::int64_t tokens;
  double ms;  // median; a repetition takes as long as its slowest rank
};

template <class F>
double median_ms(const F& run, int repetitions, MpiRuntime& runtime, const Stream& stream) {
  constexpr int warm_up = 3;
  std::vector<double> times;
  for (int i = 0; i < warm_up + repetitions; ++i) {
    synchronize(stream);
    runtime.world().barrier(Stream::cpu());
    const auto begin = std::chrono::steady_clock::now();
    run();
    synchronize(stream);
    const double own = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
    std::vector<double> all(static_cast<std::size_t>(runtime.size()), own);
    if (runtime.size() > 1) {
      double mine = own;
      runtime.world().all_gather(Stream::cpu(), Tensor(&mine, DType::f64, {1}),
                                 Tensor(all.data(), DType::f64, {runtime.size()}), Purpose::control);
    }
    if (i >= warm_up) times.push_back(*std::max_element(all.begin(), all.end()));
  }
  std::nth_element(times.begin(), times.begin() + std::ssize(times) / 2, times.end());
  return times[times.size() / 2];
}

void run(const Options& o, int argc, char** argv) {
  MpiRuntime runtime;
  kernels::settings().deterministic = false;
  Config config;
  config.run.device = DeviceChoice::cuda;
  const Device device = choose_device(config, runtime);
  const StreamOwner stream(device);
  const MeshShape shape{1, 1, runtime.size()};
  Mesh mesh(runtime, shape, device);
  const LayoutKind layout = runtime.size() > 1 && o.layout == "zigzag" ? LayoutKind::zigzag : LayoutKind::contiguous;
  const ModelSpec spec = layers_of_afm();
  std::vector<Row> rows;
  const auto tell = [&](const char* layer, std::int64_t tokens, double ms) {
    rows.push_back({layer, tokens, ms});
    if (runtime.rank() != 0) return;
    std::printf("%-10s %7lld tokens over %d rank(s), %s: %9.3f ms\n", layer, static_cast<long long>(tokens),
                runtime.size(), std::string(name_of(layout)).c_str(), ms);
    std::fflush(stdout);
  };
  for (const std::int64_t tokens : o.tokens) {
    {
      Job<KdaMixer> job(
          spec, 0, [](const ModelSpec& s, ParameterTable& p) { return KdaMixer(s, p, kda_prefix); }, tokens, mesh,
          layout, stream, device);
      tell("kda", tokens, median_ms([&] { job.run(); }, o.repetitions, runtime, stream.get()));
    }
    {
      Job<Attention> job(
          spec, 1, [](const ModelSpec& s, ParameterTable& p) { return Attention(s, p, attention_prefix, nullptr); },
          tokens, mesh, layout, stream, device);
      tell("attention", tokens, median_ms([&] { job.run(); }, o.repetitions, runtime, stream.get()));
    }
  }
  if (runtime.rank() != 0 || o.out.empty()) return;
  nlohmann::ordered_json json = begin_report("sequence", describe_device(device), o.commit, argc, argv);
  json["rows"] = nlohmann::ordered_json::array();
  for (const Row& r : rows) {
    json["rows"].push_back({{"layer", r.layer},
                            {"tokens", r.tokens},
                            {"ranks", runtime.size()},
                            {"layout", std::string(name_of(layout))},
                            {"ms", r.ms}});
  }
  write_report(o.out, json);
}

}  // namespace
}  // namespace deltapipe::bench

int main(int argc, char** argv) {
  using namespace deltapipe;
  bench::Options o;
  CLI::App app("Times a KDA and an attention mixer, forward and backward, with a sequence over all ranks.");
  app.add_option("--tokens", o.tokens, "lengths of the sequence")->check(CLI::PositiveNumber);
  app.add_option("--layout", o.layout, "zigzag or contiguous")->check(CLI::IsMember({"zigzag", "contiguous"}));
  app.add_option("--repetitions", o.repetitions, "of which the median counts")->check(CLI::PositiveNumber);
  app.add_option("--out", o.out, "JSON file to write");
  app.add_option("--commit", o.commit, "commit to name in the JSON file");
  CLI11_PARSE(app, argc, argv);
  try {
    bench::run(o, argc, argv);
    return 0;
  } catch (const Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    MpiRuntime::abort_all(error.exit_code());
  }
}
