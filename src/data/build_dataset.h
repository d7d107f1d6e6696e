// Token datasets of the byte vocabulary, straight from text: what `deltapipe data` runs. For real tokenizers there is
// tools/tokenize_corpus.py, which writes the same format.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace deltapipe {

struct BuildOptions {
  /// Files, and folders that are searched through in the order of their names (hidden entries and the outputs are
  /// passed over). A *.jsonl file holds one JSON object a line with its text under `field`; any other is one document,
  /// taken byte by byte.
  std::vector<std::filesystem::path> inputs;
  std::filesystem::path out;
  std::filesystem::path validation;   // empty: everything goes to `out`
  double validation_fraction = 0.05;  // of the documents, rounded; at least one stays on either side
  std::uint64_t seed = 1;             // of the choice of validation documents
  std::string field = "text";
  std::vector<std::string> suffixes;  // files in folders must end with one of them (".txt"); empty: all do
};

struct BuildCounts {
  std::uint64_t documents = 0;
  std::uint64_t tokens = 0;  // bytes and one eos a document
  std::uint64_t bytes = 0;   // of text
};

struct BuildReport {
  std::uint64_t files = 0;
  std::uint64_t empty_documents = 0;  // left out
  BuildCounts train;
  BuildCounts validation;
};

/// Writes `out` and `validation`, both or neither (but for a crash between two renames). Memory is bounded by the
/// longest line of a JSONL file. Throws UsageError for contradictory options or nothing to read, FormatError naming
/// FILE:LINE for a bad line, IoError.
BuildReport build_dataset(const BuildOptions& options);

}  // namespace deltapipe
