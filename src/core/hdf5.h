// HDF5 files through the serial C API. hdf5.h of the library stays out of this header. Every call takes one global lock
// (as the library itself would), so files may be used from several threads, one thread at a time each.
//
// Errors: IoError when the operating system refused (missing file, permission, full disk, no locks), FormatError when
// a file that is read does not hold what was asked for, InternalError for a wrong call. One line: file, object path,
// the innermost reason that HDF5 gives.
#pragma once

#include "core/tensor.h"

#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace deltapipe::hdf5 {

/// Owner of one library handle (hid_t), closed at the end of its life.
class Handle {
 public:
  using Close = int (*)(std::int64_t);
  Handle() = default;
  Handle(std::int64_t id, Close close) : id_(id), close_(close) {}
  ~Handle() { reset(); }
  Handle(Handle&& other) noexcept;
  Handle& operator=(Handle&& other) noexcept;
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  std::int64_t get() const { return id_; }
  explicit operator bool() const { return id_ >= 0; }
  /// Closes now; the library's status (negative: failed).
  int reset();

 private:
  std::int64_t id_ = -1;
  Close close_ = nullptr;
};

/// A dataset of an open file. Not to be used after File::close() or the file's end of life. Elements are stored
/// little-endian; bfloat16 and float16 as HDF5 floating-point types that any reader converts.
class Dataset {
 public:
  DType dtype() const { return dtype_; }
  const Shape& shape() const { return shape_; }
  std::int64_t numel() const { return shape_.numel(); }

  /// Flat (row-major) elements [begin, begin + out.numel()) into / from host memory of the same dtype. A read past the
  /// end, or into another dtype, is a FormatError; a write of that kind is an InternalError.
  void read(std::int64_t begin, const Tensor& out) const;
  void write(std::int64_t begin, const Tensor& values) const;
  /// The whole dataset; the number of elements must match.
  void read(const Tensor& out) const;
  void write(const Tensor& values) const;
  /// Adds elements at the end of a dataset made by File::create_growing.
  void append(const Tensor& values);

  /// Byte position in the file of element 0, when elements lie there one after another, unfiltered and little-endian:
  /// they may then be mapped or read past this library. Known as soon as the dataset is created. Files of others need
  /// not align it to the element size. nullopt for every other layout, and for an empty dataset.
  std::optional<std::uint64_t> file_offset() const;

 private:
  friend class File;
  Dataset(Handle id, std::string where, bool writable);
  void transfer(std::int64_t begin, const Tensor& memory, bool writing) const;

  Handle id_;
  std::string where_;  // "FILE: /path", for messages
  bool writable_;
  DType dtype_ = DType::f32;
  Shape shape_;
};

/// Flat elements [begin, end) of a virtual dataset are [source_begin, source_begin + end - begin) of a 1-D dataset of
/// source_size elements in another file; a relative `file` is looked for beside the virtual dataset's own file.
struct VirtualPiece {
  std::string file;
  std::string dataset;
  std::int64_t source_size = 0;
  std::int64_t source_begin = 0;
  std::int64_t begin = 0;
  std::int64_t end = 0;
};

/// Paths of groups, datasets and attribute owners are absolute ("/", "/master/lm_head.weight"); groups on the way to a
/// created object are made.
class File {
 public:
  /// For reading.
  static File open(const std::filesystem::path& path);
  /// For writing; an existing file is an IoError unless `truncate`.
  static File create(const std::filesystem::path& path, bool truncate = false);

  bool exists(const std::string& object) const;
  /// Names of the members of a group, sorted.
  std::vector<std::string> list(const std::string& group) const;
  void create_group(const std::string& group);

  Dataset dataset(const std::string& path) const;
  /// Contiguous, its space set aside at once, contents undefined until written.
  Dataset create_dataset(const std::string& path, DType dtype, const Shape& shape);
  /// 1-D, empty, grown by Dataset::append in chunks of `chunk` elements.
  Dataset create_growing(const std::string& path, DType dtype, std::int64_t chunk);
  /// A view of `shape` (at least one dimension) put together from `pieces`, which must not overlap. Readers see
  /// zeros, without an error, where no piece lies or a piece's file is missing.
  void create_virtual(const std::string& path, DType dtype, const Shape& shape, std::span<const VirtualPiece> pieces);

  bool has_attribute(const std::string& object, const std::string& name) const;
  /// T: std::uint64_t, std::int64_t, double, std::string or std::vector<std::int64_t>. Integers may be stored in any
  /// width and sign, strings in fixed or variable length; a value that does not fit, another kind or a missing
  /// attribute is a FormatError.
  template <class T>
  T attribute(const std::string& object, const std::string& name) const;
  void set_attribute(const std::string& object, const std::string& name, std::uint64_t value);
  void set_attribute(const std::string& object, const std::string& name, std::int64_t value);
  void set_attribute(const std::string& object, const std::string& name, double value);
  void set_attribute(const std::string& object, const std::string& name, std::string_view value);
  void set_attribute(const std::string& object, const std::string& name, const char* value) {
    set_attribute(object, name, std::string_view(value));
  }
  void set_attribute(const std::string& object, const std::string& name, std::span<const std::int64_t> values);

  /// Hands all data to the operating system (no fsync; see sync_path in core/file.h).
  void flush();
  /// Reports what the destructor would have to swallow; call it after writing. Safe to call twice.
  void close();

  const std::filesystem::path& path() const { return path_; }

 private:
  File(Handle id, std::filesystem::path path, bool writable)
      : id_(std::move(id)), path_(std::move(path)), writable_(writable) {}
  std::string where(const std::string& object) const { return path_.string() + ": " + object; }
  Handle open_object(const std::string& object) const;
  Dataset make_dataset(const std::string& path, DType dtype, std::int64_t space, std::int64_t properties);
  void put_attribute(const std::string& object, const std::string& name, std::int64_t type, std::int64_t space,
                     const void* value);

  Handle id_;
  std::filesystem::path path_;
  bool writable_;
};

}  // namespace deltapipe::hdf5
