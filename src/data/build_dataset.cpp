#include "data/build_dataset.h"

#include "core/error.h"
#include "data/byte_vocabulary.h"
#include "data/sequence_order.h"
#include "data/token_dataset.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <fstream>
#include <optional>
#include <string_view>

namespace deltapipe {
namespace fs = std::filesystem;
namespace {

// ---------------------------------------------------------------------------------------------------- finding files

bool is_hidden(const fs::path& path) { return path.filename().string().starts_with('.'); }

bool has_suffix(const fs::path& path, const std::vector<std::string>& suffixes) {
  const std::string name = path.filename().string();
  return suffixes.empty() ||
         std::any_of(suffixes.begin(), suffixes.end(), [&](const std::string& s) { return name.ends_with(s); });
}

bool is_output(const fs::path& path, const BuildOptions& options) {
  const fs::path here = fs::weakly_canonical(path);
  return here == fs::weakly_canonical(options.out) ||
         (!options.validation.empty() && here == fs::weakly_canonical(options.validation));
}

std::vector<fs::path> files_in(const fs::path& folder, const BuildOptions& options) {
  std::vector<fs::path> files;
  std::error_code ec;
  fs::recursive_directory_iterator it(folder, ec);
  for (; !ec && it != fs::recursive_directory_iterator(); it.increment(ec)) {
    if (is_hidden(it->path())) {
      it.disable_recursion_pending();
      continue;
    }
    std::error_code gone;
    if (it->is_regular_file(gone) && has_suffix(it->path(), options.suffixes) && !is_output(it->path(), options)) {
      files.push_back(it->path());
    }
  }
  if (ec) fail<IoError>("cannot search folder {}: {}", folder.string(), ec.message());
  std::sort(files.begin(), files.end());
  return files;
}

std::vector<fs::path> find_files(const BuildOptions& options) {
  std::vector<fs::path> files;
  for (const fs::path& input : options.inputs) {
    std::error_code ec;
    if (fs::is_directory(input, ec)) {
      const auto found = files_in(input, options);
      files.insert(files.end(), found.begin(), found.end());
    } else if (is_output(input, options)) {
      fail<UsageError>("{} is both an input and an output", input.string());
    } else {
      files.push_back(input);
    }
  }
  if (files.empty()) fail<UsageError>("no input files: the given folders hold none with an accepted name");
  constexpr std::array<std::string_view, 6> not_text = {".gz", ".zst", ".xz", ".bz2", ".zip", ".parquet"};
  for (const fs::path& file : files) {
    if (std::find(not_text.begin(), not_text.end(), file.extension().string()) != not_text.end()) {
      fail<UsageError>("{}: {} files are not read; unpack it to text or .jsonl, or pass it over with --suffix",
                       file.string(), file.extension().string());
    }
  }
  return files;
}

// -------------------------------------------------------------------------------------------------- reading documents

[[noreturn]] void fail_reading(const char* verb, const fs::path& path) {
  fail<IoError>("cannot {} {}: {}", verb, path.string(), std::strerror(errno));
}

std::ifstream open_input(const fs::path& path) {
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  if (!file) fail_reading("open", path);
  return file;
}

/// visit(part of a document, whether it is the last part) for a file that is one document.
template <class Visit>
void read_text(const fs::path& path, const Visit& visit) {
  std::ifstream file = open_input(path);
  std::vector<char> block(std::size_t{1} << 20);
  do {
    file.read(block.data(), static_cast<std::streamsize>(block.size()));
    if (file.bad()) fail_reading("read", path);
    visit(std::string_view(block.data(), static_cast<std::size_t>(file.gcount())), !file);
  } while (file);
}

/// The text of one line of a JSONL file.
std::string parse_line(const std::string& line, const std::string& field, const std::string& place) {
  nlohmann::json record;
  try {
    record = nlohmann::json::parse(line);
  } catch (const nlohmann::json::exception& e) {
    const std::string_view what = e.what();  // "[json.exception.parse_error.101] parse error at line 1, column ..."
    const auto bracket = what.find("] ");
    fail<FormatError>("{}: not JSON: {}", place, bracket == what.npos ? what : what.substr(bracket + 2));
  }
  const auto found = record.is_object() ? record.find(field) : record.end();
  if (!record.is_object() || found == record.end()) {
    fail<FormatError>("{}: expected a JSON object with the key \"{}\"", place, field);
  }
  if (!found->is_string()) {
    fail<FormatError>("{}: \"{}\" is {}, expected a string", place, field, found->type_name());
  }
  return found->get<std::string>();
}

template <class Visit>
void read_jsonl(const fs::path& path, const std::string& field, const Visit& visit) {
  std::ifstream file = open_input(path);
  std::string line;
  for (std::uint64_t number = 1; std::getline(file, line); ++number) {
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    visit(parse_line(line, field, fmt::format("{}:{}", path.string(), number)), true);
  }
  if (file.bad()) fail_reading("read", path);
}

template <class Visit>
void read_documents(const std::vector<fs::path>& files, const std::string& field, const Visit& visit) {
  for (const fs::path& path : files) {
    if (path.extension() == ".jsonl") {
      read_jsonl(path, field, visit);
    } else {
      read_text(path, visit);
    }
  }
}

/// Documents that are not empty.
std::uint64_t count_documents(const std::vector<fs::path>& files, const std::string& field) {
  std::uint64_t count = 0;
  bool any = false;
  read_documents(files, field, [&](std::string_view part, bool last) {
    any = any || !part.empty();
    if (!last) return;
    count += any ? 1 : 0;
    any = false;
  });
  return count;
}

void check_options(const BuildOptions& options) {
  if (options.inputs.empty()) fail<UsageError>("no inputs: give files or folders");
  if (options.out.empty()) fail<UsageError>("no output: give --out FILE.h5");
  if (options.validation.empty()) return;
  if (fs::weakly_canonical(options.out) == fs::weakly_canonical(options.validation)) {
    fail<UsageError>("{} is both --out and --validation", options.out.string());
  }
  if (!(options.validation_fraction > 0 && options.validation_fraction < 1)) {
    fail<UsageError>("--validation-fraction is {}, expected more than 0 and less than 1", options.validation_fraction);
  }
}

/// A dataset being written, with its counts.
struct Side {
  Side(const fs::path& path, BuildCounts& c)
      : writer(path, {std::string(byte_vocabulary::name), byte_vocabulary::tokenizer_hash(), byte_vocabulary::size,
                      byte_vocabulary::bos, byte_vocabulary::eos}),
        counts(c) {}
  TokenDatasetWriter writer;
  BuildCounts& counts;
};

}  // namespace

BuildReport build_dataset(const BuildOptions& options) {
  check_options(options);
  const std::vector<fs::path> files = find_files(options);
  BuildReport report;
  report.files = files.size();

  std::uint64_t documents = 0;   // known only when there is a split
  std::uint64_t validation = 0;  // how many of them are set aside
  if (!options.validation.empty()) {
    documents = count_documents(files, options.field);
    if (documents < 2) {
      fail<UsageError>("the inputs hold {} documents with text; --validation needs at least two", documents);
    }
    const double share = options.validation_fraction * static_cast<double>(documents);
    validation = std::clamp<std::uint64_t>(static_cast<std::uint64_t>(std::llround(share)), 1, documents - 1);
  }
  constexpr std::uint64_t split = ~std::uint64_t{0};  // an epoch that no run reaches: its own permutation
  const auto is_validation = [&](std::uint64_t document) {
    if (validation == 0) return false;
    if (document >= documents) fail<IoError>("the inputs changed while they were read");
    return sequence_order(options.seed, split, document, documents) < validation;
  };

  Side train(options.out, report.train);
  std::optional<Side> held_out;
  if (validation > 0) held_out.emplace(options.validation, report.validation);

  Side* side = nullptr;  // where the current document goes; none before its first byte
  std::uint64_t index = 0;
  std::vector<std::uint32_t> ids;
  read_documents(files, options.field, [&](std::string_view part, bool last) {
    if (side == nullptr && !part.empty()) side = is_validation(index++) ? &*held_out : &train;
    if (side == nullptr) {
      report.empty_documents += last ? 1 : 0;
      return;
    }
    ids.clear();
    byte_vocabulary::encode(part, ids);
    if (last) ids.push_back(byte_vocabulary::eos);
    side->writer.append_part(ids);
    side->counts.bytes += part.size();
    side->counts.tokens += ids.size();
    if (!last) return;
    side->writer.end_document();
    ++side->counts.documents;
    side = nullptr;
  });

  if (report.train.documents == 0) fail<UsageError>("the inputs hold no document with any text");
  train.writer.complete();
  if (held_out) held_out->writer.complete();
  train.writer.finish();
  if (held_out) held_out->writer.finish();
  return report;
}

}  // namespace deltapipe
