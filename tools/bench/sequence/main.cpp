// A KDA layer's and an attention layer's mixer of AFM-4.5B's student, forward and backward, with one sequence over all
// ranks: what sequence parallelism costs by itself. Under mpirun, a rank a GPU; one rank is what the others are held
// against.
#include "comm/mesh.h"
#include "comm/sequence_parallel.h"
#include "core/device_memory.h"
#include "data/host_batch.h"
#include "distill/model_set.h"
#include "kernels/settings.h"
#include "model/attention.h"
#include "model/kda_mixer.h"
#include "tools/bench/report.h"
#include "tools/bench/step/random_weights.h"
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
  std::vector<std::string> layouts{"zigzag"};
  std::string out, commit = DELTAPIPE_COMMIT;
  int repetitions = 10;
  double seconds = 2;
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
      Device device)
      : spec_(spec),
        layer_(layer),
        make_(make),
        tokens_(tokens),
        mesh_(mesh),
        layout_(layout, mesh.shape().sequence),
        sizes_(ArenaSet::measuring(device)) {
    if (mesh.shape().sequence > 1) sequence_.emplace(mesh[Axis::sequence], layout);
    build(sizes_, Stream::dry(device));
    run();
    parts_.reset();
  }

  /// What reserve() takes of the device.
  std::size_t bytes() const { return sizes_.peak_bytes(); }
  void reserve(const Stream& stream) {
    arenas_.emplace(sizes_.reserve());
    build(*arenas_, stream);
  }
  /// Forward and backward; after reserve().
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
      fill_randomly(parameters, stream);
      parameters.zero_gradients(stream);
      // One document; inputs of the size that a norm leaves.
      const SequenceSpans spans = batch.spans(0);
      std::iota(spans.positions.begin(), spans.positions.end(), 0);
      for (const auto& s : {spans.tokens, spans.labels, spans.start}) std::fill(s.begin(), s.end(), 0);
      batch.cut(stream);
      const RandomBlock block(DType::bf16, 1, stream);
      block.fill(h, "layer input");
      synchronize(stream);
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
  ArenaSet sizes_;
  std::optional<ArenaSet> arenas_;
  std::optional<Parts> parts_;
};

struct Row {
  std::string layer, layout;
  std::int64_t tokens;
  std::size_t bytes;
  int repetitions;  // 0: did not fit
  double ms;        // median; a repetition takes as long as its slowest rank
};

/// Of all ranks.
double largest(MpiRuntime& runtime, double own) {
  if (runtime.size() == 1) return own;
  std::vector<double> all(static_cast<std::size_t>(runtime.size()));
  runtime.world().all_gather(Stream::cpu(), Tensor(&own, DType::f64, {1}),
                             Tensor(all.data(), DType::f64, {runtime.size()}), Purpose::control);
  return *std::max_element(all.begin(), all.end());
}

/// Milliseconds of repetitions after warming up: `o.repetitions`, or as many as `o.seconds` hold, one at least.
template <class F>
std::vector<double> times_of(const F& run, const Options& o, MpiRuntime& runtime, const Stream& stream) {
  const auto once = [&] {
    synchronize(stream);
    runtime.world().barrier(Stream::cpu());
    const auto begin = std::chrono::steady_clock::now();
    run();
    synchronize(stream);
    return largest(runtime,
                   std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count());
  };
  once();  // plans and algorithms are made in the first call
  const double warm_ms = once(), limit_ms = 1e3 * o.seconds;
  if (2 * warm_ms > limit_ms) return {warm_ms};
  std::vector<double> times;
  double sum = 0;
  for (int i = 0; i < o.repetitions && sum + warm_ms < limit_ms; ++i) {
    times.push_back(once());
    sum += times.back();
  }
  return times;
}

double median(std::vector<double> times) {
  std::nth_element(times.begin(), times.begin() + std::ssize(times) / 2, times.end());
  return times[times.size() / 2];
}

class Bench {
 public:
  Bench(const Options& o, MpiRuntime& runtime, Device device)
      : o_(o), runtime_(runtime), device_(device), stream_(device), mesh_(runtime, {1, 1, runtime.size()}, device) {}

