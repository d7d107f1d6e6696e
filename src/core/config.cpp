#include "core/config.h"

#include "core/config_toml.h"
#include "core/error.h"
#include "core/file.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <regex>
#include <string>
#include <utility>

namespace deltapipe {
namespace {

// Largest counts. Two sizes multiply to 2^60 at most; the tokens of a stage are checked to stay within that too.
constexpr std::int64_t most_tokens = std::int64_t{1} << 60;
constexpr std::int64_t most_size = std::int64_t{1} << 30;

constexpr Integers any_ranks{0, 1 << 20};
constexpr Integers any_size{0, most_size};
constexpr Integers positive_size{1, most_size};
constexpr Integers any_count{0, most_tokens};
constexpr Integers positive_count{1, most_tokens};
constexpr Reals non_negative{};
constexpr Reals positive{.without_least = true};
constexpr Reals fraction{0.0, 1.0};
constexpr Reals below_one{.most = 1.0, .without_most = true};

constexpr Strings any_string{};
constexpr Strings non_empty_string{"a string that is not empty",
                                   [](const std::string& s) -> std::string { return s.empty() ? "empty" : ""; }};

bool is_name(std::string_view s, std::string_view punctuation) {
  return !s.empty() && std::all_of(s.begin(), s.end(), [&](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
           punctuation.find(c) != std::string_view::npos;
  });
}

constexpr Strings run_name{
    "a folder's name of letters, digits, '_', '-' and '.', not '.' first",
    [](const std::string& s) -> std::string { return is_name(s, "_-.") && s[0] != '.' ? "" : "not such a name"; }};
constexpr Strings stage_name{"a name of letters, digits, '_' and '-'", [](const std::string& s) -> std::string {
                               return is_name(s, "_-") ? "" : "not such a name";
                             }};
constexpr Strings mixer_word{"\"kda\", \"nope\", \"rope\"", [](const std::string& s) -> std::string {
                               return s == "kda" || s == "nope" || s == "rope" ? "" : "unknown mixer";
                             }};

std::string regex_problem(const std::string& pattern) {
  constexpr std::size_t longest = 1000;  // std::regex compiles groups by recursion
  if (pattern.empty()) return "empty, it would match every name";
  if (pattern.size() > longest) return fmt::format("{} bytes, more than {}", pattern.size(), longest);
  try {
    const std::regex compiled(pattern, std::regex::ECMAScript);
    return "";
  } catch (const std::regex_error& e) {
    return e.what();
  }
}
constexpr Strings regular_expression{"an ECMAScript regular expression that is not empty", regex_problem};

template <Choice E>
void choice(SchemaVisitor& v, const Key& key, E& value) {
  auto index = static_cast<std::size_t>(value);
  v.word(key, index, words_of<E>);
  value = static_cast<E>(index);
}

void layer_pairs(SchemaVisitor& v, const Key& key, std::vector<LayerPair>& pairs) {
  std::vector<SchemaVisitor::IntegerPair> plain;
  for (const LayerPair& p : pairs) plain.push_back({p.student, p.teacher});
  v.array(key, plain, any_size, 0);
  pairs.clear();
  for (const auto& [student, teacher] : plain) pairs.push_back({student, teacher});
}

// The schema: every key once, with its description and what it accepts.

void show(SchemaVisitor& v, RunConfig& c) {
  v.value({"name", "Name of the run."}, c.name, run_name);
  v.value({"dir", "Folder of the run's files; empty: runs/<name>."}, c.dir, any_string);
  v.value({"seed", "Seed of initial weights, data order and stochastic rounding."}, c.seed, Integers{});
  choice(v, {"device", "Where to compute: cpu or cuda."}, c.device);
  choice(v, {"dtype", "auto (float32 on cpu, bfloat16 on cuda), float32, float64 or bfloat16."}, c.dtype);
  v.value({"threads", "Host threads of a process; 0: every core it may run on."}, c.threads, Integers{0, 65536});
  v.value({"deterministic", "Same mesh, same seed: bitwise the same run."}, c.deterministic);
  choice(v, {"log_level", "Console lines from this level on: debug, info, warn or error."}, c.log_level);
}

void show(SchemaVisitor& v, MeshConfig& c) {
  v.value({"data", "Ranks that take different sequences of a batch; 0: the ranks that the others leave."}, c.data,
          any_ranks);
  v.value({"pipeline", "Ranks that the layers are cut over; 0: the ranks that the others leave."}, c.pipeline,
          any_ranks);
  v.value({"sequence", "Ranks that every sequence is cut over; 0: the ranks that the others leave."}, c.sequence,
          any_ranks);
  choice(v, {"layout", "Cut of a sequence: zigzag (even cost of causal attention) or contiguous."}, c.layout);
  v.value({"timeout_s", "Seconds without an answer from another rank that end the job."}, c.timeout_s, positive);
}

void show(SchemaVisitor& v, PipelineConfig& c) {
  choice(v, {"schedule", "Order of forward and backward passes: 1f1b, interleaved or zero_bubble."}, c.schedule);
  v.value({"chunks", "Model chunks a rank; over 1 with interleaved alone."}, c.chunks, Integers{1, 1024});
  choice(v, {"teacher", "When the teacher runs: inline (right before the student) or ahead (in the bubbles)."},
         c.teacher);
  v.value({"kept_teacher", "Microbatches that ahead may keep the teacher's hidden states of; 0: as many as it takes."},
          c.kept_teacher, any_size);
  v.value(
      {"put_off_layers",
       "Layers of a stage whose weights' gradients zero_bubble puts off: fewer take less memory, and fill less of the "
       "bubbles; 0: all."},
      c.put_off_layers, any_size);
  v.array({"layers", "Layers of each stage (of each chunk, with interleaved), in order; empty: cut by cost."}, c.layers,
          positive_size, 0);
}

void show(SchemaVisitor& v, TeacherConfig& c) {
  v.value({"path", "Hugging Face folder of the teacher; empty: no teacher, and only the ce loss."}, c.path, any_string);
}

void show(SchemaVisitor& v, KdaConfig& c) {
  v.value({"heads", "Heads; 0: the teacher's query heads."}, c.heads, any_size);
  v.value({"head_dim", "Channels of a head, for keys and values alike; 0: the teacher's."}, c.head_dim, any_size);
  v.value({"conv_width", "Taps of the causal convolutions on q, k and v."}, c.conv_width, positive_size);
  v.value({"gate_rank", "Inner width of the two low-rank gates; 0: head_dim."}, c.gate_rank, any_size);
  v.value({"gate_lower_bound", "Lower bound of the log decay, in [-5, 0); 0: the standard gate, without a bound."},
          c.gate_lower_bound, Reals{-5.0, 0.0});
  choice(v, {"conv_init", "identity (pass the newest token through) or normal (random)."}, c.conv_init);
}

void show(SchemaVisitor& v, AttentionConfig& c) {
  v.value({"kv_heads",
           "Key/value heads; 0: the teacher's. Otherwise the teacher's are repeated: a multiple of them that divides "
           "the query heads."},
          c.kv_heads, any_size);
}

void show(SchemaVisitor& v, StudentModelConfig& c) {
  choice(v, {"type", "arcee, llama or arcee_kda."}, c.type);
  v.value({"vocabulary", "Size of the vocabulary; 0: the training data's."}, c.vocabulary, any_size);
  v.value({"hidden", "Width of the hidden state."}, c.hidden, any_size);
  v.value({"layers", "Number of layers."}, c.layers, any_size);
  v.value({"intermediate", "Inner width of the MLP."}, c.intermediate, any_size);
  v.value({"heads", "Query heads."}, c.heads, any_size);
  v.value({"kv_heads", "Key/value heads; they divide the query heads."}, c.kv_heads, any_size);
  v.value({"head_dim", "Channels of a head."}, c.head_dim, any_size);
  v.value({"max_positions", "Longest sequence that the model is meant for, in tokens."}, c.max_positions, any_size);
  v.value({"norm_eps", "Epsilon of the RMSNorms."}, c.norm_eps, positive);
  v.value({"tied_embeddings", "The output head is the embedding."}, c.tied_embeddings);
  v.value({"init_std", "Standard deviation of random weights."}, c.init_std, positive);
  v.value({"rope_theta", "Base of the rotary frequencies."}, c.rope_theta, positive);
  v.value({"rope_factor", "YaRN context extension; 1: plain rotary positions."}, c.rope_factor, Reals{.least = 1.0});
  v.value({"rope_original_max_positions", "YaRN: positions before the extension."}, c.rope_original_max_positions,
          any_size);
  v.value({"rope_beta_fast", "YaRN: rotations over the original length above which a frequency is kept."},
          c.rope_beta_fast, positive);
  v.value({"rope_beta_slow", "YaRN: rotations below which a frequency is divided by the factor."}, c.rope_beta_slow,
          positive);
}

void show(SchemaVisitor& v, StudentConfig& c) {
  choice(v, {"init", "teacher (derived from it), random (sizes from [student.model]) or folder (from path)."}, c.init);
  v.value({"path", "Hugging Face folder of the student, for init = \"folder\"."}, c.path, any_string);
  v.array({"mixers", "Token mixers, repeated over the layers: kda, nope (attention without positions), rope."},
          c.mixers, mixer_word, 1);
  v.section({"kda", "Kimi Delta Attention layers."}, [&] { show(v, c.kda); });
  v.section({"attention", "Full-attention layers."}, [&] { show(v, c.attention); });
  v.section({"model", "Sizes for init = \"random\"."}, [&] { show(v, c.model); });
}

void show(SchemaVisitor& v, DataConfig& c) {
  v.value({"train", "HDF5 token file to train on."}, c.train, any_string);
  v.value({"validation", "HDF5 token file to evaluate on; empty: none."}, c.validation, any_string);
  v.value({"isolate_documents", "Packed documents do not see each other."}, c.isolate_documents);
}

void show(SchemaVisitor& v, MemoryConfig& c) {
  v.value({"recompute", "Recompute activations in the backward pass instead of keeping them."}, c.recompute);
  v.value({"loss_block_tokens", "Tokens whose logits exist at one time."}, c.loss_block_tokens, positive_size);
  choice(v, {"optimizer", "Where optimizer states live: device or host."}, c.optimizer);
}

void show(SchemaVisitor& v, OptimizerGroupConfig& c) {
  v.value({"pattern", "Regular expression (ECMAScript), searched for in Hugging Face parameter names.", true},
          c.pattern, regular_expression);
  v.value({"learning_rate_factor", "Multiplies the stage's learning rate."}, c.learning_rate_factor, non_negative);
  v.value({"decay", "Weight decay acts on these parameters."}, c.decay);
}

void show(SchemaVisitor& v, OptimizerConfig& c) {
  v.value({"beta1", "AdamW: decay of the first moment."}, c.beta1, below_one);
  v.value({"beta2", "AdamW: decay of the second moment."}, c.beta2, below_one);
  v.value({"epsilon", "AdamW: added to the root of the second moment."}, c.epsilon, positive);
  v.value({"weight_decay", "AdamW: decoupled weight decay."}, c.weight_decay, non_negative);
  v.value({"clip_norm", "Largest global norm of the gradient; 0: not clipped."}, c.clip_norm, non_negative);
  v.value({"max_skipped_steps", "Non-finite steps in a row that stop the run."}, c.max_skipped_steps, positive_count);
  choice(v, {"state", "Master weights and moments: float32, or bfloat16 with stochastic rounding."}, c.state);
  v.list({"group", "Parameters with settings of their own; the first group that matches a name holds it."}, c.groups,
         [&](OptimizerGroupConfig& g) { show(v, g); });
}

void show(SchemaVisitor& v, LossConfig& c) {
  v.value({"ce", "Weight of the cross-entropy with the next token."}, c.ce, non_negative);
  v.value({"kl", "Weight of KL(teacher || student)."}, c.kl, non_negative);
  v.value({"reverse_kl", "Weight of KL(student || teacher)."}, c.reverse_kl, non_negative);
  v.value({"jsd", "Weight of the generalised Jensen-Shannon divergence."}, c.jsd, non_negative);
  v.value({"tvd", "Weight of the total variation distance."}, c.tvd, non_negative);
  v.value({"hidden_cosine", "Weight of the cosine distance of hidden states."}, c.hidden_cosine, non_negative);
  v.value({"hidden_mse", "Weight of the squared error of hidden states."}, c.hidden_mse, non_negative);
  v.value({"mixer_mse", "Weight of the squared error of mixer outputs on the teacher's hidden states; stands alone."},
          c.mixer_mse, non_negative);
  v.value({"jsd_beta", "Share of the teacher in the mixture of jsd."}, c.jsd_beta,
          Reals{.most = 1.0, .without_least = true, .without_most = true});
}

void show(SchemaVisitor& v, StageConfig& c) {
  v.value({"name", "Name of the stage, unique.", true}, c.name, stage_name);
  v.value({"tokens", "Length of the stage in tokens, rounded up to whole steps; 0: given by steps."}, c.tokens,
          any_count);
  v.value({"steps", "Length of the stage in optimizer steps; 0: given by tokens."}, c.steps, any_count);
  v.value({"sequence_length", "Tokens of a sequence.", true}, c.sequence_length, positive_size);
  v.value({"batch_sequences", "Sequences of a step, over all ranks."}, c.batch_sequences, positive_size);
  v.value({"microbatch_sequences", "Sequences of a forward pass; divides batch_sequences."}, c.microbatch_sequences,
          positive_size);
  v.value({"learning_rate", "Largest learning rate, reached after the warm-up.", true}, c.learning_rate, positive);
  v.value({"warmup", "Fraction of the stage's steps in which the learning rate rises from 0."}, c.warmup, fraction);
  choice(v, {"schedule", "Learning rate after the warm-up: cosine, constant or linear."}, c.schedule);
  v.value({"final_learning_rate", "Learning rate at the end of cosine and linear."}, c.final_learning_rate,
          non_negative);
  v.value({"temperature", "Divides the logits of both models in kl, reverse_kl, jsd and tvd."}, c.temperature,
          positive);
  v.array({"frozen", "Regular expressions (ECMAScript), searched for in Hugging Face names: parameters that rest."},
          c.frozen, regular_expression, 0);
  layer_pairs(v,
              {"hidden_layers",
               "Pairs [student layer, teacher layer] of the hidden losses, from 0; empty: every layer with its own."},
              c.hidden_layers);
  v.section({"loss", "Weights of the losses."}, [&] { show(v, c.loss); });
}

void show(SchemaVisitor& v, CheckpointConfig& c) {
  v.value({"every_steps", "Steps between checkpoints; 0: at the end of the run and on signals only."}, c.every_steps,
          any_count);
  v.value({"keep", "Newest checkpoints that are kept."}, c.keep, positive_count);
}

void show(SchemaVisitor& v, NeedleConfig& c) {
  v.array({"lengths", "Text lengths in tokens; empty: no needle evaluation."}, c.lengths, positive_size, 0);
  v.array({"depths", "Places of the needle, as fractions of the text."}, c.depths, fraction, 1);
  v.array({"keys", "Numbers of key-value pairs hidden; one pair is asked for."}, c.keys, positive_size, 1);
  v.value({"key_tokens", "Tokens of a key."}, c.key_tokens, positive_size);
  v.value({"value_tokens", "Tokens of a value."}, c.value_tokens, positive_size);
  v.value({"samples", "Texts of every length, depth and number of keys."}, c.samples, positive_size);
}

void show(SchemaVisitor& v, EvalConfig& c) {
  v.value({"every_steps", "Steps between evaluations; 0: at the end of every stage only."}, c.every_steps, any_count);
  v.value({"tokens", "Validation tokens, at most."}, c.tokens, positive_count);
  v.value({"sequence_length", "Tokens of a sequence; 0: the last stage's."}, c.sequence_length, any_size);
  v.section({"needle", "Retrieval of hidden key-value pairs."}, [&] { show(v, c.needle); });
}

void show(SchemaVisitor& v, LogConfig& c) {
  v.value({"every_steps", "Steps between console lines."}, c.every_steps, positive_count);
}

void show(SchemaVisitor& v, TraceConfig& c) {
  v.array({"steps", "First and last step, from 1, of which trace.json shows tasks and messages; empty: no trace."},
          c.steps, positive_count, 0);
}

void show(SchemaVisitor& v, Config& c) {
  v.section({"run", "The run."}, [&] { show(v, c.run); });
  v.section({"mesh", "Ranks: data x pipeline x sequence."}, [&] { show(v, c.mesh); });
  v.section({"pipeline", "Layers over ranks."}, [&] { show(v, c.pipeline); });
  v.section({"teacher", "The model that is distilled."}, [&] { show(v, c.teacher); });
  v.section({"student", "The model that is trained."}, [&] { show(v, c.student); });
  v.section({"data", "Tokens."}, [&] { show(v, c.data); });
  v.section({"memory", "What is kept, and where."}, [&] { show(v, c.memory); });
  v.section({"optimizer", "AdamW."}, [&] { show(v, c.optimizer); });
  v.list({"stage", "A stage of the recipe; stages run one after another."}, c.stages,
         [&](StageConfig& s) { show(v, s); });
  v.section({"checkpoint", "Training checkpoints."}, [&] { show(v, c.checkpoint); });
  v.section({"eval", "Evaluation during training."}, [&] { show(v, c.eval); });
  v.section({"log", "Console and metrics."}, [&] { show(v, c.log); });
  v.section({"trace", "What every rank does when, for Perfetto."}, [&] { show(v, c.trace); });
}

/// Checks across keys; the keys of one check are named in Origins::contradiction's order.
class Checker {
 public:
  Checker(const Config& config, const Origins& origins) : c_(config), origins_(origins) {}

