#include "checkpoints/checkpoint_manifest.h"

#include "core/error.h"
#include "core/file.h"

#include <fmt/format.h>

#include <charconv>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <span>

namespace deltapipe::manifest {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::string_view format_name = "deltapipe training checkpoint";
constexpr std::string_view head_begin = "{\"manifest_hash\": \"";
constexpr std::string_view head_end = "\",\n";
constexpr std::size_t hash_digits = 16;

std::string hash_of(std::string_view text) { return hash_hex(std::as_bytes(std::span(text))); }

DType dtype_from(const std::string& name) {
  for (DType t :
       {DType::f32, DType::f64, DType::bf16, DType::f16, DType::u8, DType::i32, DType::u32, DType::i64, DType::u64}) {
    if (name_of(t) == name) return t;
  }
  fail<FormatError>("unknown dtype \"{}\"", name);
}

/// JSON has no infinities and no NaN: those are strings.
Json number_to_json(double x) {
  if (std::isfinite(x)) return x;
  return std::isnan(x) ? "nan" : x > 0 ? "inf" : "-inf";
}

double number_from_json(const Json& json) {
  if (json.is_number()) return json.get<double>();
  const auto text = json.get<std::string>();
  if (text == "nan") return std::numeric_limits<double>::quiet_NaN();
  if (text == "inf") return std::numeric_limits<double>::infinity();
  if (text == "-inf") return -std::numeric_limits<double>::infinity();
  fail<FormatError>("\"{}\" is not a number", text);
}

Json state_to_json(const TrainingState& s) {
  Json values = Json::object();
  for (const auto& [name, value] : s.values) values[name] = number_to_json(value);
  Json seeds = Json::object();
  for (const auto& [name, value] : s.seeds) seeds[name] = value;
  return {{"step", s.step},
          {"stage", s.stage},
          {"stage_step", s.stage_step},
          {"data_epoch", s.data_epoch},
          {"data_position", s.data_position},
          {"tokens_seen", s.tokens_seen},
          {"skipped_steps", s.skipped_steps},
          {"skipped_in_a_row", s.skipped_in_a_row},
          {"seeds", seeds},
          {"values", values},
          {"mesh", {{"data", s.mesh.data}, {"pipeline", s.mesh.pipeline}, {"sequence", s.mesh.sequence}}},
          {"config", s.config_toml},
          {"model_config", s.model_config}};
}

TrainingState state_from_json(const Json& json) {
  TrainingState s;
  json.at("step").get_to(s.step);
  json.at("stage").get_to(s.stage);
  json.at("stage_step").get_to(s.stage_step);
  json.at("data_epoch").get_to(s.data_epoch);
  json.at("data_position").get_to(s.data_position);
  json.at("tokens_seen").get_to(s.tokens_seen);
  json.at("skipped_steps").get_to(s.skipped_steps);
  json.at("skipped_in_a_row").get_to(s.skipped_in_a_row);
  for (const auto& [name, value] : json.at("seeds").items()) s.seeds[name] = value.get<std::uint64_t>();
  for (const auto& [name, value] : json.at("values").items()) s.values[name] = number_from_json(value);
  const Json& mesh = json.at("mesh");
  mesh.at("data").get_to(s.mesh.data);
  mesh.at("pipeline").get_to(s.mesh.pipeline);
  mesh.at("sequence").get_to(s.mesh.sequence);
  json.at("config").get_to(s.config_toml);
  json.at("model_config").get_to(s.model_config);
  return s;
}

Json tensor_to_json(const TensorEntry& t) {
  Json shape = Json::array();
  for (int i = 0; i < t.shape.rank(); ++i) shape.push_back(t.shape[i]);
  Json slices = Json::array();
  for (const SliceEntry& s : t.slices) slices.push_back({s.rank, s.begin, s.end});
  return {{"group", t.group}, {"name", t.name}, {"dtype", name_of(t.dtype)}, {"shape", shape}, {"slices", slices}};
}

TensorEntry tensor_from_json(const Json& json, std::size_t ranks) {
  TensorEntry t;
  json.at("group").get_to(t.group);
  json.at("name").get_to(t.name);
  t.dtype = dtype_from(json.at("dtype").get<std::string>());
  for (const Json& d : json.at("shape")) {
    if (t.shape.rank() == Shape::max_rank) fail<FormatError>("{} {} has too many dimensions", t.group, t.name);
    t.shape.append(d.get<std::int64_t>());
  }
  for (const Json& s : json.at("slices")) {
    const SliceEntry entry{s.at(0).get<int>(), s.at(1).get<std::int64_t>(), s.at(2).get<std::int64_t>()};
    if (entry.rank < 0 || static_cast<std::size_t>(entry.rank) >= ranks) {
      fail<FormatError>("{} {} lies in the file of rank {}, of {} ranks", t.group, t.name, entry.rank, ranks);
    }
    t.slices.push_back(entry);
  }
  if (const std::string gap = describe_gap(t); !gap.empty()) fail<FormatError>("{}", gap);
  return t;
}

FileEntry file_from_json(const Json& json) {
  FileEntry f;
  json.at("name").get_to(f.name);
  json.at("bytes").get_to(f.bytes);
  const auto text = json.at("hash").get<std::string>();
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), f.hash, 16);
  if (error != std::errc() || end != text.data() + text.size()) fail<FormatError>("\"{}\" is not a hash", text);
  return f;
}

