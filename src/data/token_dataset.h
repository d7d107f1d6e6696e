// A token dataset: one HDF5 file with all documents of a corpus in a row.
//
//   /tokens            uint32 [N]      ids of all documents, one after another, N > 0
//   /document_offsets  uint64 [D + 1]  document d is tokens [offsets[d], offsets[d + 1]); 0 first, N last, ascending
//   attributes of /    format = "deltapipe-tokens", version = 1, tokenizer (its name), tokenizer_hash, vocabulary
//   (number
//                      of ids), bos, eos (-1: none)
//
// Both are contiguous and uncompressed when written by us, and are then read through a memory map that all ranks of a
// host share; any other layout of the same content is read through HDF5. Special tokens are part of the stream.
#pragma once

#include "core/file.h"
#include "core/hdf5.h"

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace deltapipe {

struct TokenDatasetInfo {
  static constexpr std::uint64_t max_vocabulary = std::uint64_t{1} << 31;  // the loader's ids are int32
  std::string tokenizer;                                                   // a name for people
  std::string tokenizer_hash;    // hash_file_hex of tokenizer.json, or byte_vocabulary::tokenizer_hash()
  std::uint64_t vocabulary = 0;  // ids are below it; 1 to max_vocabulary
  std::int64_t bos = -1;         // -1: none
  std::int64_t eos = -1;
};

class TokenDataset {
 public:
  /// Checks everything but the token ids. Throws FormatError naming file and object, or IoError.
  explicit TokenDataset(const std::filesystem::path& path);

  std::uint64_t size() const { return size_; }            // tokens, > 0
  std::uint64_t documents() const { return documents_; }  // > 0; none is empty
  /// First token of document d; size() for d == documents().
  std::uint64_t document_begin(std::uint64_t d) const;
  /// The document that token t belongs to, by binary search.
  std::uint64_t document_of(std::uint64_t t) const;
  /// Tokens [begin, begin + out.size()). Throws FormatError with the position of an id outside the vocabulary. May be
  /// called from several threads.
  void read(std::uint64_t begin, std::span<std::uint32_t> out) const;

  const TokenDatasetInfo& info() const { return info_; }
  std::uint64_t vocabulary() const { return info_.vocabulary; }
  std::int64_t bos() const { return info_.bos; }
  std::int64_t eos() const { return info_.eos; }
  const std::string& tokenizer_hash() const { return info_.tokenizer_hash; }
  const std::filesystem::path& path() const { return path_; }
  /// Whether tokens come from the memory map.
  bool is_mapped() const { return !token_bytes_.empty(); }

 private:
  void read_info(const hdf5::File& file);
  std::span<const std::byte> mapped(const hdf5::Dataset& dataset, const char* name);
  void check_offsets() const;
  std::string name_of_object(const char* object) const { return path_.string() + ": " + object; }

  std::filesystem::path path_;
  TokenDatasetInfo info_;
  std::uint64_t size_ = 0;
  std::uint64_t documents_ = 0;
  std::optional<MappedFile> map_;
  std::span<const std::byte> token_bytes_;   // in map_, of any alignment; empty when read through HDF5
  std::span<const std::byte> offset_bytes_;  // in map_ or offsets_
  std::vector<std::uint64_t> offsets_;
  std::optional<hdf5::File> file_;  // open only when the tokens are not mapped
  std::optional<hdf5::Dataset> tokens_;
};

/// Writes a dataset document by document in bounded memory. Until finish() nothing exists under `path`, and whatever
/// was there before stays; an unfinished writer leaves nothing behind. Tokens wait in an unnamed file in the same
/// folder (HDF5 has to know the size of contiguous data in advance), which therefore needs room for them twice.
class TokenDatasetWriter {
 public:
  /// Throws IoError when the folder cannot be written to.
  TokenDatasetWriter(const std::filesystem::path& path, const TokenDatasetInfo& info);
  ~TokenDatasetWriter();
  TokenDatasetWriter(const TokenDatasetWriter&) = delete;
  TokenDatasetWriter& operator=(const TokenDatasetWriter&) = delete;

  /// One whole document. Throws InternalError when it is empty or holds an id outside the vocabulary, IoError.
  void append(std::span<const std::uint32_t> document);
  /// A document in parts: any number of append_part, then end_document.
  void append_part(std::span<const std::uint32_t> tokens);
  void end_document();

  std::uint64_t tokens() const { return tokens_; }
  std::uint64_t documents() const { return documents_; }

  /// Writes and syncs everything under a temporary name: only the rename is left. Throws FormatError when there is no
  /// document, IoError. For callers that publish several files together; finish() does it when they have not.
  void complete();
  /// The file appears under its name.
  void finish();

 private:
  struct Spool;

  std::filesystem::path path_;
  std::filesystem::path temporary_;
  TokenDatasetInfo info_;
  std::unique_ptr<Spool> token_spool_;
  std::unique_ptr<Spool> offset_spool_;
  std::uint64_t tokens_ = 0;
  std::uint64_t documents_ = 0;
  std::uint64_t document_begin_ = 0;
  bool completed_ = false;
  bool finished_ = false;
};

}  // namespace deltapipe
