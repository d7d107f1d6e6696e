#include "checkpoints/safetensors.h"

#include "checkpoints/strict_json.h"
#include "core/error.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <tuple>
#include <utility>

namespace deltapipe {
namespace fs = std::filesystem;
namespace {

static_assert(std::endian::native == std::endian::little, "tensor data are read and written as they lie in memory");

struct FileType {
  std::string_view name;
  unsigned bits;
  std::optional<DType> dtype;
};

constexpr std::array file_types{
    FileType{"F64", 64, DType::f64}, FileType{"F32", 32, DType::f32},
    FileType{"F16", 16, DType::f16}, FileType{"BF16", 16, DType::bf16},
    FileType{"I64", 64, DType::i64}, FileType{"I32", 32, DType::i32},
    FileType{"U64", 64, DType::u64}, FileType{"U32", 32, DType::u32},
    FileType{"U8", 8, DType::u8},    FileType{"BOOL", 8, {}},
    FileType{"I8", 8, {}},           FileType{"I16", 16, {}},
    FileType{"U16", 16, {}},         FileType{"C64", 64, {}},
    FileType{"F8_E4M3", 8, {}},      FileType{"F8_E5M2", 8, {}},
    FileType{"F8_E8M0", 8, {}},      FileType{"F8_E4M3FNUZ", 8, {}},
    FileType{"F8_E5M2FNUZ", 8, {}},  FileType{"F6_E2M3", 6, {}},
    FileType{"F6_E3M2", 6, {}},      FileType{"F4", 4, {}},
};

/// `where`: file and tensor, the beginning of every message.
const FileType& file_type(const nlohmann::json& value, const std::string& where) {
  if (!value.is_string()) fail<FormatError>("{}: dtype is {}, not a string", where, printable(value.dump()));
  const auto& name = value.get_ref<const std::string&>();
  for (const FileType& t : file_types) {
    if (t.name == name) return t;
  }
  fail<FormatError>("{}: unknown dtype '{}'", where, printable(name));
}

/// The shape, and its size in bits as `type`; every product is checked.
std::pair<Shape, std::uint64_t> read_shape(const nlohmann::json& value, const FileType& type,
                                           const std::string& where) {
  const auto show = [&] { return printable(value.dump()); };
  if (!value.is_array()) fail<FormatError>("{}: shape is {}, not a list", where, show());
  if (value.size() > static_cast<std::size_t>(Shape::max_rank)) {
    fail<FormatError>("{}: shape has {} dimensions, at most {} are supported", where, value.size(), Shape::max_rank);
  }
  Shape shape;
  std::int64_t product = 1;  // of the dimensions other than 0: no order of multiplying them may overflow
  bool empty = false;
  for (const auto& d : value) {
    if (!d.is_number_unsigned() ||
        d.get<std::uint64_t>() > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
      fail<FormatError>("{}: shape {} is not a list of non-negative 64-bit integers", where, show());
    }
    const auto n = d.get<std::int64_t>();
    shape.append(n);
    if (n == 0) {
      empty = true;
    } else if (__builtin_mul_overflow(product, n, &product)) {
      fail<FormatError>("{}: shape {} has more than 2^63 elements", where, show());
    }
  }
  std::uint64_t bits = 0;
  if (!empty && __builtin_mul_overflow(static_cast<std::uint64_t>(product), std::uint64_t{type.bits}, &bits)) {
    fail<FormatError>("{}: shape {} of {} is larger than any file", where, show(), type.name);
  }
  return {shape, bits};
}

}  // namespace

SafetensorsFile::SafetensorsFile(const fs::path& path) : file_(path) { read_header(); }

void SafetensorsFile::read_header() {
  const std::string file = path().string();
  const std::span<const std::byte> all = file_.bytes();
  if (all.size() < 8) {
    fail<FormatError>("{}: {} bytes long; a safetensors file begins with an 8-byte header length", file, all.size());
  }
  std::uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, all.data(), sizeof header_bytes);
  if (header_bytes > max_header_bytes) {
    fail<FormatError>("{}: header length {} is over the limit of {} bytes; not a safetensors file?", file, header_bytes,
                      max_header_bytes);
  }
  if (header_bytes > all.size() - 8) {
    fail<FormatError>("{}: header of {} bytes goes past the end of the file ({} bytes); truncated?", file, header_bytes,
                      all.size());
  }
  const std::string_view text(reinterpret_cast<const char*>(all.data()) + 8, header_bytes);
  if (!text.starts_with('{')) fail<FormatError>("{}: header does not begin with '{{'; not a safetensors file?", file);
  const nlohmann::json header = parse_json(text, file);
  const std::span<const std::byte> data = all.subspan(8 + header_bytes);

