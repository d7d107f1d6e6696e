// The strict binding between TOML and structs. A schema is a function that shows every key of a structure once to a
// SchemaVisitor; reading, overriding and printing are visitors, so that a key cannot exist in one and not in another.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace deltapipe {

struct Key {
  const char* name;
  const char* description;  // one line
  bool required = false;
};

/// Accepted integers, both ends included.
struct Integers {
  std::int64_t least = 0;
  std::int64_t most = std::numeric_limits<std::int64_t>::max();
};

/// Accepted finite numbers; an end is excluded where its flag says so.
struct Reals {
  double least = 0.0;
  double most = std::numeric_limits<double>::infinity();
  bool without_least = false;
  bool without_most = false;
};

/// Accepted strings: `problem` is null (any), or returns what is wrong with a string, empty for an accepted one.
struct Strings {
  const char* accepted = "a string";
  std::string (*problem)(const std::string&) = nullptr;
};

/// Keys of a table come before its sections and lists, as TOML prints them.
class SchemaVisitor {
 public:
  using IntegerPair = std::array<std::int64_t, 2>;

  virtual ~SchemaVisitor() = default;
  virtual void value(const Key& key, bool& v) = 0;
  virtual void value(const Key& key, std::int64_t& v, const Integers& accepted) = 0;
  virtual void value(const Key& key, double& v, const Reals& accepted) = 0;
  virtual void value(const Key& key, std::string& v, const Strings& accepted) = 0;
  /// v is an index into `words`.
  virtual void word(const Key& key, std::size_t& v, std::span<const std::string_view> words) = 0;

  // Arrays of at least `least_size` values.
  virtual void array(const Key& key, std::vector<std::int64_t>& v, const Integers& accepted,
                     std::size_t least_size) = 0;
  virtual void array(const Key& key, std::vector<double>& v, const Reals& accepted, std::size_t least_size) = 0;
  virtual void array(const Key& key, std::vector<std::string>& v, const Strings& accepted, std::size_t least_size) = 0;
  virtual void array(const Key& key, std::vector<IntegerPair>& v, const Integers& accepted, std::size_t least_size) = 0;

  virtual void section(const Key& key, const std::function<void()>& keys) = 0;
  /// [[key]] tables; keys(entry) shows the keys of one.
  template <class T, class F>
  void list(const Key& key, std::vector<T>& entries, const F& keys) {
    list_of_tables(
        key, entries.size(), [&](std::size_t n) { entries.assign(n, T{}); }, [&](std::size_t i) { keys(entries[i]); });
  }

 protected:
  virtual void list_of_tables(const Key& key, std::size_t size, const std::function<void(std::size_t)>& resize,
                              const std::function<void(std::size_t)>& entry) = 0;
};

using Schema = std::function<void(SchemaVisitor&)>;

/// Where each value came from, for the checks that follow reading.
class Origins {
 public:
  explicit Origins(std::string file_name) : file_name_(std::move(file_name)), lines_{{"", 1}} {}
  void add_line(const std::string& path, std::size_t line) { lines_[path] = line; }
  void add_override(const std::string& path, const std::string& text) { overrides_[path] = "--set " + text; }

  /// "FILE:LINE" or "--set key=value" of a key or section; of the nearest section around it when it was not given.
  std::string of(std::string path) const;
  /// Throws the ConfigError of values that contradict each other. It is told of the first of `paths` that was
  /// overridden, or else of the first that the file gives, or else of the first.
  [[noreturn]] void contradiction(std::span<const std::string> paths, std::string_view found,
                                  std::string_view accepted) const;

 private:
  std::string file_name_;
  std::map<std::string, std::size_t> lines_;
  std::map<std::string, std::string> overrides_;
};

/// Reads TOML text and overrides into what `schema` shows; keys that are not given keep their values. Throws
/// ConfigError.
Origins read_toml(std::string_view text, std::string_view file_name, std::span<const std::string> overrides,
                  const Schema& schema);
/// TOML text of every key with its description.
std::string write_toml(const Schema& schema);

/// A TOML basic string in quotes; never holds a line break.
std::string quoted(std::string_view text);
/// Shortest text of a TOML float that reads back to the same value.
std::string float_text(double value);
/// "; did you mean 'x'?" for the name nearest to `wrong`, empty when none is near.
std::string nearest_hint(std::string_view wrong, std::span<const std::string> names);

}  // namespace deltapipe