  void check() const {
    check_mesh();
    check_student();
    if (c_.student.init == StudentInit::random) check_model();
    std::map<std::string, std::string> names;  // path of the first stage with each name
    for (std::size_t i = 0; i < c_.stages.size(); ++i) {
      const std::string path = fmt::format("stage.{}", i);
      const auto [first, is_new] = names.emplace(c_.stages[i].name, path);
      if (!is_new) {
        refuse({path + ".name", first->second + ".name"},
               fmt::format("\"{}\" for {} and {}", c_.stages[i].name, first->second, path), "a name of its own");
      }
      check_stage(c_.stages[i], path);
      check_loss(c_.stages[i].loss, path + ".loss");
    }
  }

 private:
  [[noreturn]] void refuse(const std::vector<std::string>& paths, std::string_view found,
                           std::string_view accepted) const {
    origins_.contradiction(paths, found, accepted);
  }

  void check_mesh() const {
    const MeshConfig& m = c_.mesh;
    const int automatic = (m.data == 0 ? 1 : 0) + (m.pipeline == 0 ? 1 : 0) + (m.sequence == 0 ? 1 : 0);
    if (automatic > 1) {
      std::vector<std::string> paths;
      if (m.pipeline == 0) paths.push_back("mesh.pipeline");
      if (m.sequence == 0) paths.push_back("mesh.sequence");
      paths.push_back("mesh.data");
      refuse(paths, fmt::format("data = {}, pipeline = {}, sequence = {}", m.data, m.pipeline, m.sequence),
             "at most one 0, the ranks that the others leave");
    }
    const PipelineConfig& p = c_.pipeline;
    if (p.chunks > 1 && p.schedule != PipelineSchedule::interleaved) {
      refuse({"pipeline.chunks", "pipeline.schedule"},
             fmt::format("chunks = {} with schedule = \"{}\"", p.chunks, name_of(p.schedule)),
             "chunks = 1, or schedule = \"interleaved\"");
    }
    if (p.put_off_layers > 0 && p.schedule != PipelineSchedule::zero_bubble) {
      refuse({"pipeline.put_off_layers", "pipeline.schedule"},
             fmt::format("put_off_layers = {} with schedule = \"{}\"", p.put_off_layers, name_of(p.schedule)),
             "put_off_layers = 0, or schedule = \"zero_bubble\"");
    }
    const std::vector<std::int64_t>& t = c_.trace.steps;
    if (!t.empty() && (t.size() != 2 || t[0] > t[1])) {
      refuse({"trace.steps"}, fmt::format("[{}]", fmt::join(t, ", ")), "[first, last] with first <= last, or []");
    }
  }

