// Config: everything a run is told, read from one TOML file and `--set key=value` overrides. Reading is strict: an
// unknown key, a wrong type, a value out of range, an unknown word or a contradiction is a ConfigError of one line,
//   FILE:LINE: key 'a.b': found X, accepted: Y        (or "--set key=value: key 'a.b': ..." for an override).
// Every key, its default, range and description stand once, in config.cpp.
#pragma once

#include "core/dtype.h"
#include "core/log.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace deltapipe {

enum class DeviceChoice : std::uint8_t { cpu, cuda };
enum class DTypeChoice : std::uint8_t { automatic, float32, float64, bfloat16 };
/// Where the student's first weights come from: derived from the teacher, random numbers, or a folder.
enum class StudentInit : std::uint8_t { teacher, random, folder };
/// First weights of KDA's convolutions: pass the newest token through, or N(0, init_std).
enum class ConvInit : std::uint8_t { identity, normal };
enum class ModelType : std::uint8_t { arcee, llama, arcee_kda };
/// Where optimizer states live: with the parameters, or in pinned host memory.
enum class OptimizerPlace : std::uint8_t { device, host };
enum class StateDType : std::uint8_t { float32, bfloat16 };
enum class LearningRateSchedule : std::uint8_t { cosine, constant, linear };
/// How a sequence is cut over its ranks (comm/sequence_layout.h).
enum class SequenceCut : std::uint8_t { contiguous, zigzag };
/// Order of forwards and backwards of the pipeline's ranks (pipeline/generators.h).
enum class PipelineSchedule : std::uint8_t { one_f_one_b, interleaved, zero_bubble };
/// When the frozen teacher runs: right before the student, or earlier, in the bubbles.
enum class TeacherTiming : std::uint8_t { in_line, ahead };

/// The words of a choice as they are written in TOML, in the order of the enum's members.
template <class E>
inline constexpr std::array<std::string_view, 0> words_of{};
template <>
inline constexpr std::array<std::string_view, 2> words_of<DeviceChoice>{"cpu", "cuda"};
template <>
inline constexpr std::array<std::string_view, 4> words_of<DTypeChoice>{"auto", "float32", "float64", "bfloat16"};
template <>
inline constexpr std::array<std::string_view, 3> words_of<StudentInit>{"teacher", "random", "folder"};
template <>
inline constexpr std::array<std::string_view, 2> words_of<ConvInit>{"identity", "normal"};
template <>
inline constexpr std::array<std::string_view, 3> words_of<ModelType>{"arcee", "llama", "arcee_kda"};
template <>
inline constexpr std::array<std::string_view, 2> words_of<OptimizerPlace>{"device", "host"};
template <>
inline constexpr std::array<std::string_view, 2> words_of<StateDType>{"float32", "bfloat16"};
template <>
inline constexpr std::array<std::string_view, 3> words_of<LearningRateSchedule>{"cosine", "constant", "linear"};
template <>
inline constexpr std::array<std::string_view, 2> words_of<SequenceCut>{"contiguous", "zigzag"};
template <>
inline constexpr std::array<std::string_view, 3> words_of<PipelineSchedule>{"1f1b", "interleaved", "zero_bubble"};
template <>
inline constexpr std::array<std::string_view, 2> words_of<TeacherTiming>{"inline", "ahead"};
template <>
inline constexpr std::array<std::string_view, 4> words_of<log::Level>{"debug", "info", "warn", "error"};

template <class E>
concept Choice = (words_of<E>.size() > 0);

template <Choice E>
constexpr std::string_view name_of(E value) {
  return words_of<E>[static_cast<std::size_t>(value)];
}
/// The member with this word; nothing for any other word.
template <Choice E>
constexpr std::optional<E> parse_choice(std::string_view word) {
  for (std::size_t i = 0; i < words_of<E>.size(); ++i) {
    if (words_of<E>[i] == word) return static_cast<E>(i);
  }
  return std::nullopt;
}

struct RunConfig {
  std::string name = "run";
  std::string dir;  // empty: runs/<name>; see run_dir()
  std::int64_t seed = 1;
  DeviceChoice device = DeviceChoice::cpu;
  DTypeChoice dtype = DTypeChoice::automatic;  // see compute_dtype()
  std::int64_t threads = 0;                    // 0: every core the process may run on
  bool deterministic = true;
  log::Level log_level = log::Level::info;
  friend bool operator==(const RunConfig&, const RunConfig&) = default;
};