Manifest parse_content(const Json& json) {
  if (json.at("format") != format_name) fail<FormatError>("is not a {}", format_name);
  if (const int found = json.at("version").get<int>(); found != version) {
    fail<FormatError>("format version is {}, this program reads version {}", found, version);
  }
  Manifest m;
  m.state = state_from_json(json.at("state"));
  for (const Json& f : json.at("files")) m.files.push_back(file_from_json(f));
  if (m.files.size() < 2) fail<FormatError>("names no rank files");
  for (std::size_t i = 0; i < m.files.size(); ++i) {
    const std::string expected =
        i + 1 == m.files.size() ? whole_file_name : rank_file_name(static_cast<std::int64_t>(i));
    if (m.files[i].name != expected) fail<FormatError>("names {} in place of {}", m.files[i].name, expected);
  }
  for (const Json& t : json.at("tensors")) m.tensors.push_back(tensor_from_json(t, m.files.size() - 1));
  return m;
}

}  // namespace

std::string rank_file_name(std::int64_t rank) { return fmt::format("rank-{:05}.h5", rank); }

std::string describe_gap(const TensorEntry& tensor) {
  std::int64_t covered = 0;
  for (const SliceEntry& s : tensor.slices) {
    if (s.begin != covered || s.end <= s.begin) {
      return fmt::format("{} {} {}: slice [{}, {}) of rank {} does not follow element {}", tensor.group, tensor.name,
                         tensor.shape.str(), s.begin, s.end, s.rank, covered);
    }
    covered = s.end;
  }
  if (covered != tensor.shape.numel()) {
    return fmt::format("{} {} {}: its slices end at element {}, not at {}", tensor.group, tensor.name,
                       tensor.shape.str(), covered, tensor.shape.numel());
  }
  return {};
}

std::string format(const Manifest& manifest) {
  Json files = Json::array();
  for (const FileEntry& f : manifest.files) {
    files.push_back({{"name", f.name}, {"bytes", f.bytes}, {"hash", fmt::format("{:016x}", f.hash)}});
  }
  Json tensors = Json::array();
  for (const TensorEntry& t : manifest.tensors) tensors.push_back(tensor_to_json(t));
  const Json content = {{"format", format_name},
                        {"version", version},
                        {"state", state_to_json(manifest.state)},
                        {"files", files},
                        {"tensors", tensors}};
  // The object's opening brace stands in the first line.
  std::string body;
  try {
    body = content.dump(1).substr(1) + "\n";
  } catch (const Json::exception& e) {
    fail<InternalError>("checkpoint manifest: a name or the config is not UTF-8: {}", e.what());
  }
  return fmt::format("{}{}{}{}", head_begin, hash_of(body), head_end, body);
}

Manifest parse(std::string_view text, const std::string& where) {
  const std::size_t head = head_begin.size() + hash_digits + head_end.size();
  if (text.size() < head || !text.starts_with(head_begin) ||
      text.substr(head_begin.size() + hash_digits, head_end.size()) != head_end) {
    fail<FormatError>("{}: damaged: it does not begin as a checkpoint's manifest does", where);
  }
  const std::string_view body = text.substr(head);
  if (hash_of(body) != text.substr(head_begin.size(), hash_digits)) {
    fail<FormatError>("{}: damaged: its content does not have the hash that its first line gives", where);
  }
  try {
    return parse_content(Json::parse(text));
  } catch (const FormatError& e) {
    fail<FormatError>("{}: {}", where, e.what());
  } catch (const Json::exception& e) {
    fail<FormatError>("{}: {}", where, e.what());
  }
}

}  // namespace deltapipe::manifest
