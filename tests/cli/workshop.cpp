#include "tests/cli/workshop.h"

#include "checkpoints/training_checkpoint.h"
#include "core/file.h"
#include "core/random.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <cstring>
#include <sstream>

namespace deltapipe::testing {
namespace fs = std::filesystem;
namespace {

/// Sentences of a small vocabulary: something to learn.
std::string make_text(std::uint64_t seed, int sentences) {
  static constexpr std::string_view words[] = {"the", "gate", "decays", "state", "of",
                                               "a",   "head", "and",    "keeps", "it"};
  RandomStream r(seed, "text");
  std::string text;
  for (int s = 0; s < sentences; ++s) {
    const auto count = 3 + r.next_below(8);
    for (std::uint64_t w = 0; w < count; ++w) {
      text += words[r.next_below(std::size(words))];
      text += w + 1 == count ? ".\n" : " ";
    }
  }
  return text;
}

void require_success(const Outcome& outcome) {
  if (!succeeds(outcome)) {
    std::ostringstream text;
    text << outcome;
    throw std::runtime_error("preparing a test failed: " + text.str());
  }
}

}  // namespace

Listing list_files(const fs::path& folder) {
  Listing all;
  for (const auto& e : fs::recursive_directory_iterator(folder)) {
    all[e.path().lexically_relative(folder).string()] = e.is_regular_file() ? hash_file_hex(e.path()) : "";
  }
  return all;
}

Workshop::Workshop(int layers) {
  for (int i = 0; i < 20; ++i) {
    write_text(folder_ / fmt::format("text/{:02}.txt", i), make_text(static_cast<std::uint64_t>(i), 20));
  }
  require_success(
      run({"data", "text", "--out", "train.h5", "--validation", "validation.h5", "--validation-fraction", "0.2"}));
  write_text(folder_ / "teacher.toml",
             fmt::format(
                 "[run]\nname = 'teacher'\n[student]\ninit = 'random'\n[student.model]\nvocabulary = 258\nhidden = 16\n"
                 "layers = {}\nintermediate = 32\nheads = 2\nkv_heads = 1\nhead_dim = 8\nmax_positions = 256\n"
                 "init_std = 0.2\nrope_factor = 4.0\nrope_original_max_positions = 64\n[data]\ntrain = 'train.h5'\n"
                 "validation = 'validation.h5'\n[[stage]]\nname = 'pretrain'\nsteps = 10\nsequence_length = 48\n"
                 "batch_sequences = 4\nlearning_rate = 1e-2\n[stage.loss]\nce = 1.0\n[eval]\ntokens = 96\n",
                 layers));
  require_success(run({"init", "teacher.toml", "--out", "teacher"}));
}

Outcome Workshop::run(std::vector<std::string> arguments) const { return testing::run(std::move(arguments), here()); }

fs::path Workshop::write_job(int align_steps, int distill_steps, const std::string& more) const {
  return write_text(
      folder_ / "job.toml",
      fmt::format("[run]\nname = 'job'\nseed = 3\n[teacher]\npath = '{0}/teacher'\n[student]\n"
                  "mixers = ['kda', 'nope']\n[data]\ntrain = '{0}/train.h5'\nvalidation = '{0}/validation.h5'\n"
                  "[optimizer]\nweight_decay = 0.1\n"
                  "[[stage]]\nname = 'align'\nsteps = {1}\nsequence_length = 32\nbatch_sequences = 4\n"
                  "microbatch_sequences = 2\nlearning_rate = 1e-2\nwarmup = 0.2\nfrozen = ['layernorm']\n[stage.loss]\n"
                  "mixer_mse = 1.0\n"
                  "[[stage]]\nname = 'distill'\nsteps = {2}\nsequence_length = 48\nbatch_sequences = 4\n"
                  "microbatch_sequences = 2\nlearning_rate = 5e-3\nwarmup = 0.2\n[stage.loss]\nkl = 1.0\n"
                  "hidden_cosine = 0.5\n[eval]\nevery_steps = 5\ntokens = 96\n{3}",
                  path().string(), align_steps, distill_steps, more));
}

void expect_refusal(const Workshop& shop, int code, std::initializer_list<std::string_view> parts,
                    std::vector<std::string> command) {
  const Listing before = list_files(shop.path());
  const Outcome outcome = shop.run(std::move(command));
  EXPECT_TRUE(fails_with(code, parts, outcome));
  EXPECT_EQ(list_files(shop.path()), before) << "something was left or changed\n" << outcome;
}

void expect_same_checkpoint(const fs::path& a, const fs::path& b) {
  CheckpointReader first(a), second(b);
  const auto tensors = first.tensors(), others = second.tensors();
  ASSERT_EQ(tensors.size(), others.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const TensorInfo& t = tensors[i];
    ASSERT_EQ(t.group + t.name, others[i].group + others[i].name);
    const auto read = [&](CheckpointReader& reader) {
      std::vector<std::byte> bytes(static_cast<std::size_t>(t.shape.numel()) * size_of(t.dtype));
      reader.read(t.group, t.name, 0, t.shape.numel(), {bytes.data(), t.dtype, t.shape});
      return bytes;
    };
    EXPECT_TRUE(read(first) == read(second)) << t.group << " " << t.name << " differs between " << a << " and " << b;
  }
  TrainingState x = first.state(), y = second.state();
  x.config_toml = y.config_toml = "";  // paths and the like
  EXPECT_TRUE(x == y) << a << " and " << b << " stand elsewhere in the run";
}

std::vector<std::string> read_metrics(const fs::path& file) {
  std::vector<std::string> lines;
  std::istringstream text(read_file(file));
  for (std::string line; std::getline(text, line);) {
    nlohmann::json j = nlohmann::json::parse(line);
    if (j.contains("end")) continue;
    for (const char* varies : {"seconds", "tokens_per_second", "mfu", "traffic"}) j.erase(varies);
    lines.push_back(j.dump());
  }
  return lines;
}

int count_steps(const fs::path& metrics) {
  if (!fs::exists(metrics)) return 0;
  std::istringstream text(read_file(metrics));
  int steps = 0;
  for (std::string line; std::getline(text, line) && !text.eof();)
    steps += line.find("stage_step") != std::string::npos;
  return steps;
}

}  // namespace deltapipe::testing
