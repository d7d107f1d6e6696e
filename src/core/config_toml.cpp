#include "core/config_toml.h"

#include "core/error.h"
#include "core/toml_guard.h"

#include <fmt/format.h>
#include <toml++/toml.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>

namespace deltapipe {
namespace {

/// Control characters become spaces, so that an error stays one line whatever a file holds.
std::string one_line(std::string text) {
  for (char& c : text) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = ' ';
  }
  return text;
}

/// At most `most` bytes, cut between UTF-8 characters.
std::string shortened(std::string_view text, std::size_t most) {
  if (text.size() <= most) return std::string(text);
  while (most > 0 && (static_cast<unsigned char>(text[most]) & 0xc0) == 0x80) --most;
  return std::string(text.substr(0, most)) + "...";
}

[[noreturn]] void fail_at(const std::string& place, std::string_view path, std::string_view found,
                          std::string_view accepted) {
  throw ConfigError(
      one_line(fmt::format("{}: key '{}': found {}, accepted: {}", place, shortened(path, 120), found, accepted)));
}

std::string set_text(std::string_view text) { return "--set " + shortened(text, 200); }

std::string joined(std::string_view prefix, std::string_view name) {
  return prefix.empty() ? std::string(name) : fmt::format("{}.{}", prefix, name);
}

std::string join_list(std::span<const std::string> names) {
  std::string s;
  for (const std::string& n : names) s += (s.empty() ? "" : ", ") + n;
  return s;
}

/// What a reader of an error sees of a value.
std::string describe(const toml::node& node) {
  switch (node.type()) {
    case toml::node_type::string: return "string " + quoted(shortened(node.as_string()->get(), 80));
    case toml::node_type::integer: return fmt::format("integer {}", node.as_integer()->get());
    case toml::node_type::floating_point: return "float " + float_text(node.as_floating_point()->get());
    case toml::node_type::boolean: return node.as_boolean()->get() ? "boolean true" : "boolean false";
    case toml::node_type::array: return fmt::format("an array of {} values", node.as_array()->size());
    case toml::node_type::table: return "a table";
    case toml::node_type::date: return "a date";
    case toml::node_type::time: return "a time";
    case toml::node_type::date_time: return "a date and time";
    case toml::node_type::none: break;
  }
  return "nothing";
}

std::string text_of(const Integers& accepted) {
  const bool open = accepted.most == std::numeric_limits<std::int64_t>::max();
  return open ? fmt::format("an integer >= {}", accepted.least)
              : fmt::format("an integer from {} to {}", accepted.least, accepted.most);
}

std::string text_of(const Reals& accepted) {
  std::string s = fmt::format("a number {} {}", accepted.without_least ? ">" : ">=", accepted.least);
  if (std::isfinite(accepted.most)) s += fmt::format(" and {} {}", accepted.without_most ? "<" : "<=", accepted.most);
  return s;
}

std::string text_of(const Strings& accepted) { return accepted.accepted; }

std::string text_of(std::span<const std::string_view> words) {
  std::string s;
  for (const std::string_view w : words) s += (s.empty() ? "" : ", ") + quoted(w);
  return s;
}

std::string text_of_array(const std::string& element, std::size_t least_size) {
  return fmt::format("an array{}, each {}", least_size > 0 ? fmt::format(" of {} or more", least_size) : "", element);
}

toml::table parse_text(std::string_view text, std::string_view file_name) {
  const auto fail_line = [&](std::size_t line, std::string_view what) {
    throw ConfigError(one_line(fmt::format("{}:{}: not TOML: {}", file_name, line, what)));
  };
  if (const auto refusal = refuse_toml(text)) fail_line(refusal->line, refusal->reason);
  try {
    return toml::parse(text);
  } catch (const toml::parse_error& e) {
    fail_line(e.source().begin.line, shortened(e.description(), 300));
  }
  return {};
}

struct Override {
  std::string text;     // "key.path=value"
  toml::table content;  // its value under "value"
  const toml::node& node() const { return *content.get("value"); }
};

using Overrides = std::map<std::string, Override>;  // by path

bool is_bare(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9'); }
bool is_key_character(char c) { return is_bare(c) || c == '_' || c == '-'; }
bool is_word_character(char c) { return is_bare(c) || std::string_view("_-./~:+@%").find(c) != std::string_view::npos; }

/// Names of key characters with one dot between.
bool is_path(std::string_view path) {
  char previous = '.';
  for (const char c : path) {
    if (c == '.' ? previous == '.' : !is_key_character(c)) return false;
    previous = c;
  }
  return previous != '.';
}

Overrides parse_overrides(std::span<const std::string> texts) {
  Overrides result;
  for (const std::string& text : texts) {
    const std::size_t equals = text.find('=');
    const std::string path = text.substr(0, equals);
    if (equals == std::string::npos) fail_at(set_text(text), path, "no '='", "key.path=value");
    if (!is_path(path)) fail_at(set_text(text), path, "no key", "names of letters, digits, _ and - with dots between");
    const std::string value = text.substr(equals + 1);
    const auto refuse = [&](std::string_view why) {
      fail_at(set_text(text), path, fmt::format("no TOML value ({})", why),
              "a TOML value on one line, or a bare word of letters, digits and _-./~:+@%");
    };
    if (value.find_first_of("\r\n") != std::string::npos) refuse("line break");
    if (const auto refusal = refuse_toml(value)) refuse(refusal->reason);
    Override entry{text, {}};
    try {
      entry.content = toml::parse("value = " + value);
    } catch (const toml::parse_error& e) {
      if (value.empty() || !std::all_of(value.begin(), value.end(), is_word_character)) {
        refuse(shortened(e.description(), 300));
      }
      entry.content.insert("value", value);
    }
    result.insert_or_assign(path, std::move(entry));
  }
  return result;
}

class Reader final : public SchemaVisitor {
 public:
  Reader(std::string_view file_name, const toml::table& root, const Overrides& overrides)
      : origins_(std::string(file_name)), file_name_(file_name), overrides_(overrides) {
    frames_.push_back({&root, "", {}, {}});
    for (const auto& [path, o] : overrides_) origins_.add_override(path, shortened(o.text, 200));
  }

  Origins finish() {
    close();
    return std::move(origins_);
  }

  void value(const Key& key, bool& v) override {
    if (const Found f = take(key, "true or false")) {
      const auto* node = f.node->as_boolean();
      if (node == nullptr) refuse(f, "true or false");
      v = node->get();
    }
  }
  void value(const Key& key, std::int64_t& v, const Integers& accepted) override { scalar(key, v, accepted); }
  void value(const Key& key, double& v, const Reals& accepted) override { scalar(key, v, accepted); }
  void value(const Key& key, std::string& v, const Strings& accepted) override { scalar(key, v, accepted); }

  void word(const Key& key, std::size_t& v, std::span<const std::string_view> words) override {
    if (const Found f = take(key, text_of(words))) {
      const auto* node = f.node->as_string();
      if (node == nullptr) refuse(f, text_of(words));
      const auto at = std::find(words.begin(), words.end(), std::string_view(node->get()));
      if (at == words.end()) {
        refuse(f, text_of(words) + nearest_hint(node->get(), std::vector<std::string>(words.begin(), words.end())));
      }
      v = static_cast<std::size_t>(at - words.begin());
    }
  }

  void array(const Key& key, std::vector<std::int64_t>& v, const Integers& accepted, std::size_t least) override {
    elements(key, v, text_of(accepted), least, [&](const Found& f, std::int64_t& e) { convert(f, accepted, e); });
  }
  void array(const Key& key, std::vector<double>& v, const Reals& accepted, std::size_t least) override {
    elements(key, v, text_of(accepted), least, [&](const Found& f, double& e) { convert(f, accepted, e); });
  }
  void array(const Key& key, std::vector<std::string>& v, const Strings& accepted, std::size_t least) override {
    elements(key, v, text_of(accepted), least, [&](const Found& f, std::string& e) { convert(f, accepted, e); });
  }
  void array(const Key& key, std::vector<IntegerPair>& v, const Integers& accepted, std::size_t least) override {
    const std::string pair_text = fmt::format("an array of two, each {}", text_of(accepted));
    elements(key, v, pair_text, least, [&](const Found& f, IntegerPair& e) {
      const toml::array* pair = f.node->as_array();
      if (pair == nullptr || pair->size() != e.size()) refuse(f, pair_text);
      for (std::size_t i = 0; i < e.size(); ++i) convert(element(f, *pair, i), accepted, e[i]);
    });
  }

  void section(const Key& key, const std::function<void()>& keys) override {
    frames_.back().keys.push_back({key.name, Kind::section});
    const std::string path = joined(frames_.back().path, key.name);
    const toml::node* node = in_file(key.name);
    if (node != nullptr && !node->is_table()) refuse({node, path, nullptr}, fmt::format("a table [{}]", path));
    open(path, node, keys);
  }

 protected:
  void list_of_tables(const Key& key, std::size_t, const std::function<void(std::size_t)>& resize,
                      const std::function<void(std::size_t)>& entry) override {
    frames_.back().keys.push_back({key.name, Kind::list});
    const std::string path = joined(frames_.back().path, key.name);
    const toml::node* node = in_file(key.name);
    const toml::array* tables = node == nullptr ? nullptr : node->as_array();
    const std::string accepted = fmt::format("tables [[{}]]", path);
    if (node != nullptr && tables == nullptr) refuse({node, path, nullptr}, accepted);
    const std::size_t size = tables == nullptr ? 0 : tables->size();
    refuse_overrides_outside(path, size);
    resize(size);
    for (std::size_t i = 0; i < size; ++i) {
      const Found f = element({tables, path, nullptr}, *tables, i);
      if (!f.node->is_table()) refuse(f, accepted);
      open(f.path, f.node, [&] { entry(i); });
    }
  }

 private:
  enum class Kind { value, section, list };
  struct Shown {
    std::string name;
    Kind kind;
  };
  struct Missing {
    std::string path, accepted;
  };
  /// The table that is being read; null when the file does not have it.
  struct Frame {
    const toml::table* table;
    std::string path;
    std::vector<Shown> keys;
    std::vector<Missing> missing;
  };
  /// A given value, its path, and the override that it comes from (null: the file).
  struct Found {
    const toml::node* node;
    std::string path;
    const Override* from;
    explicit operator bool() const { return node != nullptr; }
  };

  std::string place(std::size_t line) const { return fmt::format("{}:{}", file_name_, line); }
  std::string place(const Found& f) const {
    return f.from != nullptr ? set_text(f.from->text) : place(f.node->source().begin.line);
  }
  [[noreturn]] void refuse(const Found& f, std::string_view accepted) const {
    fail_at(place(f), f.path, describe(*f.node), accepted);
  }

  const toml::node* in_file(const char* name) const {
    const toml::table* table = frames_.back().table;
    return table == nullptr ? nullptr : table->get(name);
  }

  /// The value of a key of the open table, from an override or else from the file.
  Found take(const Key& key, const std::string& accepted) {
    Frame& frame = frames_.back();
    frame.keys.push_back({key.name, Kind::value});
    Found f{in_file(key.name), joined(frame.path, key.name), nullptr};
    if (f) origins_.add_line(f.path, f.node->source().begin.line);
    if (const auto o = overrides_.find(f.path); o != overrides_.end()) {
      f.from = &o->second;
      f.node = &o->second.node();
    }
    if (!f && key.required) frame.missing.push_back({f.path, accepted});
    return f;
  }

  static Found element(const Found& f, const toml::array& array, std::size_t i) {
    return {array.get(i), joined(f.path, std::to_string(i)), f.from};
  }

  void convert(const Found& f, const Integers& accepted, std::int64_t& v) const {
    const auto* node = f.node->as_integer();
    if (node == nullptr || node->get() < accepted.least || node->get() > accepted.most) refuse(f, text_of(accepted));
    v = node->get();
  }
  void convert(const Found& f, const Reals& accepted, double& v) const {
    constexpr std::int64_t most_exact = std::int64_t{1} << 53;
    const auto* integer = f.node->as_integer();
    if (integer != nullptr && (integer->get() < -most_exact || integer->get() > most_exact)) {
      refuse(f, "an integer that a double holds exactly, or a float");
    }
    if (integer == nullptr && !f.node->is_floating_point()) refuse(f, text_of(accepted));
    const double x = integer != nullptr ? static_cast<double>(integer->get()) : f.node->as_floating_point()->get();
    const bool above = accepted.without_least ? x > accepted.least : x >= accepted.least;
    const bool below = accepted.without_most ? x < accepted.most : x <= accepted.most;
    if (!std::isfinite(x) || !above || !below) refuse(f, text_of(accepted));
    v = x;
  }
  void convert(const Found& f, const Strings& accepted, std::string& v) const {
    const auto* node = f.node->as_string();
    if (node == nullptr) refuse(f, text_of(accepted));
    if (accepted.problem != nullptr) {
      const std::string problem = accepted.problem(node->get());
      if (!problem.empty()) {
        fail_at(place(f), f.path, fmt::format("{} ({})", describe(*node), problem), text_of(accepted));
      }
    }
    v = node->get();
  }

  template <class T, class Rule>
  void scalar(const Key& key, T& v, const Rule& accepted) {
    if (const Found f = take(key, text_of(accepted))) convert(f, accepted, v);
  }

  template <class T, class F>
  void elements(const Key& key, std::vector<T>& v, const std::string& each, std::size_t least, const F& read) {
    const std::string accepted = text_of_array(each, least);
    const Found f = take(key, accepted);
    if (!f) return;
    const toml::array* array = f.node->as_array();
    if (array == nullptr || array->size() < least) refuse(f, accepted);
    v.assign(array->size(), T{});
    for (std::size_t i = 0; i < v.size(); ++i) read(element(f, *array, i), v[i]);
  }

  void open(const std::string& path, const toml::node* node, const std::function<void()>& keys) {
    if (node != nullptr) origins_.add_line(path, node->source().begin.line);
    frames_.push_back({node == nullptr ? nullptr : node->as_table(), path, {}, {}});
    keys();
    close();
  }

  /// Leaves a table: what it holds beyond its keys is an error, told before the keys that it lacks, since a misspelt
  /// key is both.
  void close() {
    const Frame& frame = frames_.back();
    if (frame.table != nullptr) {
      const toml::key* unknown = nullptr;  // the first in the file
      for (const auto& [name, node] : *frame.table) {
        if (find(frame, name.str()) != nullptr) continue;
        if (unknown == nullptr || name.source().begin.line < unknown->source().begin.line) unknown = &name;
      }
      if (unknown != nullptr) refuse_unknown(place(unknown->source().begin.line), frame, unknown->str());
    }
    for (const auto& [path, o] : overrides_) refuse_stray_override(frame, path, o);
    if (!frame.missing.empty()) {
      fail_at(origins_.of(frame.path), frame.missing.front().path, "nothing", frame.missing.front().accepted);
    }
    frames_.pop_back();
  }

  static const Shown* find(const Frame& frame, std::string_view name) {
    const auto at = std::find_if(frame.keys.begin(), frame.keys.end(), [&](const Shown& s) { return s.name == name; });
    return at == frame.keys.end() ? nullptr : &*at;
  }

  [[noreturn]] static void refuse_unknown(const std::string& at, const Frame& frame, std::string_view name) {
    std::vector<std::string> names;
    for (const Shown& s : frame.keys) names.push_back(s.name);
    fail_at(at, joined(frame.path, name), "an unknown key", join_list(names) + nearest_hint(name, names));
  }

  /// The part of `path` below `parent`; nothing when it is not below.
  static std::optional<std::string_view> below(std::string_view parent, std::string_view path) {
    if (parent.empty()) return path;
    if (!path.starts_with(parent) || path.size() <= parent.size() || path[parent.size()] != '.') return std::nullopt;
    return path.substr(parent.size() + 1);
  }

  /// An override that reaches into the table of `frame` must end at a value, or go on into a section or list.
  static void refuse_stray_override(const Frame& frame, const std::string& path, const Override& o) {
    const auto rest = below(frame.path, path);
    if (!rest) return;
    const std::string_view name = rest->substr(0, rest->find('.'));
    const bool ends = name.size() == rest->size();
    const Shown* key = find(frame, name);
    if (key == nullptr) refuse_unknown(set_text(o.text), frame, name);
    if (key->kind == Kind::value && !ends) {
      fail_at(set_text(o.text), path, "a path below a value", fmt::format("{} as a whole", joined(frame.path, name)));
    }
    if (key->kind == Kind::section && ends)
      fail_at(set_text(o.text), path, "a section", "one of its keys: " + path + ".KEY");
    if (key->kind == Kind::list && ends) {
      fail_at(set_text(o.text), path, "a list of tables", "a key of one entry: " + path + ".INDEX.KEY");
    }
  }

  /// Overrides reach entries that the file has; they cannot add any.
  void refuse_overrides_outside(const std::string& list, std::size_t size) const {
    for (const auto& [path, o] : overrides_) {
      const auto rest = below(list, path);
      if (!rest) continue;
      const std::string_view index = rest->substr(0, rest->find('.'));
      bool known = false;
      for (std::size_t i = 0; i < size && !known; ++i) known = index == std::to_string(i);
      if (!known || index.size() == rest->size()) {
        fail_at(set_text(o.text), path, known ? "an entry" : fmt::format("entry '{}'", index),
                size == 0 ? fmt::format("nothing, the file has no [[{}]]", list)
                          : fmt::format("{}.INDEX.KEY with INDEX from 0 to {}", list, size - 1));
      }
    }
  }

  Origins origins_;
  std::string file_name_;
  const Overrides& overrides_;
  std::vector<Frame> frames_;
};

class Writer final : public SchemaVisitor {
 public:
  std::string finish() { return std::move(text_); }

  void value(const Key& key, bool& v) override { line(key, v ? "true" : "false"); }
  void value(const Key& key, std::int64_t& v, const Integers&) override { line(key, std::to_string(v)); }
  void value(const Key& key, double& v, const Reals&) override { line(key, float_text(v)); }
  void value(const Key& key, std::string& v, const Strings&) override { line(key, quoted(v)); }
  void word(const Key& key, std::size_t& v, std::span<const std::string_view> words) override {
    line(key, quoted(words[v]));
  }
  void array(const Key& key, std::vector<std::int64_t>& v, const Integers&, std::size_t) override {
    line(key, array_text(v, [](std::int64_t e) { return std::to_string(e); }));
  }
  void array(const Key& key, std::vector<double>& v, const Reals&, std::size_t) override {
    line(key, array_text(v, float_text));
  }
  void array(const Key& key, std::vector<std::string>& v, const Strings&, std::size_t) override {
    line(key, array_text(v, quoted));
  }
  void array(const Key& key, std::vector<IntegerPair>& v, const Integers&, std::size_t) override {
    line(key, array_text(v, [](const IntegerPair& e) { return fmt::format("[{}, {}]", e[0], e[1]); }));
  }
  void section(const Key& key, const std::function<void()>& keys) override {
    table(key, joined(path_, key.name), "[", "]", keys);
  }

 protected:
  void list_of_tables(const Key& key, std::size_t size, const std::function<void(std::size_t)>&,
                      const std::function<void(std::size_t)>& entry) override {
    const std::string path = joined(path_, key.name);
    if (size == 0) text_ += fmt::format("\n# {}\n# No [[{}]].\n", key.description, path);
    for (std::size_t i = 0; i < size; ++i) table(key, path, "[[", "]]", [&] { entry(i); });
  }

 private:
  void line(const Key& key, const std::string& value) {
    text_ += fmt::format("# {}\n{} = {}\n", key.description, key.name, value);
  }
  void table(const Key& key, const std::string& path, const char* left, const char* right,
             const std::function<void()>& keys) {
    if (!text_.empty()) text_ += "\n";
    text_ += fmt::format("# {}\n{}{}{}\n", key.description, left, path, right);
    const std::string outer = std::exchange(path_, path);
    keys();
    path_ = outer;
  }
  template <class T, class F>
  static std::string array_text(const std::vector<T>& v, const F& text) {
    std::string s;
    for (const T& e : v) s += (s.empty() ? "" : ", ") + text(e);
    return "[" + s + "]";
  }

  std::string path_;
  std::string text_;
};

std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::size_t diagonal = std::exchange(row[0], i + 1);
    for (std::size_t j = 0; j < b.size(); ++j) {
      const std::size_t replaced = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replaced, row[j] + 1, diagonal + 1});
    }
  }
  return row.back();
}

}  // namespace

