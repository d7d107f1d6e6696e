#include "checkpoints/byte_tokenizer.h"
#include "checkpoints/embedded_files.h"
#include "checkpoints/hf_export.h"
#include "checkpoints/hf_import.h"
#include "tests/checkpoints/tiny_models.h"

#include <fmt/format.h>

#include <sys/stat.h>
#include <unistd.h>
#include <nlohmann/json.hpp>
#include <set>

namespace deltapipe {
namespace {

using nlohmann::json;
using testing::expect_error;
using testing::names_in;
using testing::TemporaryFolder;
using testing::Weights;
using testing::write_text;
namespace fs = std::filesystem;

ExportRequest request_for(const fs::path& folder, const ModelSpec& spec, const Weights& weights, DType dtype) {
  ExportRequest r;
  r.folder = folder;
  r.spec = spec;
  r.parameter = [&weights](const ParameterSpec& p) { return weights.at(p.name); };
  r.dtype = dtype;
  return r;
}

json read_json(const fs::path& path) { return json::parse(read_file(path)); }

std::set<std::string> set_of(const fs::path& folder) {
  const auto names = names_in(folder);
  return {names.begin(), names.end()};
}

/// Names and hashes of all files below a folder.
std::map<std::string, std::string> snapshot(const fs::path& folder) {
  std::map<std::string, std::string> files;
  for (const auto& e : fs::recursive_directory_iterator(folder)) {
    files[e.path().string()] = e.is_regular_file() ? hash_file_hex(e.path()) : "folder";
  }
  return files;
}

// From every type of memory into every type of file; in one file and in shards.
TEST(HuggingFaceExport, ComesBackWithTheSameSpecAndBits) {
  for (const ModelSpec& spec : {testing::tiny_arcee(), testing::tiny_llama(), testing::tiny_hybrid()}) {
    for (const DType memory : {DType::f32, DType::f64, DType::bf16}) {
      for (const DType file_type : {DType::f32, DType::bf16}) {
        const TemporaryFolder folder;
        const Weights weights(spec, memory);
        ExportRequest request = request_for(folder / "out", spec, weights, file_type);
        if (memory == DType::f32) request.shard_bytes = 1000;
        export_huggingface(request);
        EXPECT_EQ(names_in(folder.path()), std::vector<std::string>{"out"});
        EXPECT_EQ(fs::exists(folder / "out/model.safetensors"), memory != DType::f32);
        const HuggingFaceFolder model(folder / "out");
        EXPECT_EQ(model.spec(), spec);
        model.verify();
        for (const ParameterSpec& p : parameters_of(spec)) {
          SCOPED_TRACE(p.name);
          const DType stored = p.keep_float32 ? DType::f32 : file_type;
          const Tensor original = weights.at(p.name);
          const auto n = static_cast<std::size_t>(p.shape.numel());
          // float64 holds every value of the other types: the file must hold the original rounded once.
          std::vector<double> expected(n), found(n);
          std::vector<std::byte> rounded(n * size_of(stored));
          const Tensor r(rounded.data(), stored, p.shape);
          convert_floats({static_cast<const std::byte*>(original.data), original.bytes()}, memory, r);
          convert_floats(rounded, stored, Tensor(expected.data(), DType::f64, p.shape));
          model.load(p, Tensor(found.data(), DType::f64, p.shape));
          EXPECT_EQ(found, expected);
        }
      }
    }
  }
}

TEST(HuggingFaceExport, CutsShardsBySizeAndIndexesThem) {
  const TemporaryFolder folder;
  const ModelSpec spec = testing::tiny_hybrid();
  const Weights weights(spec, DType::f32);
  ExportRequest request = request_for(folder / "out", spec, weights, DType::bf16);
  request.shard_bytes = 1500;
  std::vector<std::string> asked;
  request.parameter = [&](const ParameterSpec& p) {
    asked.push_back(p.name);
    return weights.at(p.name);
  };
  export_huggingface(request);
  std::vector<std::string> all;
  for (const ParameterSpec& p : parameters_of(spec)) all.push_back(p.name);
  EXPECT_EQ(asked, all);
  const json index = read_json(folder / "out/model.safetensors.index.json");
  EXPECT_EQ(index["weight_map"].size(), all.size());
  std::int64_t total = 0;
  std::set<std::string> files;
  for (const auto& [name, file] : index["weight_map"].items()) files.insert(file);
  EXPECT_GT(files.size(), 2u);
  for (const std::string& name : files) {
    const SafetensorsFile file(folder / "out" / name);
    std::int64_t bytes = 0;
    for (const SafetensorsTensor& t : file.tensors()) {
      EXPECT_EQ(index["weight_map"][t.name], name);
      const bool keep = t.name.ends_with("A_log") || t.name.ends_with("dt_bias");
      EXPECT_EQ(t.dtype_name, keep ? "F32" : "BF16") << t.name;
      bytes += static_cast<std::int64_t>(t.bytes.size());
    }
    EXPECT_TRUE(bytes <= 1500 || file.tensors().size() == 1) << name;  // the embedding alone is larger
    EXPECT_EQ(name.substr(11), fmt::format("-of-{:05}.safetensors", files.size()));
    total += bytes;
  }
  EXPECT_EQ(index["metadata"]["total_size"], total);
}

TEST(HuggingFaceExport, WritesWhatTransformersReads) {
  const TemporaryFolder folder;
  const auto exported = [&](const ModelSpec& spec, const char* name) {
    const Weights weights(spec, DType::bf16);
    ExportRequest request = request_for(folder / name, spec, weights, DType::bf16);
    request.model_card = "# A model\n";
    export_huggingface(request);
    return read_json(folder / name / "config.json");
  };
  const json arcee = exported(testing::tiny_arcee(), "arcee");
  EXPECT_EQ(arcee["architectures"], json::array({"ArceeForCausalLM"}));
  EXPECT_EQ(arcee["hidden_act"], "relu2");
  EXPECT_EQ(arcee["dtype"], "bfloat16");
  EXPECT_EQ(arcee["torch_dtype"], "bfloat16");
  json yarn{{"rope_type", "yarn"}, {"factor", 3.7},    {"original_max_position_embeddings", 1024},
            {"beta_fast", 31.5},   {"beta_slow", 1.0}, {"mscale", 0.9}};
  EXPECT_EQ(arcee["rope_scaling"], yarn);
  EXPECT_EQ(arcee["rope_theta"], 12345.678);
  yarn["rope_theta"] = 12345.678;
  EXPECT_EQ(arcee["rope_parameters"], yarn);
  EXPECT_FALSE(arcee.contains("auto_map"));
  EXPECT_EQ(set_of(folder / "arcee"),
            (std::set<std::string>{"README.md", "config.json", "generation_config.json", "model.safetensors"}));
  EXPECT_EQ(read_file(folder / "arcee/README.md"), "# A model\n");
  EXPECT_EQ(read_json(folder / "arcee/generation_config.json"), (json{{"bos_token_id", 256}, {"eos_token_id", 257}}));

  const json llama = exported(testing::tiny_llama(), "llama");
  EXPECT_EQ(llama["architectures"], json::array({"LlamaForCausalLM"}));
  EXPECT_EQ(llama["tie_word_embeddings"], true);
  EXPECT_EQ(llama["rope_scaling"], nullptr);
  EXPECT_EQ(llama["rope_parameters"], (json{{"rope_type", "default"}, {"rope_theta", 500000.0}}));
  EXPECT_EQ(llama["bos_token_id"], nullptr);

  const json hybrid = exported(testing::tiny_hybrid(), "hybrid");
  EXPECT_EQ(hybrid["architectures"], json::array({"ArceeKdaForCausalLM"}));
  EXPECT_EQ(hybrid["auto_map"], (json{{"AutoConfig", "configuration_arcee_kda.ArceeKdaConfig"},
                                      {"AutoModelForCausalLM", "modeling_arcee_kda.ArceeKdaForCausalLM"}}));
  EXPECT_EQ(hybrid["mixers"], json::array({"kda", "nope", "rope"}));
  EXPECT_EQ(hybrid["kda_gate_lower_bound"], -4.5);
  const fs::path sources = HUGGINGFACE_SOURCES;
  for (const char* name : {"configuration_arcee_kda.py", "modeling_arcee_kda.py"}) {
    EXPECT_EQ(read_file(folder / "hybrid" / name), read_file(sources / name));
  }

  ModelSpec standard = testing::tiny_hybrid();
  standard.kda.gate_lower_bound = 0;
  standard.mixers = {Mixer::kda, Mixer::nope};
  standard.rope = {};
  const json plain = exported(standard, "plain");
  EXPECT_EQ(plain["kda_gate_lower_bound"], nullptr);
  EXPECT_FALSE(plain.contains("rope_theta") || plain.contains("rope_parameters"));
}

TEST(HuggingFaceExport, RefusesSpecsThatTheModelTypeCannotExpress) {
  const TemporaryFolder folder;
  const auto refuses = [&](ModelSpec spec, bool bytes, std::string_view part) {
    const Weights weights(spec, DType::f32);
    ExportRequest request = request_for(folder / "out", spec, weights, DType::f32);
    request.byte_tokenizer = bytes;
    expect_error<ConfigError>([&] { export_huggingface(request); }, {part});
    EXPECT_TRUE(names_in(folder.path()).empty());
  };
  ModelSpec s = testing::tiny_arcee();
  s.mixers[1] = Mixer::nope;
  refuses(s, false, "arcee_kda");
  s = testing::tiny_arcee();
  s.mlp = Mlp::gated_silu;
  refuses(s, false, "squared-ReLU");
  s = testing::tiny_llama();
  s.mlp = Mlp::squared_relu;
  refuses(s, false, "gated SiLU");
  s.model_type = "gpt2";
  refuses(s, false, "gpt2");
  s = testing::tiny_arcee();
  s.vocabulary = 257;
  s.eos_token = -1;
  refuses(s, true, "258");
  s = testing::tiny_arcee();
  s.eos_token = 2;
  refuses(s, true, "257");
}

TEST(HuggingFaceExport, CopiesTheTokenizer) {
  const TemporaryFolder folder;
  const ModelSpec spec = testing::tiny_arcee();
  const Weights weights(spec, DType::f32);
  const std::set<std::string> wanted{"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
                                     "merges.txt",     "tokenizer.model",       "chat_template.jinja"};
  for (const std::string& name : wanted) write_text(folder / "source" / name, name + std::string("\0\xff", 2));
  fs::rename(folder / "source/vocab.json", folder / "blob");
  fs::create_symlink("../blob", folder / "source/vocab.json");  // as in the cache of huggingface_hub
  for (const char* name : {"config.json", "model.safetensors", "README.md", "notes.txt"}) {
    write_text(folder / "source" / name, "foreign");
  }
  ExportRequest request = request_for(folder / "out", spec, weights, DType::f32);
  request.tokenizer_folder = folder / "source";
  export_huggingface(request);
  for (const std::string& name : wanted) {
    EXPECT_EQ(read_file(folder / "out" / name), name + std::string("\0\xff", 2));
    EXPECT_FALSE(fs::is_symlink(folder / "out" / name));
  }
  EXPECT_EQ(set_of(folder / "out").size(), wanted.size() + 3);
  EXPECT_NE(read_file(folder / "out/config.json"), "foreign");

  request.folder = folder / "other";
  for (const char* source : {"none", "empty"}) {
    fs::create_directory(folder / "empty");
    request.tokenizer_folder = folder / source;
    expect_error<IoError>([&] { export_huggingface(request); }, {source, "tokenizer"});
    EXPECT_FALSE(fs::exists(folder / "other") || fs::exists(folder / "other.partial"));
  }
}

// The alphabet must give each byte one character of its own: whoever decodes maps characters back to bytes.
TEST(ByteTokenizer, GivesEveryByteItsOwnCharacter) {
  const json tokenizer = json::parse(byte_tokenizer_json());
  const json& vocabulary = tokenizer["model"]["vocab"];
  EXPECT_EQ(vocabulary.size(), 256u);
  std::set<int> ids;
  for (const auto& [character, id] : vocabulary.items()) ids.insert(id.get<int>());
  EXPECT_EQ(ids.size(), 256u);
  EXPECT_EQ(*ids.begin(), 0);
  EXPECT_EQ(*ids.rbegin(), 255);
  // Known pairs of GPT-2's table: '!' is itself, space U+0120, newline U+010A, 0xAD the last shifted one, U+0143.
  EXPECT_EQ(vocabulary["!"], 33);
  EXPECT_EQ(vocabulary["\u0120"], 32);
  EXPECT_EQ(vocabulary["\u010a"], 10);
  EXPECT_EQ(vocabulary["\u0143"], 0xad);
  EXPECT_EQ(vocabulary["\u00ff"], 255);
  EXPECT_EQ(vocabulary["\u00a1"], 0xa1);
  EXPECT_TRUE(tokenizer["model"]["merges"].empty());
  EXPECT_EQ(tokenizer["added_tokens"][0]["content"], "<|bos|>");
  EXPECT_EQ(tokenizer["added_tokens"][0]["id"], byte_bos_token);
  EXPECT_EQ(tokenizer["added_tokens"][1]["content"], "<|eos|>");
  EXPECT_EQ(tokenizer["added_tokens"][1]["id"], byte_eos_token);

  const TemporaryFolder folder;
  const ModelSpec spec = testing::tiny_arcee();
  const Weights weights(spec, DType::f32);
  ExportRequest request = request_for(folder / "out", spec, weights, DType::f32);
  request.byte_tokenizer = true;
  export_huggingface(request);
  EXPECT_EQ(read_file(folder / "out/tokenizer.json"), byte_tokenizer_json());
  const json config = read_json(folder / "out/tokenizer_config.json");
  EXPECT_EQ(config["bos_token"], "<|bos|>");
  EXPECT_EQ(config["model_max_length"], spec.max_positions);
}

TEST(HuggingFaceExport, ReplacesOnlyWhatItMay) {
  const TemporaryFolder folder;
  const ModelSpec spec = testing::tiny_arcee();
  const Weights weights(spec, DType::f32);
  ExportRequest request = request_for(folder / "out/", spec, weights, DType::f32);  // trailing slash and all
  fs::create_directory(folder / "out");  // an empty folder is as good as none
  fs::create_directory(folder / "out.partial");
  write_text(folder / "out.partial/model.safetensors", "of an export that was killed");
  export_huggingface(request);
  EXPECT_EQ(names_in(folder.path()), std::vector<std::string>{"out"});

  write_text(folder / "out/notes.txt", "mine");
  const auto before = snapshot(folder.path());
  expect_error<UsageError>([&] { export_huggingface(request); }, {"out", "not empty"});
  EXPECT_EQ(snapshot(folder.path()), before);
  request.overwrite = true;
  request.spec.tied_embeddings = true;
  export_huggingface(request);
  EXPECT_EQ(names_in(folder.path()), std::vector<std::string>{"out"});
  EXPECT_FALSE(fs::exists(folder / "out/notes.txt"));
  EXPECT_TRUE(HuggingFaceFolder(folder / "out").spec().tied_embeddings);

  write_text(folder / "photos/a.jpg", "mine");
  request.folder = folder / "photos";
  expect_error<UsageError>([&] { export_huggingface(request); }, {"photos", "config.json"});
  request.folder = folder / "photos/a.jpg";
  expect_error<UsageError>([&] { export_huggingface(request); }, {"a.jpg", "not a folder"});
  EXPECT_EQ(read_file(folder / "photos/a.jpg"), "mine");
}

TEST(HuggingFaceExport, LeavesNothingBehindOnFailure) {
  const TemporaryFolder folder;
  ModelSpec spec = testing::tiny_arcee();
  spec.intermediate = 300;  // an MLP of 9600 bytes a matrix, after an embedding of 8320
  const Weights weights(spec, DType::f32);
  ExportRequest request = request_for(folder / "deep/er/out", spec, weights, DType::f32);
  request.shard_bytes = 4000;
  for (const rlim_t limit : {0, 300, 6000, 9000}) {  // in config.json, later in it, in the first and the second shard
    const testing::FileSizeLimit full(limit);
    expect_error<IoError>([&] { export_huggingface(request); }, {"out.partial", "too large"});
    EXPECT_TRUE(names_in(folder.path()).empty()) << limit;
  }
  struct Interrupted {};
  request.parameter = [&](const ParameterSpec& p) {
    if (p.name == "model.norm.weight") throw Interrupted{};
    return weights.at(p.name);
  };
  EXPECT_THROW(export_huggingface(request), Interrupted);
  EXPECT_TRUE(names_in(folder.path()).empty());
  request.parameter = [&](const ParameterSpec&) { return weights.at("model.norm.weight"); };
  expect_error<InternalError>([&] { export_huggingface(request); }, {"model.embed_tokens.weight", "[260, 8]"});
  EXPECT_TRUE(names_in(folder.path()).empty());

  // Overwriting: the old folder stays.
  request = request_for(folder / "out", spec, weights, DType::f32);
  export_huggingface(request);
  const auto before = snapshot(folder.path());
  request.overwrite = true;
  {
    const testing::FileSizeLimit full(9000);
    expect_error<IoError>([&] { export_huggingface(request); }, {"out.partial"});
  }
  EXPECT_EQ(snapshot(folder.path()), before);

  // Places where nobody can make a folder, not even root.
  for (const fs::path& bad : {folder / "out/config.json/new", folder / "out/config.json/a/b",
                              fs::path("/proc/deltapipe"), folder / std::string(300, 'x')}) {
    request.folder = bad;
    request.overwrite = false;
    expect_error<IoError>([&] { export_huggingface(request); }, {bad.filename().string()});
  }
  EXPECT_EQ(snapshot(folder.path()), before);
}

}  // namespace
}  // namespace deltapipe
