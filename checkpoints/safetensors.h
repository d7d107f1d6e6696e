// The safetensors file format: 8 bytes of little-endian header length, a JSON header, one buffer of tensor data.
// Source: the format's description at https://github.com/huggingface/safetensors.
#pragma once

#include "core/file.h"
#include "core/tensor.h"

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace deltapipe {

struct SafetensorsTensor {
  std::string name;
  std::string dtype_name;  // as in the file: "F64" "F32" "F16" "BF16" "I64" "I32" "U64" "U32" "U8" or another known one
  std::optional<DType> dtype;  // empty: a type of the format that this program has no use for (BOOL, I8, F8_E4M3, ...)
  Shape shape;
  std::span<const std::byte> bytes;  // row-major, little-endian, any alignment; valid as long as the file object
};

/// A memory-mapped file. Everything in the header is checked on construction, as strictly as the reference
/// implementation does: FormatError names the file and the tensor. IoError when the file cannot be opened. The file
/// must not be shortened while it is mapped.
class SafetensorsFile {
 public:
  /// A longer header is refused unread; the reference implementation has the same limit.
  static constexpr std::uint64_t max_header_bytes = 100'000'000;

  explicit SafetensorsFile(const std::filesystem::path& path);

  const std::filesystem::path& path() const { return file_.path(); }
  /// In the order of their data.
  std::span<const SafetensorsTensor> tensors() const { return tensors_; }
  /// The `__metadata__` entry.
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  /// nullptr when there is none of that name.
  const SafetensorsTensor* find(std::string_view name) const;
  /// FormatError when there is none of that name.
  const SafetensorsTensor& at(std::string_view name) const;

 private:
  void read_header();

  MappedFile file_;
  std::vector<SafetensorsTensor> tensors_;
  std::map<std::string, std::size_t, std::less<>> index_;
  std::map<std::string, std::string> metadata_;
};

/// The dtype of a tensor of `file`; FormatError that lists the supported ones when this program cannot hold it.
DType supported_dtype(const SafetensorsTensor& tensor, const std::filesystem::path& file);

struct SafetensorsEntry {
  std::string name;
  DType dtype;
  Shape shape;
};

/// Writes one file, tensor by tensor in any order, holding none of them. Data begin at a multiple of 8 bytes and
/// tensors of wider types come first, so that each is aligned to its own type. The file carries a temporary name until
/// finish(); without finish(), or after any error, nothing is left. Throws IoError for what the operating system
/// refuses.
class SafetensorsWriter {
 public:
  SafetensorsWriter(const std::filesystem::path& path, std::vector<SafetensorsEntry> entries,
                    const std::map<std::string, std::string>& metadata = {{"format", "pt"}});
  ~SafetensorsWriter();
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;

  /// Host tensor of exactly the entry's dtype and number of elements; each name once.
  void write(std::string_view name, const Tensor& tensor);
  /// Every entry must have been written. Syncs the file, gives it its name, syncs the folder.
  void finish();

 private:
  struct Slot {
    SafetensorsEntry entry;
    std::uint64_t offset;  // in the file
    bool written = false;
  };
  void write_at(std::span<const std::byte> bytes, std::uint64_t offset);
  void discard();

  std::filesystem::path path_;
  std::filesystem::path temporary_;
  int fd_ = -1;
  std::map<std::string, Slot, std::less<>> slots_;
};

}  // namespace deltapipe