/// How ranks share the work: data x pipeline x sequence of them. At most one is 0: what the others leave.
struct MeshConfig {
  std::int64_t data = 0;
  std::int64_t pipeline = 1;
  std::int64_t sequence = 1;
  SequenceCut layout = SequenceCut::zigzag;
  double timeout_s = 600.0;  // of one wait for another rank
  friend bool operator==(const MeshConfig&, const MeshConfig&) = default;
};

struct PipelineConfig {
  PipelineSchedule schedule = PipelineSchedule::one_f_one_b;
  std::int64_t chunks = 1;  // model chunks a rank; over 1: interleaved alone
  TeacherTiming teacher = TeacherTiming::in_line;
  std::int64_t kept_teacher = 0;     // teacher forwards whose hidden states a rank keeps, with ahead; 0: any number
  std::int64_t put_off_layers = 0;   // of a stage, whose weights' gradients zero_bubble computes later; 0: all
  std::vector<std::int64_t> layers;  // of each virtual stage; empty: cut by cost
  friend bool operator==(const PipelineConfig&, const PipelineConfig&) = default;
};

struct TeacherConfig {
  std::string path;  // empty: no teacher
  friend bool operator==(const TeacherConfig&, const TeacherConfig&) = default;
};

struct KdaConfig {
  std::int64_t heads = 0;     // 0: the teacher's query heads
  std::int64_t head_dim = 0;  // 0: the teacher's
  std::int64_t conv_width = 4;
  std::int64_t gate_rank = 0;     // 0: head_dim
  double gate_lower_bound = 0.0;  // 0: the standard gate; otherwise in [-5, 0)
  ConvInit conv_init = ConvInit::identity;
  friend bool operator==(const KdaConfig&, const KdaConfig&) = default;
};

struct AttentionConfig {
  std::int64_t kv_heads = 0;  // 0: the teacher's; otherwise a multiple of them that divides the query heads
  friend bool operator==(const AttentionConfig&, const AttentionConfig&) = default;
};

/// Sizes of a student that starts from random numbers; unused for the other kinds of init.
struct StudentModelConfig {
  ModelType type = ModelType::arcee;
  std::int64_t vocabulary = 0;  // 0: the training data's
  std::int64_t hidden = 0;
  std::int64_t layers = 0;
  std::int64_t intermediate = 0;
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t max_positions = 0;
  double norm_eps = 1e-5;
  bool tied_embeddings = false;
  double init_std = 0.02;
  double rope_theta = 10000.0;
  double rope_factor = 1.0;  // 1: plain RoPE; over 1: YaRN
  std::int64_t rope_original_max_positions = 0;
  double rope_beta_fast = 32.0;
  double rope_beta_slow = 1.0;
  friend bool operator==(const StudentModelConfig&, const StudentModelConfig&) = default;
};

struct StudentConfig {
  StudentInit init = StudentInit::teacher;
  std::string path;                                              // for init = folder
  std::vector<std::string> mixers{"kda", "kda", "kda", "nope"};  // kda, nope or rope; repeated over the layers
  KdaConfig kda;
  AttentionConfig attention;
  StudentModelConfig model;
  friend bool operator==(const StudentConfig&, const StudentConfig&) = default;
};

struct DataConfig {
  std::string train;
  std::string validation;
  bool isolate_documents = true;
  friend bool operator==(const DataConfig&, const DataConfig&) = default;
};

struct MemoryConfig {
  bool recompute = false;
  std::int64_t loss_block_tokens = 2048;
  OptimizerPlace optimizer = OptimizerPlace::device;
  friend bool operator==(const MemoryConfig&, const MemoryConfig&) = default;
};

/// Parameters whose Hugging Face name contains a match of `pattern`; the first group that matches a name holds it.
struct OptimizerGroupConfig {
  std::string pattern;  // ECMAScript regular expression, searched for
  double learning_rate_factor = 1.0;
  bool decay = true;
  friend bool operator==(const OptimizerGroupConfig&, const OptimizerGroupConfig&) = default;
};

struct OptimizerConfig {
  double beta1 = 0.9;
  double beta2 = 0.95;
  double epsilon = 1e-8;
  double weight_decay = 0.0;
  double clip_norm = 1.0;               // 0: off
  std::int64_t max_skipped_steps = 10;  // non-finite steps in a row that stop the run
  StateDType state = StateDType::float32;
  std::vector<OptimizerGroupConfig> groups;  // [[optimizer.group]]
  friend bool operator==(const OptimizerConfig&, const OptimizerConfig&) = default;
};

