#include "data/token_dataset.h"

#include "core/error.h"

#include <algorithm>
#include <cstring>

namespace deltapipe {
namespace {

std::uint64_t load_u64(std::span<const std::byte> bytes, std::uint64_t i) {
  std::uint64_t value;
  std::memcpy(&value, bytes.data() + i * sizeof value, sizeof value);
  return value;
}

}  // namespace

TokenDataset::TokenDataset(const std::filesystem::path& path) : path_(path) {
  file_ = hdf5::File::open(path);
  read_info(*file_);

  tokens_ = file_->dataset("/tokens");
  const hdf5::Dataset offsets = file_->dataset("/document_offsets");
  const auto check = [&](const hdf5::Dataset& d, const char* object, DType dtype, std::int64_t least) {
    if (d.dtype() != dtype) {
      fail<FormatError>("{}: holds {}, expected {}", name_of_object(object), name_of(d.dtype()), name_of(dtype));
    }
    if (d.shape().rank() != 1 || d.numel() < least) {
      fail<FormatError>("{}: shape is {}, expected one dimension of {} or more", name_of_object(object),
                        d.shape().str(), least);
    }
  };
  check(*tokens_, "/tokens", DType::u32, 1);
  check(offsets, "/document_offsets", DType::u64, 2);
  size_ = static_cast<std::uint64_t>(tokens_->numel());
  documents_ = static_cast<std::uint64_t>(offsets.numel()) - 1;

  map_.emplace(path);
  offset_bytes_ = mapped(offsets, "/document_offsets");
  if (offset_bytes_.empty()) {
    offsets_.resize(documents_ + 1);
    offsets.read(Tensor(offsets_.data(), DType::u64, offsets.shape()));
    offset_bytes_ = std::as_bytes(std::span(offsets_));
  }
  check_offsets();
  token_bytes_ = mapped(*tokens_, "/tokens");
  if (is_mapped()) {
    tokens_.reset();
    file_.reset();
  }
}

void TokenDataset::read_info(const hdf5::File& file) {
  constexpr const char* format = "deltapipe-tokens";
  const std::string found = file.has_attribute("/", "format") ? file.attribute<std::string>("/", "format") : "";
  if (found != format) {
    fail<FormatError>("{}: not a token dataset: attribute \"format\" is {}, expected \"{}\"", name_of_object("/"),
                      found.empty() ? "missing" : "\"" + found + "\"", format);
  }
  const auto version = file.attribute<std::uint64_t>("/", "version");
  if (version != 1) fail<FormatError>("{}: version {}, expected version 1", name_of_object("/"), version);
  info_.tokenizer = file.attribute<std::string>("/", "tokenizer");
  info_.tokenizer_hash = file.attribute<std::string>("/", "tokenizer_hash");
  info_.vocabulary = file.attribute<std::uint64_t>("/", "vocabulary");
  if (info_.vocabulary == 0 || info_.vocabulary > TokenDatasetInfo::max_vocabulary) {
    fail<FormatError>("{}: attribute \"vocabulary\" is {}, expected 1 to {}", name_of_object("/"), info_.vocabulary,
                      TokenDatasetInfo::max_vocabulary);
  }
  const auto special = [&](const char* name) {
    const auto id = file.attribute<std::int64_t>("/", name);
    if (id < -1 || id >= static_cast<std::int64_t>(info_.vocabulary)) {
      fail<FormatError>("{}: attribute \"{}\" is {}, expected -1 or an id below the vocabulary of {}",
                        name_of_object("/"), name, id, info_.vocabulary);
    }
    return id;
  };
  info_.bos = special("bos");
  info_.eos = special("eos");
}

/// The dataset's elements in map_; empty when they do not lie there one after another.
std::span<const std::byte> TokenDataset::mapped(const hdf5::Dataset& dataset, const char* name) {
  const auto offset = dataset.file_offset();
  if (!offset) return {};
  const std::uint64_t bytes = static_cast<std::uint64_t>(dataset.numel()) * size_of(dataset.dtype());
  const std::span<const std::byte> file = map_->bytes();
  if (*offset > file.size() || bytes > file.size() - *offset) {
    fail<FormatError>("{}: lies at bytes [{}, {}) of a file of {}: truncated", name_of_object(name), *offset,
                      *offset + bytes, file.size());
  }
  return file.subspan(*offset, bytes);
}

void TokenDataset::check_offsets() const {
  const auto object = [&] { return name_of_object("/document_offsets"); };
  if (load_u64(offset_bytes_, 0) != 0) {
    fail<FormatError>("{}: begins with {}, expected 0", object(), load_u64(offset_bytes_, 0));
  }
  for (std::uint64_t d = 1; d <= documents_; ++d) {
    const std::uint64_t before = load_u64(offset_bytes_, d - 1);
    const std::uint64_t here = load_u64(offset_bytes_, d);
    if (here <= before) {
      fail<FormatError>("{}: entry {} is {} after {}, expected ascending entries", object(), d, here, before);
    }
  }
  if (load_u64(offset_bytes_, documents_) != size_) {
    fail<FormatError>("{}: ends with {}, expected the number of tokens, {}", object(),
                      load_u64(offset_bytes_, documents_), size_);
  }
}

std::uint64_t TokenDataset::document_begin(std::uint64_t d) const {
  require(d <= documents_, "TokenDataset::document_begin: no such document");
  return load_u64(offset_bytes_, d);
}

std::uint64_t TokenDataset::document_of(std::uint64_t t) const {
  require(t < size_, "TokenDataset::document_of: no such token");
  std::uint64_t low = 0;  // begins at or before t
  std::uint64_t high = documents_;
  while (high - low > 1) {
    const std::uint64_t middle = low + (high - low) / 2;
    (load_u64(offset_bytes_, middle) <= t ? low : high) = middle;
  }
  return low;
}

void TokenDataset::read(std::uint64_t begin, std::span<std::uint32_t> out) const {
  require(begin <= size_ && out.size() <= size_ - begin, "TokenDataset::read: past the end");
  if (out.empty()) return;
  if (is_mapped()) {
    std::memcpy(out.data(), token_bytes_.data() + begin * sizeof(std::uint32_t), out.size_bytes());
  } else {
    const Tensor tensor(out.data(), DType::u32, {static_cast<std::int64_t>(out.size())});
    tokens_->read(static_cast<std::int64_t>(begin), tensor);
  }
  const auto largest = std::max_element(out.begin(), out.end());
  if (*largest >= info_.vocabulary) {
    const auto first = std::find_if(out.begin(), out.end(), [&](std::uint32_t id) { return id >= info_.vocabulary; });
    fail<FormatError>("{}[{}] is {}, expected an id below the vocabulary of {}", name_of_object("/tokens"),
                      begin + static_cast<std::uint64_t>(first - out.begin()), *first, info_.vocabulary);
  }
}

}  // namespace deltapipe