  template <class Layer>
  void measure(const char* name, std::int64_t layer, typename Job<Layer>::Make make, std::int64_t tokens,
               LayoutKind layout) {
    Job<Layer> job(spec_, layer, make, tokens, mesh_, layout, device_);
    rows_.push_back({name, std::string(name_of(layout)), tokens, job.bytes(), 0, 0});
    Row& row = rows_.back();
    constexpr double beside = 2.0 * (1 << 30);  // for libraries and messages' buffers
    const bool is_too_much = static_cast<double>(job.bytes()) + beside > free_bytes();
    const bool fits = largest(runtime_, is_too_much ? 1 : 0) == 0;  // alike on all ranks
    if (fits) {
      job.reserve(stream_.get());
      const std::vector<double> times = times_of([&] { job.run(); }, o_, runtime_, stream_.get());
      row.repetitions = static_cast<int>(times.size());
      row.ms = median(times);
    }
    if (runtime_.rank() != 0) return;
    const std::string what = row.repetitions > 0 ? fmt::format("{:9.3f} ms, median of {}", row.ms, row.repetitions)
                                                 : fmt::format("skipped: needs {:.1f} GiB a rank",
                                                               static_cast<double>(row.bytes) / (1 << 30));
    fmt::print("{:<10} {:7} tokens over {} rank(s), {}: {}\n", name, tokens, runtime_.size(), row.layout, what);
    std::fflush(stdout);
  }

  const std::vector<Row>& rows() const { return rows_; }

 private:
  double free_bytes() const {
    return static_cast<double>(memory_size(device_)) - static_cast<double>(memory_in_use(device_));
  }

  const Options& o_;
  MpiRuntime& runtime_;
  Device device_;
  StreamOwner stream_;
  Mesh mesh_;
  ModelSpec spec_ = layers_of_afm();
  std::vector<Row> rows_;
};

void run(const Options& o, int argc, char** argv) {
  MpiRuntime runtime;
  kernels::settings().deterministic = false;
  Config config;
  config.run.device = DeviceChoice::cuda;
  const Device device = choose_device(config, runtime);
  Bench bench(o, runtime, device);
  for (const std::int64_t tokens : o.tokens) {
    for (const std::string& wanted : o.layouts) {
      const bool alone = runtime.size() == 1;  // has the whole sequence
      if (alone && &wanted != &o.layouts.front()) continue;
      const LayoutKind layout = wanted == "zigzag" && !alone ? LayoutKind::zigzag : LayoutKind::contiguous;
      bench.measure<KdaMixer>(
          "kda", 0, [](const ModelSpec& s, ParameterTable& p) { return KdaMixer(s, p, kda_prefix); }, tokens, layout);
      bench.measure<Attention>(
          "attention", 1,
          [](const ModelSpec& s, ParameterTable& p) { return Attention(s, p, attention_prefix, nullptr); }, tokens,
          layout);
    }
  }
  if (runtime.rank() != 0 || o.out.empty()) return;
  nlohmann::ordered_json json = begin_report("sequence", describe_device(device), o.commit, argc, argv);
  json["rows"] = nlohmann::ordered_json::array();
  for (const Row& r : bench.rows()) {
    nlohmann::ordered_json row{{"layer", r.layer},   {"tokens", r.tokens},       {"ranks", runtime.size()},
                               {"layout", r.layout}, {"planned_bytes", r.bytes}, {"repetitions", r.repetitions}};
    if (r.repetitions > 0) row["ms"] = r.ms;
    json["rows"].push_back(row);
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
  app.add_option("--layout", o.layouts, "zigzag, contiguous or both")->check(CLI::IsMember({"zigzag", "contiguous"}));
  app.add_option("--repetitions", o.repetitions, "of which the median counts")->check(CLI::PositiveNumber);
  app.add_option("--seconds", o.seconds, "of a row at most, beside two runs to warm up")->check(CLI::PositiveNumber);
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