/// Weights of the loss terms. mixer_mse stands alone; all but ce need a teacher.
struct LossConfig {
  double ce = 0.0;
  double kl = 0.0;
  double reverse_kl = 0.0;
  double jsd = 0.0;
  double tvd = 0.0;
  double hidden_cosine = 0.0;
  double hidden_mse = 0.0;
  double mixer_mse = 0.0;
  double jsd_beta = 0.5;  // in (0, 1)
  bool needs_teacher() const;
  friend bool operator==(const LossConfig&, const LossConfig&) = default;
};

/// A student layer and the teacher layer its hidden state is compared with; both count from 0.
struct LayerPair {
  std::int64_t student = 0;
  std::int64_t teacher = 0;
  friend bool operator==(const LayerPair&, const LayerPair&) = default;
};

struct StageConfig {
  std::string name;
  std::int64_t tokens = 0;  // exactly one of tokens and steps is positive; see stage_steps()
  std::int64_t steps = 0;
  std::int64_t sequence_length = 0;
  std::int64_t batch_sequences = 1;       // of the whole job, a step
  std::int64_t microbatch_sequences = 1;  // divides batch_sequences
  double learning_rate = 0.0;
  double warmup = 0.0;  // fraction of the stage's steps
  LearningRateSchedule schedule = LearningRateSchedule::cosine;
  double final_learning_rate = 0.0;
  double temperature = 1.0;
  std::vector<std::string> frozen;       // ECMAScript regular expressions, searched for in Hugging Face names
  std::vector<LayerPair> hidden_layers;  // empty: student layer i with teacher layer i, for every i
  LossConfig loss;
  friend bool operator==(const StageConfig&, const StageConfig&) = default;
};

struct CheckpointConfig {
  std::int64_t every_steps = 0;  // 0: at the end of the run and on signals only
  std::int64_t keep = 2;
  friend bool operator==(const CheckpointConfig&, const CheckpointConfig&) = default;
};

struct NeedleConfig {
  std::vector<std::int64_t> lengths;          // tokens; empty: no needle evaluation
  std::vector<double> depths{0.1, 0.5, 0.9};  // place of the needle as a fraction of the text
  std::vector<std::int64_t> keys{1, 4};       // key-value pairs hidden; one of them is asked for
  std::int64_t key_tokens = 4;
  std::int64_t value_tokens = 4;
  std::int64_t samples = 20;
  friend bool operator==(const NeedleConfig&, const NeedleConfig&) = default;
};

struct EvalConfig {
  std::int64_t every_steps = 0;      // 0: at the end of every stage only
  std::int64_t tokens = 65536;       // validation tokens, at most
  std::int64_t sequence_length = 0;  // 0: the last stage's
  NeedleConfig needle;
  friend bool operator==(const EvalConfig&, const EvalConfig&) = default;
};

struct LogConfig {
  std::int64_t every_steps = 1;
  friend bool operator==(const LogConfig&, const LogConfig&) = default;
};

struct TraceConfig {
  std::vector<std::int64_t> steps;  // [first, last], from 1; empty: no trace
  friend bool operator==(const TraceConfig&, const TraceConfig&) = default;
};

struct Config {
  RunConfig run;
  MeshConfig mesh;
  PipelineConfig pipeline;
  TeacherConfig teacher;
  StudentConfig student;
  DataConfig data;
  MemoryConfig memory;
  OptimizerConfig optimizer;
  std::vector<StageConfig> stages;  // [[stage]]; may be empty, training needs at least one
  CheckpointConfig checkpoint;
  EvalConfig eval;
  LogConfig log;
  TraceConfig trace;
  friend bool operator==(const Config&, const Config&) = default;
};

/// Reads `file`, then applies `overrides`. Throws ConfigError, or IoError when the file cannot be read.
///
/// An override is "key.path=value": value is TOML on one line, and a bare word (letters, digits and _ - . / ~ : + @ %)
/// that is not TOML is a string. Entries of a list of tables are reached by index (stage.0.learning_rate=1e-4); plain
/// arrays are given whole. Of two overrides of one key the later holds.
Config load_config(const std::filesystem::path& file, std::span<const std::string> overrides = {});
/// The same for text in memory; `file_name` is what errors call it.
Config parse_config(std::string_view text, std::string_view file_name, std::span<const std::string> overrides = {});
/// Every key with its value under its description as a comment. A valid config parses back to an equal one.
std::string to_toml(const Config& config);

/// run.dir, or runs/<run.name> when that is empty.
std::filesystem::path run_dir(const RunConfig& run);
/// run.dtype with "auto" resolved: float32 on the CPU, bfloat16 on CUDA.
DType compute_dtype(const RunConfig& run);
/// Whole optimizer steps of a stage: `steps`, or `tokens` rounded up to whole steps.
std::int64_t stage_steps(const StageConfig& stage);

}  // namespace deltapipe
