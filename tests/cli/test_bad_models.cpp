// Teacher folders that are missing, damaged or lie: one clear line, the right exit status, nothing left behind.
#include "core/file.h"
#include "tests/cli/workshop.h"

#include <nlohmann/json.hpp>

#include <cstring>
#include <functional>
#include <string>
#include <vector>

namespace deltapipe {
namespace {

namespace fs = std::filesystem;
using nlohmann::ordered_json;
using testing::expect_refusal;
using testing::Workshop;
using testing::write_text;

/// A safetensors file in its parts.
struct Weights {
  ordered_json header;
  std::string data;

  explicit Weights(const std::string& file) {
    std::uint64_t size = 0;
    std::memcpy(&size, file.data(), sizeof size);
    header = ordered_json::parse(file.substr(8, size));
    data = file.substr(8 + size);
  }
  std::string bytes() const {
    const std::string text = header.dump();
    const std::uint64_t size = text.size();
    std::string file(8, '\0');
    std::memcpy(file.data(), &size, sizeof size);
    return file + text + data;
  }
};

const std::string up = "model.layers.1.mlp.up_proj.weight";
const std::string norm = "model.norm.weight";

TEST(BadModels, DamagedWeightsAreRefused) {
  const Workshop shop;
  shop.write_job(2, 2);
  const fs::path file = shop / "teacher/model.safetensors";
  const std::string good = read_file(file);
  const Weights whole(good);
  struct Case {
    const char* name;
    std::function<std::string()> content;
    std::vector<std::string> parts;
  };
  const auto changed = [&](const std::function<void(Weights&)>& change) {
    return [&whole, change] {
      Weights w = whole;
      change(w);
      return w.bytes();
    };
  };
  const auto header_size = [&](std::uint64_t size) {
    return [&good, size] {
      std::string file_bytes = good;
      std::memcpy(file_bytes.data(), &size, sizeof size);
      return file_bytes;
    };
  };
  const std::vector<Case> cases{
      {"empty", [] { return std::string(); }, {}},
      {"a few bytes", [&] { return good.substr(0, 5); }, {}},
      {"cut in the header", [&] { return good.substr(0, 100); }, {}},
      {"cut in the data", [&] { return good.substr(0, good.size() - 100); }, {}},
      {"too long", [&] { return good + "more"; }, {}},
      {"text", [] { return std::string("These are not weights. Not at all."); }, {}},
      {"a header longer than the file", header_size(good.size()), {}},
      {"a header of 2^63 bytes", header_size(std::uint64_t{1} << 63), {}},
      {"no header", header_size(0), {}},
      {"a tensor past the end",
       changed([&](Weights& w) { w.header[up]["data_offsets"][1] = w.data.size() + 4; }),
       {up}},
      {"offsets backwards",
       changed([&](Weights& w) {
         auto& o = w.header[up]["data_offsets"];
         std::swap(o[0], o[1]);
       }),
       {up}},
      {"two tensors in one place",
       changed([&](Weights& w) {
         w.header["model.layers.0.mlp.up_proj.weight"]["data_offsets"] = w.header[up]["data_offsets"];
       }),
       {}},
      {"a shape of 2^62 elements",
       changed([&](Weights& w) {
         w.header[up]["shape"] = {1LL << 31, 1LL << 31};
       }),
       {up}},
      {"a shape beyond 2^64",
       changed([&](Weights& w) {
         w.header[up]["shape"] = {1LL << 62, 1LL << 62};
       }),
       {up}},
      {"a negative shape",
       changed([&](Weights& w) {
         w.header[up]["shape"] = {-32, -16};
       }),
       {up}},
      {"a missing tensor",
       changed([&](Weights& w) {
         const auto begin = w.header[norm]["data_offsets"][0].get<std::size_t>();
         const auto end = w.header[norm]["data_offsets"][1].get<std::size_t>();
         w.header.erase(norm);
         w.data.erase(begin, end - begin);
         for (auto& [name, t] : w.header.items()) {
           if (name == "__metadata__" || t["data_offsets"][0].get<std::size_t>() < end) continue;
           for (auto& o : t["data_offsets"]) o = o.get<std::size_t>() - (end - begin);
         }
       }),
       {norm, "missing"}},
      {"an unexpected tensor",
       changed([&](Weights& w) {
         w.header["model.layers.7.bias"] = {
             {"dtype", "F32"}, {"shape", {1}}, {"data_offsets", {w.data.size(), w.data.size() + 4}}};
         w.data += "1234";
       }),
       {"model.layers.7.bias"}},
      {"another shape",
       changed([&](Weights& w) {
         w.header[up]["shape"] = {16, 32};
       }),
       {up, "[16, 32]", "[32, 16]"}},
      {"another type", changed([&](Weights& w) { w.header[up]["dtype"] = "I32"; }), {up, "I32", "F32"}},
      {"an unknown type", changed([&](Weights& w) { w.header[up]["dtype"] = "F33"; }), {up, "F33"}}};
  for (const Case& c : cases) {
    SCOPED_TRACE(c.name);
    write_text(file, c.content());
    const testing::Listing before = testing::list_files(shop.path());
    const testing::Outcome o = shop.run({"train", "job.toml"});
    EXPECT_TRUE(testing::fails_with(4, {"teacher"}, o));
    for (const std::string& part : c.parts) EXPECT_NE(o.err.find(part), std::string::npos) << part << "\n" << o;
    EXPECT_EQ(testing::list_files(shop.path()), before);
  }
  // The other commands read by the same way.
  write_text(file, good.substr(0, good.size() - 100));
  expect_refusal(shop, 4, {"model.safetensors"}, {"init", "job.toml"});
  expect_refusal(shop, 4, {"model.safetensors"}, {"eval", "teacher", "--data", "validation.h5"});
  expect_refusal(shop, 4, {"model.safetensors"}, {"export", "teacher", "--out", "copy"});
  expect_refusal(shop, 4, {"model.safetensors"}, {"inspect", "teacher"});
  expect_refusal(shop, 4, {"model.safetensors"}, {"generate", "teacher", "--text", "a"});
}

TEST(BadModels, FoldersThatAreNoModelsAreRefused) {
  const Workshop shop;
  shop.write_job(2, 2);
  const auto with_teacher = [&](const std::string& path) {
    return std::vector<std::string>{"train", "job.toml", "--set", "teacher.path='" + shop.text(path) + "'"};
  };
  expect_refusal(shop, 5, {shop.text("nowhere"), "config.json"}, with_teacher("nowhere"));
  expect_refusal(shop, 5, {shop.text("text"), "config.json"}, with_teacher("text"));
  expect_refusal(shop, 5, {shop.text("train.h5"), "config.json"}, with_teacher("train.h5"));
  expect_refusal(shop, 5, {"nowhere"}, {"eval", "nowhere", "--data", "validation.h5"});
  expect_refusal(shop, 5, {"nowhere"}, {"export", "nowhere", "--out", "copy"});
  expect_refusal(shop, 5, {"nowhere"}, {"inspect", "nowhere"});
  expect_refusal(shop, 5, {"nowhere/latest"}, {"inspect", "nowhere/latest"});

  fs::create_directories(shop / "headless");
  fs::copy_file(shop / "teacher/config.json", shop / "headless/config.json");
  expect_refusal(shop, 5, {"headless", "model.safetensors"}, with_teacher("headless"));
  fs::copy(shop / "teacher", shop / "odd");
  write_text(shop / "odd/config.json", "{\"model_type\": \"gpt2\"}");
  expect_refusal(shop, 4, {"odd/config.json", "gpt2"}, with_teacher("odd"));
  write_text(shop / "odd/config.json", "{\"model_type\": ");
  expect_refusal(shop, 4, {"odd/config.json"}, with_teacher("odd"));
  write_text(shop / "odd/config.json", "");
  expect_refusal(shop, 4, {"odd/config.json"}, with_teacher("odd"));
}

}  // namespace
}  // namespace deltapipe
