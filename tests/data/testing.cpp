#include "tests/data/testing.h"

#include "core/error.h"
#include "core/random.h"

#include <sys/resource.h>

#include <csignal>
#include <cstdlib>
#include <fstream>

namespace deltapipe::testing {
namespace fs = std::filesystem;

TemporaryFolder::TemporaryFolder() {
  std::string name = (fs::temp_directory_path() / "deltapipe-test-XXXXXX").string();
  if (mkdtemp(name.data()) == nullptr) fail<IoError>("cannot make {}", name);
  path_ = name;
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}

std::set<std::string> TemporaryFolder::names() const {
  std::set<std::string> names;
  for (const auto& entry : fs::recursive_directory_iterator(path_)) {
    names.insert(entry.path().lexically_relative(path_).string());
  }
  return names;
}

fs::path write_text(const fs::path& path, std::string_view content) {
  fs::create_directories(path.parent_path());
  std::ofstream(path, std::ios::binary).write(content.data(), static_cast<std::streamsize>(content.size()));
  return path;
}

FileSizeLimit::FileSizeLimit(std::uint64_t bytes) : old_handler_(std::signal(SIGXFSZ, SIG_IGN)) {
  rlimit limit{};
  getrlimit(RLIMIT_FSIZE, &limit);
  old_limit_ = limit.rlim_cur;
  limit.rlim_cur = bytes;
  setrlimit(RLIMIT_FSIZE, &limit);
}

FileSizeLimit::~FileSizeLimit() {
  rlimit limit{};
  getrlimit(RLIMIT_FSIZE, &limit);
  limit.rlim_cur = old_limit_;
  setrlimit(RLIMIT_FSIZE, &limit);
  std::signal(SIGXFSZ, old_handler_);
}

Documents random_documents(std::uint64_t seed, std::size_t count, std::uint64_t longest, std::uint64_t vocabulary) {
  RandomStream random(seed, "documents");
  Documents documents(count);
  for (auto& document : documents) {
    document.resize(1 + random.next_below(longest));
    for (auto& id : document) id = static_cast<std::uint32_t>(random.next_below(vocabulary));
  }
  return documents;
}

void write_dataset(const fs::path& path, const TokenDatasetInfo& info, const Documents& documents) {
  TokenDatasetWriter writer(path, info);
  for (const auto& document : documents) writer.append(document);
  writer.finish();
}

Documents read_documents(const TokenDataset& dataset) {
  Documents documents(dataset.documents());
  for (std::uint64_t d = 0; d < dataset.documents(); ++d) {
    documents[d].resize(dataset.document_begin(d + 1) - dataset.document_begin(d));
    dataset.read(dataset.document_begin(d), documents[d]);
  }
  return documents;
}

std::vector<std::uint32_t> join(const Documents& documents) {
  std::vector<std::uint32_t> all;
  for (const auto& document : documents) all.insert(all.end(), document.begin(), document.end());
  return all;
}

}  // namespace deltapipe::testing