  void check_student() const {
    const StudentConfig& s = c_.student;
    if (s.init == StudentInit::teacher && c_.teacher.path.empty()) {
      refuse({"teacher.path", "student.init"}, "an empty teacher.path with student.init = \"teacher\"",
             "the teacher's folder as teacher.path, or another student.init");
    }
    if (s.init == StudentInit::folder && s.path.empty()) {
      refuse({"student.path", "student.init"}, "an empty student.path with student.init = \"folder\"",
             "the student's folder as student.path, or another student.init");
    }
  }

  void check_model() const {
    const StudentModelConfig& m = c_.student.model;
    const std::string path = "student.model.";
    const std::pair<const char*, std::int64_t> sizes[] = {
        {"hidden", m.hidden},     {"layers", m.layers},     {"intermediate", m.intermediate},  {"heads", m.heads},
        {"kv_heads", m.kv_heads}, {"head_dim", m.head_dim}, {"max_positions", m.max_positions}};
    for (const auto& [name, size] : sizes) {
      if (size == 0) refuse({path + name}, "0 with student.init = \"random\"", "an integer >= 1");
    }
    if (m.heads % m.kv_heads != 0) {
      refuse({path + "kv_heads", path + "heads"},
             fmt::format("{} key/value heads for {} query heads", m.kv_heads, m.heads),
             "key/value heads that divide the query heads");
    }
    const std::vector<std::string>& mixers = c_.student.mixers;
    if (m.head_dim % 2 != 0 && std::find(mixers.begin(), mixers.end(), "rope") != mixers.end()) {
      refuse({path + "head_dim", "student.mixers"}, fmt::format("head_dim {} with a rope mixer", m.head_dim),
             "an even head_dim, as rotary positions need");
    }
    if (m.rope_factor > 1.0 && m.rope_original_max_positions == 0) {
      refuse({path + "rope_original_max_positions", path + "rope_factor"},
             fmt::format("0 rope_original_max_positions with rope_factor = {}", m.rope_factor),
             "rope_original_max_positions >= 1, as YaRN needs");
    }
    if (m.rope_factor > 1.0 && m.rope_beta_fast <= m.rope_beta_slow) {
      refuse({path + "rope_beta_fast", path + "rope_beta_slow"},
             fmt::format("rope_beta_fast = {} with rope_beta_slow = {}", m.rope_beta_fast, m.rope_beta_slow),
             "rope_beta_fast > rope_beta_slow");
    }
  }