std::string Origins::of(std::string path) const {
  for (;;) {
    if (const auto o = overrides_.find(path); o != overrides_.end()) return o->second;
    if (const auto l = lines_.find(path); l != lines_.end()) return fmt::format("{}:{}", file_name_, l->second);
    const std::size_t dot = path.rfind('.');
    path.resize(dot == std::string::npos ? 0 : dot);
  }
}

void Origins::contradiction(std::span<const std::string> paths, std::string_view found,
                            std::string_view accepted) const {
  const auto in = [&](const auto& map) {
    return std::find_if(paths.begin(), paths.end(), [&](const std::string& p) { return map.contains(p); });
  };
  auto told = in(overrides_);
  if (told == paths.end()) told = in(lines_);
  const std::string& path = told == paths.end() ? paths.front() : *told;
  fail_at(of(path), path, found, accepted);
}

Origins read_toml(std::string_view text, std::string_view file_name, std::span<const std::string> override_texts,
                  const Schema& schema) {
  const toml::table root = parse_text(text, file_name);
  const Overrides overrides = parse_overrides(override_texts);
  Reader reader(file_name, root, overrides);
  schema(reader);
  return reader.finish();
}

std::string write_toml(const Schema& schema) {
  Writer writer;
  schema(writer);
  return writer.finish();
}

std::string quoted(std::string_view text) {
  std::string s = "\"";
  for (const char c : text) {
    const auto u = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      s += {'\\', c};
    } else if (u < 0x20 || u == 0x7f) {
      s += fmt::format("\\u{:04X}", u);
    } else {
      s += c;
    }
  }
  return s + "\"";
}

std::string float_text(double value) {
  std::string s = fmt::format("{}", value);
  if (s.find_first_not_of("-0123456789") == std::string::npos) s += ".0";  // TOML would read an integer
  return s;
}

std::string nearest_hint(std::string_view wrong, std::span<const std::string> names) {
  constexpr std::size_t longest = 64;  // longer than any name; bounds the work
  if (wrong.size() > longest) return "";
  const std::string* nearest = nullptr;
  std::size_t least = std::max<std::size_t>(2, wrong.size() / 3) + 1;  // a third of the letters wrong is no misspelling
  for (const std::string& name : names) {
    const std::size_t d = edit_distance(wrong, name);
    if (d < least && d < name.size()) {
      least = d;
      nearest = &name;
    }
  }
  return nearest == nullptr ? "" : fmt::format("; did you mean '{}'?", *nearest);
}

}  // namespace deltapipe
