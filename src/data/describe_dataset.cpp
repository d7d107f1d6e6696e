#include "data/describe_dataset.h"

#include "data/byte_vocabulary.h"
#include "data/token_dataset.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <vector>

namespace deltapipe {
namespace {

/// One printable ASCII line: special tokens by name, other bytes escaped.
std::string show_bytes(std::span<const std::uint32_t> ids) {
  std::string line;
  for (const std::uint32_t id : ids) {
    if (id == byte_vocabulary::bos) {
      line += "<bos>";
    } else if (id == byte_vocabulary::eos) {
      line += "<eos>";
    } else if (id == '\n') {
      line += "\\n";
    } else if (id == '\t') {
      line += "\\t";
    } else if (id < 0x20 || id >= 0x7f) {
      line += fmt::format("\\x{:02x}", id);
    } else {
      line += static_cast<char>(id);
    }
  }
  return line;
}

}  // namespace

std::string describe_dataset(const std::filesystem::path& path) {
  const TokenDataset dataset(path);
  std::uint64_t longest = 0;
  for (std::uint64_t d = 0; d < dataset.documents(); ++d) {
    longest = std::max(longest, dataset.document_begin(d + 1) - dataset.document_begin(d));
  }
  const double mean = static_cast<double>(dataset.size()) / static_cast<double>(dataset.documents());
  std::vector<std::uint32_t> first(std::min<std::uint64_t>(dataset.size(), 64));
  dataset.read(0, first);
  const bool bytes = dataset.tokenizer_hash() == byte_vocabulary::tokenizer_hash();

  std::string table;
  const auto row = [&](const char* name, const auto& value) {
    fmt::format_to(std::back_inserter(table), "{:<18}{}\n", name, value);
  };
  const auto special = [](std::int64_t id) { return id < 0 ? std::string("none") : fmt::format("{}", id); };
  row("token dataset", path.string());
  row("documents", dataset.documents());
  row("tokens", dataset.size());
  row("longest document", longest);
  row("mean document", fmt::format("{:.1f}", mean));
  row("tokenizer", dataset.info().tokenizer);
  row("tokenizer hash", dataset.tokenizer_hash());
  row("vocabulary", dataset.vocabulary());
  row("bos", special(dataset.bos()));
  row("eos", special(dataset.eos()));
  row("read by", dataset.is_mapped() ? "memory map" : "HDF5 (chunked or foreign layout: slower)");
  row("first tokens", bytes ? show_bytes(first) : fmt::format("{}", fmt::join(first, " ")));
  return table;
}

}  // namespace deltapipe