  void check_stage(const StageConfig& s, const std::string& path) const {
    if ((s.tokens > 0) == (s.steps > 0)) {
      refuse({path + ".steps", path + ".tokens"}, fmt::format("tokens = {} with steps = {}", s.tokens, s.steps),
             "exactly one of the two above 0");
    }
    if (s.batch_sequences % s.microbatch_sequences != 0) {
      refuse(
          {path + ".microbatch_sequences", path + ".batch_sequences"},
          fmt::format("microbatch_sequences = {} with batch_sequences = {}", s.microbatch_sequences, s.batch_sequences),
          "microbatch_sequences that divide batch_sequences");
    }
    const std::int64_t step_tokens = s.batch_sequences * s.sequence_length;
    if (stage_steps(s) > most_tokens / step_tokens) {
      refuse({path + ".steps", path + ".tokens"}, fmt::format("{} steps of {} tokens", stage_steps(s), step_tokens),
             fmt::format("at most {} tokens in a stage", most_tokens));
    }
  }

  void check_loss(const LossConfig& loss, const std::string& path) const {
    const std::pair<const char*, double> weights[] = {{"ce", loss.ce},
                                                      {"kl", loss.kl},
                                                      {"reverse_kl", loss.reverse_kl},
                                                      {"jsd", loss.jsd},
                                                      {"tvd", loss.tvd},
                                                      {"hidden_cosine", loss.hidden_cosine},
                                                      {"hidden_mse", loss.hidden_mse},
                                                      {"mixer_mse", loss.mixer_mse}};
    std::vector<std::string> active;
    for (const auto& [name, weight] : weights) {
      if (weight > 0) active.push_back(name);
    }
    if (active.empty()) {
      std::vector<std::string> paths{path};
      for (const auto& [name, weight] : weights) paths.push_back(path + "." + name);
      refuse(paths, "no loss with a weight above 0", "a weight above 0 for one loss or more");
    }
    if (loss.mixer_mse > 0 && active.size() > 1) {
      refuse({path + ".mixer_mse", path + "." + active.front()},
             fmt::format("mixer_mse above 0 with {} above 0", active.front()),
             "mixer_mse alone, since it runs every mixer by itself");
    }
    if (loss.needs_teacher() && c_.teacher.path.empty()) {
      const std::string& name = active.front() == "ce" ? active[1] : active.front();
      refuse({path + "." + name, "teacher.path"}, fmt::format("{} above 0 with an empty teacher.path", name),
             "ce as the only loss, or a teacher.path");
    }
  }

