#include "core/error.h"
#include "data/token_dataset.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace deltapipe {
namespace fs = std::filesystem;
namespace {

fs::path folder_of(const fs::path& path) { return path.has_parent_path() ? path.parent_path() : fs::path("."); }

}  // namespace

/// An unnamed file of integers: written in order, then read in order. Gone with the process, however it ends.
struct TokenDatasetWriter::Spool {
  explicit Spool(const fs::path& path) : dataset(path) {
    std::string name = (folder_of(path) / ".deltapipe-spool-XXXXXX").string();
    const int fd = mkostemp(name.data(), O_CLOEXEC);
    if (fd < 0) refuse("create a file in");
    unlink(name.c_str());
    stream = fdopen(fd, "w+b");
    if (stream == nullptr) {
      close(fd);
      refuse("create a file in");
    }
    std::setvbuf(stream, nullptr, _IOFBF, std::size_t{1} << 20);
  }
  ~Spool() { std::fclose(stream); }
  Spool(const Spool&) = delete;
  Spool& operator=(const Spool&) = delete;

  [[noreturn]] void refuse(const char* verb) const {
    fail<IoError>("{}: cannot {} its folder: {}", dataset.string(), verb, std::strerror(errno));
  }

  template <class T>
  void write(std::span<const T> values) {
    if (values.empty()) return;
    if (std::fwrite(values.data(), sizeof(T), values.size(), stream) != values.size()) refuse("write into");
  }

  /// From writing to reading.
  void rewind() {
    if (std::fflush(stream) != 0 || std::fseek(stream, 0, SEEK_SET) != 0) refuse("write into");
  }

  /// Copies all into `dataset`, which holds exactly as many elements.
  template <class T>
  void copy_to(hdf5::Dataset to) {
    std::vector<T> block(std::size_t{1} << 18);
    for (std::int64_t done = 0; done < to.numel();) {
      const auto want = std::min(block.size(), static_cast<std::size_t>(to.numel() - done));
      if (std::fread(block.data(), sizeof(T), want, stream) != want) refuse("read back a file in");
      to.write(done, Tensor(block.data(), dtype_of<T>, {static_cast<std::int64_t>(want)}));
      done += static_cast<std::int64_t>(want);
    }
  }

  fs::path dataset;  // the file that it is for, as messages name it
  std::FILE* stream = nullptr;
};

TokenDatasetWriter::TokenDatasetWriter(const fs::path& path, const TokenDatasetInfo& info)
    : path_(path),
      temporary_(folder_of(path) / fmt::format(".{}.tmp.{}", path.filename().string(), getpid())),
      info_(info),
      token_spool_(std::make_unique<Spool>(path)),
      offset_spool_(std::make_unique<Spool>(path)) {
  const auto limit = static_cast<std::int64_t>(info.vocabulary);
  require(info.vocabulary > 0 && info.vocabulary <= TokenDatasetInfo::max_vocabulary,
          "TokenDatasetWriter: impossible vocabulary");
  require(info.bos >= -1 && info.bos < limit && info.eos >= -1 && info.eos < limit,
          "TokenDatasetWriter: bos or eos outside the vocabulary");
  if (fs::is_directory(path)) fail<IoError>("cannot write {}: it is a folder", path.string());
  offset_spool_->write(std::span<const std::uint64_t>(&document_begin_, 1));
}

TokenDatasetWriter::~TokenDatasetWriter() {
  if (!finished_) unlink(temporary_.c_str());
}

void TokenDatasetWriter::append(std::span<const std::uint32_t> document) {
  append_part(document);
  end_document();
}

void TokenDatasetWriter::append_part(std::span<const std::uint32_t> tokens) {
  require(!completed_, "TokenDatasetWriter: nothing can follow complete()");
  for (const std::uint32_t id : tokens) require(id < info_.vocabulary, "TokenDatasetWriter: id outside the vocabulary");
  token_spool_->write(tokens);
  tokens_ += tokens.size();
}

void TokenDatasetWriter::end_document() {
  require(!completed_, "TokenDatasetWriter: nothing can follow complete()");
  require(tokens_ > document_begin_, "TokenDatasetWriter: an empty document");
  document_begin_ = tokens_;
  offset_spool_->write(std::span<const std::uint64_t>(&document_begin_, 1));
  ++documents_;
}

void TokenDatasetWriter::complete() {
  if (completed_) return;
  require(tokens_ == document_begin_, "TokenDatasetWriter: the last document was not ended");
  if (documents_ == 0) fail<FormatError>("{}: no document to write", path_.string());
  token_spool_->rewind();
  offset_spool_->rewind();
  hdf5::File file = hdf5::File::create(temporary_, true);
  file.set_attribute("/", "format", "deltapipe-tokens");
  file.set_attribute("/", "version", std::uint64_t{1});
  file.set_attribute("/", "tokenizer", info_.tokenizer);
  file.set_attribute("/", "tokenizer_hash", info_.tokenizer_hash);
  file.set_attribute("/", "vocabulary", info_.vocabulary);
  file.set_attribute("/", "bos", info_.bos);
  file.set_attribute("/", "eos", info_.eos);
  token_spool_->copy_to<std::uint32_t>(
      file.create_dataset("/tokens", DType::u32, {static_cast<std::int64_t>(tokens_)}));
  offset_spool_->copy_to<std::uint64_t>(
      file.create_dataset("/document_offsets", DType::u64, {static_cast<std::int64_t>(documents_ + 1)}));
  file.close();
  sync_path(temporary_);
  token_spool_.reset();  // frees the space
  offset_spool_.reset();
  completed_ = true;
}

void TokenDatasetWriter::finish() {
  require(!finished_, "TokenDatasetWriter: finished twice");
  complete();
  if (rename(temporary_.c_str(), path_.c_str()) != 0) {
    fail<IoError>("cannot rename {} to {}: {}", temporary_.string(), path_.string(), std::strerror(errno));
  }
  finished_ = true;
  sync_path(folder_of(path_));
}

}  // namespace deltapipe