  struct Range {
    std::uint64_t begin, end;
    SafetensorsTensor tensor;
  };
  std::vector<Range> ranges;
  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__") {
      if (!value.is_object()) fail<FormatError>("{}: __metadata__ is not an object", file);
      for (const auto& [key, text_value] : value.items()) {
        if (!text_value.is_string()) {
          fail<FormatError>("{}: __metadata__ entry '{}' is not a string", file, printable(key));
        }
        metadata_[key] = text_value.get<std::string>();
      }
      continue;
    }
    const std::string where = fmt::format("{}: tensor '{}'", file, printable(name));
    if (!value.is_object()) fail<FormatError>("{}: header entry is {}, not an object", where, printable(value.dump()));
    for (const char* key : {"dtype", "shape", "data_offsets"}) {
      if (!value.contains(key)) fail<FormatError>("{}: has no '{}'", where, key);
    }
    if (value.size() != 3) fail<FormatError>("{}: has keys other than dtype, shape and data_offsets", where);
    const FileType& type = file_type(value["dtype"], where);
    const auto [shape, bits] = read_shape(value["shape"], type, where);
    const auto& offsets = value["data_offsets"];
    if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() ||
        !offsets[1].is_number_unsigned()) {
      fail<FormatError>("{}: data_offsets {} are not two non-negative integers", where, printable(offsets.dump()));
    }
    const auto begin = offsets[0].get<std::uint64_t>(), end = offsets[1].get<std::uint64_t>();
    if (begin > end) fail<FormatError>("{}: data_offsets [{}, {}] begin after their end", where, begin, end);
    if (end > data.size()) {
      fail<FormatError>("{}: data_offsets [{}, {}] go past the {} data bytes of the file; truncated?", where, begin,
                        end, data.size());
    }
    if (bits % 8 != 0 || bits / 8 != end - begin) {
      fail<FormatError>("{}: {} bytes of data, but shape {} of {} needs {}", where, end - begin, shape.str(), type.name,
                        (bits + 7) / 8);
    }
    ranges.push_back({begin, end, {name, std::string(type.name), type.dtype, shape, data.subspan(begin, end - begin)}});
  }
  // Tensors must cover the buffer exactly, so that no bytes hide in it.
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return std::tie(a.begin, a.end) < std::tie(b.begin, b.end); });
  std::uint64_t covered = 0;
  for (const Range& r : ranges) {
    const std::string where = fmt::format("{}: tensor '{}'", file, printable(r.tensor.name));
    if (r.begin < covered) {
      fail<FormatError>("{}: data at [{}, {}] overlap those of '{}'", where, r.begin, r.end,
                        printable(tensors_.back().name));
    }
    if (r.begin > covered) {
      fail<FormatError>("{}: a gap of {} unused bytes before its data at [{}, {}]", where, r.begin - covered, r.begin,
                        r.end);
    }
    covered = r.end;
    index_[r.tensor.name] = tensors_.size();
    tensors_.push_back(r.tensor);
  }
  if (covered != data.size()) {
    fail<FormatError>("{}: {} unused bytes after the last tensor{}", file, data.size() - covered,
                      tensors_.empty() ? "" : fmt::format(" '{}'", printable(tensors_.back().name)));
  }
}

const SafetensorsTensor* SafetensorsFile::find(std::string_view name) const {
  const auto it = index_.find(name);
  return it == index_.end() ? nullptr : &tensors_[it->second];
}

const SafetensorsTensor& SafetensorsFile::at(std::string_view name) const {
  const SafetensorsTensor* t = find(name);
  if (t == nullptr) fail<FormatError>("{}: tensor '{}' is missing", path().string(), printable(name));
  return *t;
}