  const Config& c_;
  const Origins& origins_;
};

}  // namespace

bool LossConfig::needs_teacher() const {
  return std::max({kl, reverse_kl, jsd, tvd, hidden_cosine, hidden_mse, mixer_mse}) > 0.0;
}

Config parse_config(std::string_view text, std::string_view file_name, std::span<const std::string> overrides) {
  Config config;
  const Origins origins = read_toml(text, file_name, overrides, [&](SchemaVisitor& v) { show(v, config); });
  Checker(config, origins).check();
  return config;
}

Config load_config(const std::filesystem::path& file, std::span<const std::string> overrides) {
  return parse_config(read_file(file), file.string(), overrides);
}

std::string to_toml(const Config& config) {
  Config copy = config;  // the schema shows values by reference, for reading and printing alike
  return write_toml([&](SchemaVisitor& v) { show(v, copy); });
}

std::filesystem::path run_dir(const RunConfig& run) {
  return run.dir.empty() ? std::filesystem::path("runs") / run.name : std::filesystem::path(run.dir);
}

DType compute_dtype(const RunConfig& run) {
  switch (run.dtype) {
    case DTypeChoice::automatic: return run.device == DeviceChoice::cuda ? DType::bf16 : DType::f32;
    case DTypeChoice::float32: return DType::f32;
    case DTypeChoice::float64: return DType::f64;
    case DTypeChoice::bfloat16: return DType::bf16;
  }
  throw InternalError("compute_dtype: unknown choice");
}

std::int64_t stage_steps(const StageConfig& stage) {
  if (stage.steps > 0) return stage.steps;
  const std::int64_t step_tokens = stage.batch_sequences * stage.sequence_length;
  return (stage.tokens + step_tokens - 1) / step_tokens;
}

}  // namespace deltapipe
