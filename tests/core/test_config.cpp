#include "core/config.h"

#include "core/error.h"
#include "tests/core/config_testing.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace deltapipe {
namespace {

using config_testing::is_one_line;
using config_testing::recipe;

/// The smallest valid file, 3 lines, to put before the lines of a test.
const std::string smallest = "[teacher]\npath = 'teacher'\n# line 3\n";
/// Lines 4 to 8: a stage but for its loss; the next line is number 9.
const std::string stage = "[[stage]]\nname = 's'\nsteps = 1\nsequence_length = 8\nlearning_rate = 1e-3\n";

std::string error_of(const std::string& text, const std::vector<std::string>& overrides = {}) {
  try {
    parse_config(text, "run.toml", overrides);
  } catch (const ConfigError& e) {
    return e.what();
  }
  return "accepted";
}

TEST(Config, ReadsEveryKindOfValue) {
  const Config c = parse_config(recipe, "run.toml");
  EXPECT_EQ(c.run.name, "afm");
  EXPECT_EQ(c.run.seed, 7);
  EXPECT_EQ(c.run.device, DeviceChoice::cuda);
  EXPECT_TRUE(c.run.deterministic);
  EXPECT_EQ(c.student.kda.gate_lower_bound, -5.0);  // an integer stands for the same float
  EXPECT_EQ(c.student.kda.conv_init, ConvInit::normal);
  ASSERT_EQ(c.optimizer.groups.size(), 2u);
  EXPECT_EQ(c.optimizer.groups[0], (OptimizerGroupConfig{"A_log|dt_bias", 1.0, false}));
  EXPECT_EQ(c.optimizer.groups[1], (OptimizerGroupConfig{"norm", 0.5, true}));
  ASSERT_EQ(c.stages.size(), 2u);
  EXPECT_EQ(c.stages[0].loss.mixer_mse, 1.0);
  EXPECT_EQ(c.stages[1].learning_rate, 1e-5);
  EXPECT_EQ(c.stages[1].frozen, (std::vector<std::string>{"embed_tokens", "^lm_head\\."}));
  EXPECT_EQ(c.stages[1].hidden_layers, (std::vector<LayerPair>{{0, 0}, {1, 3}}));
  EXPECT_EQ(c.stages[1].loss.kl, 0.8);
  EXPECT_EQ(c.eval.needle.lengths, (std::vector<std::int64_t>{1024, 4096}));
  EXPECT_EQ(c.eval.needle.keys, (std::vector<std::int64_t>{1, 4}));
}

TEST(Config, KeepsDefaultsOfWhatIsNotGiven) {
  Config expected;
  expected.teacher.path = "teacher";
  EXPECT_EQ(parse_config(smallest, "run.toml"), expected);
}

TEST(Config, HelpersResolveWhatIsLeftOpen) {
  const Config c = parse_config(recipe, "run.toml");
  EXPECT_EQ(run_dir(c.run), std::filesystem::path("runs/afm"));
  RunConfig run = c.run;
  run.dir = "/scratch/x";
  EXPECT_EQ(run_dir(run), std::filesystem::path("/scratch/x"));
  EXPECT_EQ(compute_dtype(run), DType::bf16);
  run.device = DeviceChoice::cpu;
  EXPECT_EQ(compute_dtype(run), DType::f32);
  run.dtype = DTypeChoice::float64;
  EXPECT_EQ(compute_dtype(run), DType::f64);
  EXPECT_EQ(stage_steps(c.stages[0]), 10);
  EXPECT_EQ(stage_steps(c.stages[1]), 84);  // 1,000,001 tokens at 12,000 a step
  StageConfig whole = c.stages[1];
  whole.tokens = 24'000;
  EXPECT_EQ(stage_steps(whole), 2);
  EXPECT_EQ(name_of(LearningRateSchedule::linear), "linear");
  EXPECT_EQ(parse_choice<DTypeChoice>("auto"), DTypeChoice::automatic);
  EXPECT_EQ(parse_choice<DTypeChoice>("Auto"), std::nullopt);
}

TEST(Config, LoadsFilesAndNamesThemInErrors) {
  const auto folder =
      std::filesystem::temp_directory_path() / fmt::format("deltapipe_config_{}", std::random_device{}());
  std::filesystem::create_directories(folder);
  const auto file = folder / "run.toml";
  std::ofstream(file) << recipe;
  EXPECT_EQ(load_config(file), parse_config(recipe, "other"));
  const std::vector<std::string> overrides{"run.seed=9"};
  EXPECT_EQ(load_config(file, overrides).run.seed, 9);
  std::ofstream(file) << "[run]\nseed = 'x'\n";
  try {
    load_config(file);
    ADD_FAILURE() << "accepted";
  } catch (const ConfigError& e) {
    EXPECT_EQ(std::string(e.what()).find(file.string() + ":2: key 'run.seed': "), 0u) << e.what();
  }
  std::filesystem::remove_all(folder);
  EXPECT_THROW(load_config(file), IoError);
}

struct WrongFile {
  std::string text;
  std::string message;  // how it starts after "run.toml:"
};

void expect_errors(const std::vector<WrongFile>& cases) {
  for (const WrongFile& w : cases) {
    const std::string error = error_of(w.text);
    EXPECT_TRUE(error.starts_with("run.toml:" + w.message)) << "expected " << w.message << "\nfound " << error;
    EXPECT_TRUE(is_one_line(error)) << error;
  }
}

TEST(Config, RefusesUnknownKeysAndHintsAtTheNearest) {
  expect_errors({
      {"[run]\nsede = 1\n",
       "2: key 'run.sede': found an unknown key, accepted: name, dir, seed, device, dtype, threads, "
       "deterministic, log_level; did you mean 'seed'?"},
      {"[run]\n\n[studnet]\nx = 1\n",
       "3: key 'studnet': found an unknown key, accepted: run, mesh, pipeline, teacher, student, data, "
       "memory, optimizer, stage, checkpoint, eval, log, trace; did you mean 'student'?"},
      {"[run]\nzzzzzzzz = 1\nyyyyyyyy = 2\n",
       "2: key 'run.zzzzzzzz': found an unknown key, accepted: name, dir, seed, "
       "device, dtype, threads, deterministic, log_level"},
      // A misspelt required key is told as unknown, not as missing.
      {smallest + "[[stage]]\nname = 's'\nsequence_lenght = 8\n",
       "6: key 'stage.0.sequence_lenght': found an unknown key"},
      {smallest + stage + "[stage.loss]\nk1 = 1\n", "10: key 'stage.0.loss.k1': found an unknown key"},
      {"student.kda.head = 1\n", "1: key 'student.kda.head': found an unknown key"},
      {"[cluster]\n", "1: key 'cluster': found an unknown key"},
  });
  EXPECT_EQ(error_of("[run]\nzzzzzzzz = 1\n").find("did you mean"), std::string::npos);
}

TEST(Config, RefusesMeshesAndPipelinesThatContradictThemselves) {
  expect_errors({
      {"[mesh]\npipeline = 0\n",
       "2: key 'mesh.pipeline': found data = 0, pipeline = 0, sequence = 1, accepted: at most one 0"},
      {"[mesh]\ndata = 1\nsequence = 0\npipeline = 0\n", "4: key 'mesh.pipeline': found data = 1, pipeline = 0"},
      {"[mesh]\nlayout = 'ring'\n", "2: key 'mesh.layout': found string \"ring\", accepted: \"contiguous\", "},
      {"[mesh]\ntimeout_s = 0.0\n", "2: key 'mesh.timeout_s': found float 0.0"},
      {"[pipeline]\nchunks = 2\n", "2: key 'pipeline.chunks': found chunks = 2 with schedule = \"1f1b\""},
      {"[pipeline]\nput_off_layers = 2\n",
       "2: key 'pipeline.put_off_layers': found put_off_layers = 2 with schedule = \"1f1b\""},
      {"[pipeline]\nlayers = [2, 0]\n", "2: key 'pipeline.layers.1': found integer 0"},
      {"[trace]\nsteps = [3]\n", "2: key 'trace.steps': found [3], accepted: [first, last]"},
      {"[trace]\nsteps = [3, 2]\n", "2: key 'trace.steps': found [3, 2]"},
  });
}

TEST(Config, RefusesWrongTypes) {
  expect_errors({
      {"[run]\nseed = 1.0\n", "2: key 'run.seed': found float 1.0, accepted: an integer >= 0"},
      {"[run]\nseed = \"1\"\n", "2: key 'run.seed': found string \"1\", accepted: an integer >= 0"},
      {"[run]\nseed = true\n", "2: key 'run.seed': found boolean true, accepted: an integer >= 0"},
      {"[run]\nseed = 1979-05-27\n", "2: key 'run.seed': found a date, accepted: an integer"},
      {"[run]\ndeterministic = 1\n", "2: key 'run.deterministic': found integer 1, accepted: true or false"},
      {"[run]\ndevice = 0\n", "2: key 'run.device': found integer 0, accepted: \"cpu\", \"cuda\""},
      {"[run]\nname = [\"x\"]\n", "2: key 'run.name': found an array of 1 values, accepted: "},
      {"[run]\ndir = 3\n", "2: key 'run.dir': found integer 3, accepted: a string"},
      {"\nrun = 1\n", "2: key 'run': found integer 1, accepted: a table [run]"},
      {"[[run]]\n", "1: key 'run': found an array of 1 values, accepted: a table [run]"},
      {"[stage]\nname = 'x'\n", "1: key 'stage': found a table, accepted: tables [[stage]]"},
      {"stage = [\n  { name = 's', sequence_length = 8, learning_rate = 1 },\n  7]\n",
       "3: key 'stage.1': found integer 7, accepted: tables [[stage]]"},
      {"[optimizer]\nbeta1 = \"0.9\"\n",
       "2: key 'optimizer.beta1': found string \"0.9\", accepted: a number >= 0 and < 1"},
      {"[student]\nmixers = \"kda\"\n",
       "2: key 'student.mixers': found string \"kda\", accepted: an array of 1 or more"},
      {"[student]\nmixers = [\n  \"kda\",\n  3,\n]\n",
       "4: key 'student.mixers.1': found integer 3, accepted: \"kda\", "},
      {"[eval.needle]\nlengths = [1, 2.5]\n", "2: key 'eval.needle.lengths.1': found float 2.5, accepted: an integer"},
      {"[eval.needle]\ndepths = [0.5, '1']\n", "2: key 'eval.needle.depths.1': found string \"1\", accepted: a number"},
      {smallest + stage + "hidden_layers = [[0, 0],\n [1]]\n",
       "10: key 'stage.0.hidden_layers.1': found an array of 1 values"},
      {smallest + stage + "hidden_layers = [[0, 0],\n [1, 1.0]]\n",
       "10: key 'stage.0.hidden_layers.1.1': found float 1.0"},
      {smallest + stage + "hidden_layers = [0, 1]\n", "9: key 'stage.0.hidden_layers.0': found integer 0"},
      {smallest + stage + "loss = 1\n", "9: key 'stage.0.loss': found integer 1, accepted: a table [stage.0.loss]"},
  });
}

TEST(Config, RefusesNumbersOutOfRange) {
  expect_errors({
      {"[run]\nseed = -1\n", "2: key 'run.seed': found integer -1, accepted: an integer >= 0"},
      {"[run]\nthreads = 65537\n", "2: key 'run.threads': found integer 65537, accepted: an integer from 0 to 65536"},
      {"[student.kda]\ngate_lower_bound = -5.1\n",
       "2: key 'student.kda.gate_lower_bound': found float -5.1, accepted: a number >= -5 and <= 0"},
      {"[student.kda]\ngate_lower_bound = 1e-9\n", "2: key 'student.kda.gate_lower_bound': found float 1e-09"},
      {"[student.kda]\nconv_width = 0\n",
       "2: key 'student.kda.conv_width': found integer 0, accepted: an integer from 1"},
      {"[student]\nmixers = []\n",
       "2: key 'student.mixers': found an array of 0 values, accepted: an array of 1 or more"},
      {"[optimizer]\nbeta2 = 1.0\n", "2: key 'optimizer.beta2': found float 1.0, accepted: a number >= 0 and < 1"},
      {"[optimizer]\nepsilon = 0\n", "2: key 'optimizer.epsilon': found integer 0, accepted: a number > 0"},
      {"[optimizer]\nclip_norm = nan\n", "2: key 'optimizer.clip_norm': found float nan, accepted: a number >= 0"},
      {"[optimizer]\nclip_norm = inf\n", "2: key 'optimizer.clip_norm': found float inf, accepted: a number >= 0"},
      {"[optimizer]\nclip_norm = 9007199254740993\n", "2: key 'optimizer.clip_norm': found integer 9007199254740993"},
      {"[optimizer]\nmax_skipped_steps = 0\n", "2: key 'optimizer.max_skipped_steps': found integer 0"},
      {"[memory]\nloss_block_tokens = 0\n", "2: key 'memory.loss_block_tokens': found integer 0"},
      {"[student.model]\nrope_factor = 0.5\n",
       "2: key 'student.model.rope_factor': found float 0.5, accepted: a number >= 1"},
      {"[eval.needle]\ndepths = [0.5, 1.5]\n",
       "2: key 'eval.needle.depths.1': found float 1.5, accepted: a number >= 0 and <= 1"},
      {smallest + stage + "warmup = 1.01\n",
       "9: key 'stage.0.warmup': found float 1.01, accepted: a number >= 0 and <= 1"},
      {smallest + stage + "temperature = 0.0\n",
       "9: key 'stage.0.temperature': found float 0.0, accepted: a number > 0"},
      {smallest + stage + "hidden_layers = [[0, -1]]\n", "9: key 'stage.0.hidden_layers.0.1': found integer -1"},
      {smallest + stage + "[stage.loss]\nkl = -0.1\n",
       "10: key 'stage.0.loss.kl': found float -0.1, accepted: a number >= 0"},
      {smallest + stage + "[stage.loss]\njsd_beta = 1\n",
       "10: key 'stage.0.loss.jsd_beta': found integer 1, accepted: a number > 0 and < 1"},
  });
}

TEST(Config, RefusesUnknownWordsNamesAndPatterns) {
  expect_errors({
      {"[run]\ndevice = \"gpu\"\n",
       "2: key 'run.device': found string \"gpu\", accepted: \"cpu\", \"cuda\"; did you mean 'cpu'?"},
      {"[run]\ndtype = \"bfloat\"\n",
       "2: key 'run.dtype': found string \"bfloat\", accepted: \"auto\", \"float32\", "
       "\"float64\", \"bfloat16\"; did you mean 'bfloat16'?"},
      {"[run]\nname = \"a/b\"\n",
       "2: key 'run.name': found string \"a/b\" (not such a name), accepted: a folder's name"},
      {"[run]\nname = \"..\"\n", "2: key 'run.name': found string \"..\""},
      {"[student]\nmixers = ['kda', 'full']\n",
       "2: key 'student.mixers.1': found string \"full\" (unknown mixer), accepted: \"kda\", \"nope\", \"rope\""},
      {"[[optimizer.group]]\npattern = '(a'\n", "2: key 'optimizer.group.0.pattern': found string \"(a\" ("},
      {"[[optimizer.group]]\npattern = ''\n", "2: key 'optimizer.group.0.pattern': found string \"\" (empty"},
      {"[[optimizer.group]]\npattern = '" + std::string(5000, '(') + "'\n",
       "2: key 'optimizer.group.0.pattern': found"},
      {"[[optimizer.group]]\npattern = '(((a{99}){99}){99}){99}'\n", "2: key 'optimizer.group.0.pattern': found"},
      {smallest + stage + "frozen = ['a', '[']\n", "9: key 'stage.0.frozen.1': found string \"[\" ("},
      {smallest + "[[stage]]\nname = 'phase 1'\n", "5: key 'stage.0.name': found string \"phase 1\" (not such a name)"},
  });
}

TEST(Config, RefusesMissingKeys) {
  expect_errors({
      {smallest + "[[optimizer.group]]\ndecay = false\n",
       "4: key 'optimizer.group.0.pattern': found nothing, accepted: an ECMA"},
      {smallest + "[[stage]]\nsteps = 1\n", "4: key 'stage.0.name': found nothing, accepted: a name of"},
      {smallest + stage + "loss.ce = 1\n[[stage]]\nname = 't'\n",
       "10: key 'stage.1.sequence_length': found nothing, accepted: an integer from 1"},
      {smallest + "[[stage]]\nname = 't'\nsequence_length = 8\n", "4: key 'stage.0.learning_rate': found nothing"},
      {"", "1: key 'teacher.path': found an empty teacher.path"},
  });
}

TEST(Config, RefusesContradictions) {
  const std::string random =
      "[student]\ninit = \"random\"\n[student.model]\nhidden = 8\nlayers = 1\nintermediate = 8\n"
      "heads = 4\nkv_heads = 2\nhead_dim = 4\nmax_positions = 64\n";
  EXPECT_EQ(error_of(random), "accepted");
  std::string without_heads = random;
  without_heads.replace(without_heads.find("heads = 4\n"), 10, "");
  std::string odd = random;
  odd.replace(odd.find("kv_heads = 2"), 12, "kv_heads = 3");
  const std::string ce = "loss.ce = 1\n";
  std::string no_steps = stage;
  no_steps.replace(no_steps.find("steps = 1\n"), 10, "");
  expect_errors({
      {"[teacher]\npath = ''\n",
       "2: key 'teacher.path': found an empty teacher.path with student.init = \"teacher\", accepted: "},
      {"\n[student]\ninit = \"teacher\"\n", "3: key 'student.init': found an empty teacher.path"},
      {"[student]\ninit = \"folder\"\n", "2: key 'student.init': found an empty student.path"},
      {without_heads,
       "3: key 'student.model.heads': found 0 with student.init = \"random\", accepted: an integer >= 1"},
      {odd, "8: key 'student.model.kv_heads': found 3 key/value heads for 4 query heads, accepted: "},
      {random + "rope_factor = 2\n", "11: key 'student.model.rope_factor': found 0 rope_original_max_positions"},
      {random + "rope_factor = 2\nrope_original_max_positions = 4\nrope_beta_fast = 1\n",
       "13: key 'student.model.rope_beta_fast': found rope_beta_fast = 1 with rope_beta_slow = 1"},
      {smallest + stage + "tokens = 9\n" + ce,
       "6: key 'stage.0.steps': found tokens = 9 with steps = 1, accepted: exactly one"},
      {smallest + no_steps + ce, "4: key 'stage.0.steps': found tokens = 0 with steps = 0"},
      {smallest + no_steps + ce + "tokens = 0\n", "9: key 'stage.0.tokens': found tokens = 0 with steps = 0"},
      {smallest + stage + "batch_sequences = 6\nmicrobatch_sequences = 4\n" + ce,
       "10: key 'stage.0.microbatch_sequences': found microbatch_sequences = 4 with batch_sequences = 6"},
      {smallest + no_steps + "steps = 1_000_000_000_000_000\nbatch_sequences = 1_000_000\n" + ce,
       "8: key 'stage.0.steps': found 1000000000000000 steps of 8000000 tokens"},
      {smallest + stage + ce + stage + ce, "11: key 'stage.1.name': found \"s\" for stage.0 and stage.1"},
      {smallest + stage, "4: key 'stage.0.loss': found no loss with a weight above 0"},
      {smallest + stage + "[stage.loss]\nkl = 0\n", "9: key 'stage.0.loss': found no loss"},
      {smallest + stage + "[stage.loss]\nce = 1\nmixer_mse = 1\n",
       "11: key 'stage.0.loss.mixer_mse': found mixer_mse above 0 with ce above 0, accepted: mixer_mse alone"},
      {random + stage + "[stage.loss]\nce = 1\ntvd = 1\n",
       "18: key 'stage.0.loss.tvd': found tvd above 0 with an empty teacher.path, accepted: ce as the only loss"},
      {random + stage + "[stage.loss]\nmixer_mse = 1\n",
       "17: key 'stage.0.loss.mixer_mse': found mixer_mse above 0 with"},
  });
  EXPECT_EQ(error_of(random + stage + ce), "accepted");
  const std::string rope = "[student]\ninit = \"random\"\nmixers = ['rope']\nmodel.head_dim = 3\n";
  EXPECT_EQ(error_of(rope + "model.hidden = 8\nmodel.layers = 1\nmodel.intermediate = 8\nmodel.heads = 1\n"
                            "model.kv_heads = 1\nmodel.max_positions = 8\n")
                .find("run.toml:4: key 'student.model.head_dim': found head_dim 3 with a rope mixer"),
            0u);
}

TEST(Config, RefusesTextThatIsNotToml) {
  std::string deep = "a";
  for (int i = 0; i < 100'000; ++i) deep += ".a";
  const std::string quotes = "\"\"\"";
  expect_errors({
      {"[run]\nseed = \n", "2: not TOML: "},
      {"[run\n", "1: not TOML: "},
      {"[run]\nseed = 1\nseed = 2\n", "3: not TOML: "},
      {"[run]\n[data]\n[run]\n", "3: not TOML: "},
      {"[run]\nname = \"a\nb\"\n", "2: not TOML: "},
      {"[run]\nname = \"\xff\"\n", "2: not TOML: "},
      {std::string("[run]\nname = \"\0\"\n", 18), "2: not TOML: "},
      {"[run]\nname = " + std::string(10'000, '[') + "\n", "2: not TOML: "},
      {"[run]\n" + deep + " = 1\n", "2: not TOML: more than 200 dots in one line"},
      {"[run]\ndir = \u00e9t\u00e9\n", "2: not TOML: a character beyond ASCII outside of strings and comments"},
      {"[run]\n# \u00e9\ndir = " + quotes + "\u00e9'\n\"\"" + quotes + "\u00e9\n",
       "4: not TOML: a character beyond ASCII"},
      {std::string((1u << 20) + 1, '\n'), "1: not TOML: 1048577 bytes"},
  });
}

// The deepest nesting that passes the checks on text: as many array levels as toml++ accepts, each with a dotted key of
// the greatest length. It must neither overflow the stack when parsed nor when freed.
TEST(Config, SurvivesTheDeepestNesting) {
  std::string key = "a", open, closed;
  for (int i = 0; i < 200; ++i) key += ".a";
  for (int i = 0; i < 120; ++i) {
    open += (i > 0 ? "{" : "") + key + " = [\n";
    closed += i > 0 ? "}]" : "]";
  }
  const std::string error = error_of(open + closed + "\n");
  EXPECT_TRUE(error.starts_with("run.toml:1: key 'a': found an unknown key")) << error;
}

// Dots and characters beyond ASCII count outside of strings and comments only.
TEST(Config, AcceptsAnyTextInStringsAndComments) {
  const std::string dots(1000, '.');
  const std::string text = "\xEF\xBB\xBF# \u00e9 " + dots +
                           " \"\n[teacher]\npath = 't' # '\u00e9\n[run]\ndir = \"\\\"\u00e9" + dots + "\" # " + dots +
                           "\n[data]\ntrain = \"\"\"\n\"\u00e9\\\"\"\"\"\"\"\nvalidation = '''\u00e9\\'''\n";
  const Config c = parse_config(text, "run.toml");
  EXPECT_EQ(c.run.dir, "\"\u00e9" + dots);
  EXPECT_EQ(c.data.train, "\"\u00e9\"\"\"");
  EXPECT_EQ(c.data.validation, "\u00e9\\");
}

TEST(Config, OverridesReachEveryKindOfKey) {
  const std::vector<std::string> overrides{
      "run.seed=11",
      "run.name=second",
      "data.train=../data-1/train_0.h5",
      "data.validation=\"with space\"",
      "run.device=cpu",
      "stage.0.learning_rate=1e-4",
      "stage.1.loss.kl=3",
      "optimizer.group.1.pattern='^model\\.norm'",
      "student.mixers=[\"kda\", 'nope']",
      "stage.1.hidden_layers=[[2, 5]]",
      "run.deterministic=false",
      "log.every_steps=1",
      "log.every_steps=5",
  };
  const Config c = parse_config(recipe, "run.toml", overrides);
  Config expected = parse_config(recipe, "run.toml");
  expected.run.seed = 11;
  expected.run.name = "second";
  expected.data.train = "../data-1/train_0.h5";
  expected.data.validation = "with space";
  expected.run.device = DeviceChoice::cpu;
  expected.stages[0].learning_rate = 1e-4;
  expected.stages[1].loss.kl = 3.0;
  expected.optimizer.groups[1].pattern = "^model\\.norm";
  expected.student.mixers = {"kda", "nope"};
  expected.stages[1].hidden_layers = {{2, 5}};
  expected.run.deterministic = false;
  expected.log.every_steps = 5;  // the later of two
  EXPECT_EQ(c, expected);
  // A required key, and a value that stands for a wrong one in the file.
  const std::vector<std::string> repairs{"stage.0.name=s", "run.seed=3"};
  const std::string broken = smallest +
                             "[[stage]]\nsteps = 1\nsequence_length = 8\nlearning_rate = 1\nloss.ce = 1\n"
                             "[run]\nseed = 'three'\n";
  EXPECT_EQ(parse_config(broken, "run.toml", repairs).stages[0].name, "s");
}

TEST(Config, RefusesWrongOverridesByName) {
  const std::vector<std::pair<std::string, std::string>> cases{
      {"run.seed", "key 'run.seed': found no '=', accepted: key.path=value"},
      {"=1", "key '': found no key, accepted: names"},
      {"run..seed=1", "key 'run..seed': found no key"},
      {"run.seed =1", "key 'run.seed ': found no key"},
      {"run.seed=", "key 'run.seed': found no TOML value ("},
      {"run.seed=[1", "key 'run.seed': found no TOML value ("},
      {"run.name=two words", "key 'run.name': found no TOML value ("},
      {"run.dir=\u00e9t\u00e9", "key 'run.dir': found no TOML value (a character beyond ASCII"},
      {"student.mixers=[kda]", "key 'student.mixers': found no TOML value ("},
      {"run.seed=1\nrun.name=2", "key 'run.seed': found no TOML value (line break)"},
      {"run.sede=1",
       "key 'run.sede': found an unknown key, accepted: name, dir, seed, device, dtype, threads, "
       "deterministic, log_level; did you mean 'seed'?"},
      {"rum.seed=1", "key 'rum': found an unknown key, accepted: run, "},
      {"stage.1.loss.k1=1", "key 'stage.1.loss.k1': found an unknown key"},
      {"run.seed=1.0", "key 'run.seed': found float 1.0, accepted: an integer >= 0"},
      {"run.seed=one", "key 'run.seed': found string \"one\", accepted: an integer >= 0"},
      {"run.name=7", "key 'run.name': found integer 7, accepted: "},
      {"run.device=gpu", "key 'run.device': found string \"gpu\", accepted: \"cpu\", \"cuda\""},
      {"stage.0.warmup=2", "key 'stage.0.warmup': found integer 2, accepted: a number >= 0 and <= 1"},
      {"stage.1.hidden_layers=[[1,2],[3]]", "key 'stage.1.hidden_layers.1': found an array of 1 values"},
      {"run={seed=1}", "key 'run': found a section, accepted: one of its keys: run.KEY"},
      {"stage=[]", "key 'stage': found a list of tables, accepted: a key of one entry: stage.INDEX.KEY"},
      {"stage.2.steps=1", "key 'stage.2.steps': found entry '2', accepted: stage.INDEX.KEY with INDEX from 0 to 1"},
      {"stage.00.steps=1", "key 'stage.00.steps': found entry '00', accepted: "},
      {"stage.steps=1", "key 'stage.steps': found entry 'steps', accepted: stage.INDEX.KEY"},
      {"stage.1={}", "key 'stage.1': found an entry, accepted: stage.INDEX.KEY"},
      {"student.mixers.0=kda",
       "key 'student.mixers.0': found a path below a value, accepted: student.mixers as a whole"},
      // Contradictions are told of the override, though the other key stands in the file.
      {"stage.1.batch_sequences=6",
       "key 'stage.1.batch_sequences': found microbatch_sequences = 4 with batch_sequences = 6"},
      {"stage.1.steps=6", "key 'stage.1.steps': found tokens = 1000001 with steps = 6"},
      {"stage.0.name=distill", "key 'stage.0.name': found \"distill\" for stage.0 and stage.1"},
      {"teacher.path=\"\"", "key 'teacher.path': found an empty teacher.path"},
      {"stage.0.loss.mixer_mse=0", "key 'stage.0.loss.mixer_mse': found no loss"},
  };
  for (const auto& [text, message] : cases) {
    const std::string error = error_of(recipe, {text});
    std::string shown = text;
    std::replace(shown.begin(), shown.end(), '\n', ' ');
    EXPECT_TRUE(error.starts_with("--set " + shown + ": " + message)) << "expected " << message << "\nfound " << error;
    EXPECT_TRUE(is_one_line(error)) << error;
  }
  EXPECT_NE(error_of(smallest, {"stage.0.steps=1"}).find("nothing, the file has no [[stage]]"), std::string::npos);
  // What an override did not cause keeps its line.
  EXPECT_TRUE(error_of("[run]\nseed = -1\n", {"run.name=x"}).starts_with("run.toml:2: key 'run.seed'"));
}

TEST(Config, PrintsEveryKeyUnderItsDescription) {
  const std::string text = to_toml(parse_config(recipe, "run.toml"));
  EXPECT_NE(text.find("\n# Seed of initial weights, data order and stochastic rounding.\nseed = 7\n"),
            std::string::npos);
  EXPECT_NE(text.find("\nconv_init = \"normal\"\n"), std::string::npos);
  EXPECT_NE(text.find("\nhidden_layers = [[0, 0], [1, 3]]\n"), std::string::npos);
  EXPECT_NE(text.find("\nfrozen = [\"embed_tokens\", \"^lm_head\\\\.\"]\n"), std::string::npos);
  std::vector<std::string> lines;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = text.find('\n', at);
    lines.push_back(text.substr(at, end - at));
    at = end + 1;
  }
  std::size_t keys = 0;
  for (std::size_t i = 0; i < lines.size(); ++i) {
    if (lines[i].empty() || lines[i][0] == '#') continue;
    ASSERT_GT(i, 0u);
    EXPECT_TRUE(lines[i - 1].starts_with("# ") && lines[i - 1].size() > 4) << lines[i];
    if (lines[i][0] != '[') ++keys;
  }
  // run 8, teacher 1, student 3 + 6 + 1 + 17, data 3, memory 3, optimizer 7, checkpoint 2, eval 3 + 6, log 1;
  // 3 for each of two groups, 13 + 9 for each of two stages
  EXPECT_EQ(keys, 73u + 2 * 3 + 2 * 22);
}

}  // namespace
}  // namespace deltapipe