DType supported_dtype(const SafetensorsTensor& tensor, const fs::path& file) {
  if (tensor.dtype) return *tensor.dtype;
  std::string list;
  for (const FileType& t : file_types) {
    if (t.dtype) list += fmt::format("{}{}", list.empty() ? "" : " ", t.name);
  }
  fail<FormatError>("{}: tensor '{}' has the unsupported dtype {}; supported: {}", file.string(),
                    printable(tensor.name), tensor.dtype_name, list);
}

SafetensorsWriter::SafetensorsWriter(const fs::path& path, std::vector<SafetensorsEntry> entries,
                                     const std::map<std::string, std::string>& metadata)
    : path_(path), temporary_(path.string() + ".tmp." + std::to_string(getpid())) {
  std::stable_sort(entries.begin(), entries.end(), [](const SafetensorsEntry& a, const SafetensorsEntry& b) {
    return size_of(a.dtype) > size_of(b.dtype);
  });
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  std::uint64_t size = 0;
  for (SafetensorsEntry& e : entries) {
    require(e.name != "__metadata__" && !slots_.contains(e.name),
            "SafetensorsWriter: reserved or repeated tensor name");
    const auto type =
        std::find_if(file_types.begin(), file_types.end(), [&](const FileType& t) { return t.dtype == e.dtype; });
    auto shape = nlohmann::ordered_json::array();
    for (int i = 0; i < e.shape.rank(); ++i) shape.push_back(e.shape[i]);
    const std::uint64_t end = size + static_cast<std::uint64_t>(e.shape.numel()) * size_of(e.dtype);
    header[e.name] = {{"dtype", type->name}, {"shape", std::move(shape)}, {"data_offsets", {size, end}}};
    const std::string name = e.name;
    slots_[name] = {std::move(e), size};
    size = end;
  }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  for (auto& [name, slot] : slots_) slot.offset += 8 + text.size();
  const std::uint64_t length = text.size();
  text.insert(0, reinterpret_cast<const char*>(&length), sizeof length);

  fd_ = open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd_ < 0) fail<IoError>("cannot create {}: {}", temporary_.string(), std::strerror(errno));
  try {
    write_at(std::as_bytes(std::span(text)), 0);
  } catch (...) {
    discard();
    throw;
  }
}

SafetensorsWriter::~SafetensorsWriter() { discard(); }

void SafetensorsWriter::discard() {
  if (fd_ < 0) return;
  close(std::exchange(fd_, -1));
  unlink(temporary_.c_str());
}

void SafetensorsWriter::write_at(std::span<const std::byte> bytes, std::uint64_t offset) {
  while (!bytes.empty()) {
    const ssize_t n = pwrite(fd_, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (n < 0) {
      if (errno == EINTR) continue;
      fail<IoError>("cannot write {}: {}", temporary_.string(), std::strerror(errno));
    }
    bytes = bytes.subspan(static_cast<std::size_t>(n));
    offset += static_cast<std::uint64_t>(n);
  }
}

void SafetensorsWriter::write(std::string_view name, const Tensor& tensor) {
  const auto it = slots_.find(name);
  if (it == slots_.end() || it->second.written) {
    fail<InternalError>("SafetensorsWriter: tensor '{}' is unknown or already written", name);
  }
  const SafetensorsEntry& e = it->second.entry;
  if (tensor.dtype != e.dtype || tensor.numel() != e.shape.numel() || !tensor.device.is_cpu()) {
    fail<InternalError>("SafetensorsWriter: tensor '{}' is {} {}, announced as {} {} on the host", name,
                        name_of(tensor.dtype), tensor.shape.str(), name_of(e.dtype), e.shape.str());
  }
  write_at({static_cast<const std::byte*>(tensor.data), tensor.bytes()}, it->second.offset);
  it->second.written = true;
}

void SafetensorsWriter::finish() {
  for (const auto& [name, slot] : slots_) {
    if (!slot.written) fail<InternalError>("SafetensorsWriter: tensor '{}' was never written", name);
  }
  if (fsync(fd_) != 0) fail<IoError>("cannot sync {}: {}", temporary_.string(), std::strerror(errno));
  if (rename(temporary_.c_str(), path_.c_str()) != 0) {
    fail<IoError>("cannot rename {} to {}: {}", temporary_.string(), path_.string(), std::strerror(errno));
  }
  close(std::exchange(fd_, -1));
  sync_path(path_.has_parent_path() ? path_.parent_path() : fs::path("."));
}

}  // namespace deltapipe
