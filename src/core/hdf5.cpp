#include "core/hdf5.h"

#include "core/error.h"

#include <hdf5.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <type_traits>
#include <utility>

namespace deltapipe::hdf5 {
namespace {

static_assert(std::is_same_v<hid_t, std::int64_t> || sizeof(hid_t) == sizeof(std::int64_t));
static_assert(std::endian::native == std::endian::little);

std::recursive_mutex& library_lock() {
  static std::recursive_mutex lock;
  return lock;
}

/// Held for the length of every use of the library: one thread at a time, and no error text on the console.
class Call {
 public:
  Call() : hold_(library_lock()) {
    // The library's exit handler would touch files again whose closing had failed (full disk) and crash there;
    // everything of ours is closed by its owner.
    static const bool once = (H5dont_atexit(), true);
    static_cast<void>(once);
    H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
    H5Eclear2(H5E_DEFAULT);
  }

 private:
  std::lock_guard<std::recursive_mutex> hold_;
};

struct Reason {
  std::string innermost;
  int os_error = 0;
  bool locking = false;
};

herr_t collect(unsigned, const H5E_error2_t* entry, void* out) {
  auto& reason = *static_cast<Reason*>(out);
  const std::string text = entry->desc ? entry->desc : "";
  if (reason.innermost.empty()) reason.innermost = text;
  if (text.find("unable to lock") != std::string::npos) reason.locking = true;
  const auto at = text.find("errno = ");
  if (reason.os_error == 0 && at != std::string::npos) reason.os_error = std::atoi(text.c_str() + at + 8);
  return 0;
}

enum class Access { read, write };

/// Throws for the call that has just failed. `doing` reads like "cannot open FILE".
[[noreturn]] void fail_hdf5(const std::string& doing, Access access) {
  Reason reason;
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, collect, &reason);
  H5Eclear2(H5E_DEFAULT);
  if (reason.os_error != 0 && reason.locking) {
    if (reason.os_error == EAGAIN) fail<IoError>("{}: another process has it open for writing", doing);
    fail<IoError>("{}: its file system has no locks ({}); set HDF5_USE_FILE_LOCKING=FALSE in the environment", doing,
                  std::strerror(reason.os_error));
  }
  if (reason.os_error != 0) fail<IoError>("{}: {}", doing, std::strerror(reason.os_error));
  if (access == Access::read) fail<FormatError>("{}: {}", doing, reason.innermost);
  fail<InternalError>("{}: {}", doing, reason.innermost);
}

template <class Id>
Id check(Id result, const std::string& doing, Access access) {
  if (result < 0) fail_hdf5(doing, access);
  return result;
}

Handle own_space(hid_t id) { return {id, H5Sclose}; }
Handle own_type(hid_t id) { return {id, H5Tclose}; }
Handle own_properties(hid_t id) { return {id, H5Pclose}; }

/// A floating-point type of 16 bits with the given number of exponent bits.
Handle half_type(std::size_t exponent_bits) {
  Handle type = own_type(H5Tcopy(H5T_IEEE_F32LE));
  const std::size_t mantissa_bits = 15 - exponent_bits;
  H5Tset_fields(type.get(), 15, mantissa_bits, exponent_bits, 0, mantissa_bits);
  H5Tset_size(type.get(), 2);
  H5Tset_ebias(type.get(), (std::size_t{1} << (exponent_bits - 1)) - 1);
  return type;
}

/// The type of a DType, in memory as in files: both are little-endian.
Handle type_of(DType dtype) {
  switch (dtype) {
    case DType::f32: return own_type(H5Tcopy(H5T_IEEE_F32LE));
    case DType::f64: return own_type(H5Tcopy(H5T_IEEE_F64LE));
    case DType::bf16: return half_type(8);
    case DType::f16: return half_type(5);
    case DType::u8: return own_type(H5Tcopy(H5T_STD_U8LE));
    case DType::i32: return own_type(H5Tcopy(H5T_STD_I32LE));
    case DType::u32: return own_type(H5Tcopy(H5T_STD_U32LE));
    case DType::i64: return own_type(H5Tcopy(H5T_STD_I64LE));
    case DType::u64: return own_type(H5Tcopy(H5T_STD_U64LE));
  }
  fail<InternalError>("hdf5: unknown dtype {}", static_cast<int>(dtype));
}

constexpr std::array every_dtype = {DType::f32, DType::f64, DType::bf16, DType::f16, DType::u8,
                                    DType::i32, DType::u32, DType::i64,  DType::u64};

/// nullopt: no DType has these values. A big-endian type counts as its little-endian twin (the library converts).
std::optional<DType> dtype_from(hid_t type) {
  const H5T_class_t kind = H5Tget_class(type);
  if (kind != H5T_INTEGER && kind != H5T_FLOAT) return std::nullopt;
  const Handle little = own_type(H5Tcopy(type));
  if (H5Tget_order(type) != H5T_ORDER_LE) H5Tset_order(little.get(), H5T_ORDER_LE);
  for (const DType candidate : every_dtype) {
    if (H5Tequal(little.get(), type_of(candidate).get()) > 0) return candidate;
  }
  return std::nullopt;
}

struct Box {
  std::array<hsize_t, Shape::max_rank> start{};
  std::array<hsize_t, Shape::max_rank> count{};
};

/// Cuts the flat range [begin, end) of `shape` into boxes that follow one another in flat order: the rest of a started
/// row, whole rows, the beginning of a last row, and so within each dimension; at most 2 * rank - 1 boxes.
void cut_into_boxes(const Shape& shape, int dim, Box prefix, std::int64_t begin, std::int64_t end,
                    std::vector<Box>& boxes) {
  if (begin == end) return;
  const auto d = static_cast<std::size_t>(dim);
  std::int64_t row = 1;  // elements of one index of this dimension
  for (int i = dim + 1; i < shape.rank(); ++i) row *= shape[i];
  const auto take_rows = [&](std::int64_t first, std::int64_t last) {
    Box box = prefix;
    box.start[d] = static_cast<hsize_t>(first);
    box.count[d] = static_cast<hsize_t>(last - first);
    for (int i = dim + 1; i < shape.rank(); ++i)
      box.count[static_cast<std::size_t>(i)] = static_cast<hsize_t>(shape[i]);
    boxes.push_back(box);
  };
  const auto take_part = [&](std::int64_t index, std::int64_t from, std::int64_t to) {
    Box inner = prefix;
    inner.start[d] = static_cast<hsize_t>(index);
    inner.count[d] = 1;
    cut_into_boxes(shape, dim + 1, inner, from, to, boxes);
  };
  const std::int64_t first = begin / row;
  const std::int64_t last = end / row;
  const std::int64_t head = begin % row;
  const std::int64_t tail = end % row;
  if (first == last) {
    take_part(first, head, tail);
    return;
  }
  if (head != 0) take_part(first, head, row);
  const std::int64_t whole = head != 0 ? first + 1 : first;
  if (whole < last) take_rows(whole, last);
  if (tail != 0) take_part(last, 0, tail);
}

std::vector<Box> boxes_of(const Shape& shape, std::int64_t begin, std::int64_t end) {
  std::vector<Box> boxes;
  cut_into_boxes(shape, 0, {}, begin, end, boxes);
  return boxes;
}

std::int64_t numel_of(const Box& box, int rank) {
  std::int64_t n = 1;
  for (int i = 0; i < rank; ++i) n *= static_cast<std::int64_t>(box.count[static_cast<std::size_t>(i)]);
  return n;
}

Handle space_of(const Shape& shape) {
  std::array<hsize_t, Shape::max_rank> dims{};
  for (int i = 0; i < shape.rank(); ++i) dims[static_cast<std::size_t>(i)] = static_cast<hsize_t>(shape[i]);
  return own_space(shape.rank() == 0 ? H5Screate(H5S_SCALAR) : H5Screate_simple(shape.rank(), dims.data(), nullptr));
}

/// Closes a file with whatever of it is still open, so that nothing is written later and errors show here. (The
/// library's own way to do so, H5F_CLOSE_STRONG, keeps virtual datasets of this process from reading the file.)
herr_t close_file(hid_t file) {
  constexpr unsigned objects = H5F_OBJ_ALL & ~static_cast<unsigned>(H5F_OBJ_FILE);
  const ssize_t count = H5Fget_obj_count(file, objects | H5F_OBJ_LOCAL);
  if (count > 0) {
    std::vector<hid_t> ids(static_cast<std::size_t>(count));
    const ssize_t found = H5Fget_obj_ids(file, objects | H5F_OBJ_LOCAL, ids.size(), ids.data());
    ids.resize(static_cast<std::size_t>(std::max<ssize_t>(found, 0)));
    for (const hid_t id : ids) {
      while (H5Idec_ref(id) > 0) {
      }
    }
  }
  return H5Fclose(file);
}

/// Properties of new datasets: groups on the way are made by the link list; times are left out so that equal contents
/// give equal files.
Handle dataset_properties() {
  Handle properties = own_properties(H5Pcreate(H5P_DATASET_CREATE));
  H5Pset_obj_track_times(properties.get(), 0);
  return properties;
}

Handle link_properties() {
  Handle properties = own_properties(H5Pcreate(H5P_LINK_CREATE));
  H5Pset_create_intermediate_group(properties.get(), 1);
  return properties;
}

}  // namespace

Handle::Handle(Handle&& other) noexcept : id_(std::exchange(other.id_, -1)), close_(other.close_) {}

Handle& Handle::operator=(Handle&& other) noexcept {
  std::swap(id_, other.id_);
  std::swap(close_, other.close_);
  return *this;
}

int Handle::reset() {
  if (id_ < 0) return 0;
  const Call call;
  return close_(std::exchange(id_, -1));
}

Dataset::Dataset(Handle id, std::string where, bool writable)
    : id_(std::move(id)), where_(std::move(where)), writable_(writable) {
  const Handle type = own_type(check(H5Dget_type(id_.get()), "cannot examine " + where_, Access::read));
  const auto dtype = dtype_from(type.get());
  if (!dtype) fail<FormatError>("{}: its elements are of a type that is not supported", where_);
  dtype_ = *dtype;
  const Handle space = own_space(check(H5Dget_space(id_.get()), "cannot examine " + where_, Access::read));
  if (H5Sget_simple_extent_type(space.get()) == H5S_NULL) fail<FormatError>("{}: has no elements", where_);
  const int rank = H5Sget_simple_extent_ndims(space.get());
  if (rank < 0 || rank > Shape::max_rank) fail<FormatError>("{}: {} dimensions are too many", where_, rank);
  std::array<hsize_t, Shape::max_rank> dims{};
  H5Sget_simple_extent_dims(space.get(), dims.data(), nullptr);
  hsize_t room = hsize_t{1} << 60;  // elements that int64 arithmetic on bytes still holds
  for (int i = 0; i < rank; ++i) {
    const hsize_t dim = dims[static_cast<std::size_t>(i)];
    if (dim > room) fail<FormatError>("{}: its dimensions are impossibly large", where_);
    if (dim != 0) room /= dim;
    shape_.append(static_cast<std::int64_t>(dim));
  }
}

void Dataset::transfer(std::int64_t begin, const Tensor& memory, bool writing) const {
  require(memory.device.is_cpu(), "hdf5: data must lie in host memory");
  const std::int64_t count = memory.numel();
  const Call call;
  if (writing) {
    if (!writable_) fail<InternalError>("{}: opened for reading, cannot be written", where_);
    if (memory.dtype != dtype_ || begin < 0 || begin + count > numel()) {
      fail<InternalError>("{}: holds {} of {}; cannot write {} elements of {} at {}", where_, shape_.str(),
                          name_of(dtype_), count, name_of(memory.dtype), begin);
    }
  } else {
    if (memory.dtype != dtype_) {
      fail<FormatError>("{}: holds {}, expected {}", where_, name_of(dtype_), name_of(memory.dtype));
    }
    if (begin < 0 || count > numel() || begin > numel() - count) {
      fail<FormatError>("{}: elements [{}, {}) asked for, has {}", where_, begin, begin + count, numel());
    }
  }
  if (count == 0) return;
  const Access access = writable_ ? Access::write : Access::read;
  const std::string doing = (writing ? "cannot write " : "cannot read ") + where_;
  const Handle type = type_of(dtype_);
  const Handle file_space = own_space(check(H5Dget_space(id_.get()), doing, access));
  auto* data = static_cast<std::byte*>(memory.data);
  const auto move = [&](hid_t memory_space, hid_t selection) {
    check(writing ? H5Dwrite(id_.get(), type.get(), memory_space, selection, H5P_DEFAULT, data)
                  : H5Dread(id_.get(), type.get(), memory_space, selection, H5P_DEFAULT, data),
          doing, access);
  };
  if (shape_.rank() == 0) {
    move(H5S_ALL, H5S_ALL);
    return;
  }
  for (const Box& box : boxes_of(shape_, begin, begin + count)) {
    const auto n = static_cast<hsize_t>(numel_of(box, shape_.rank()));
    check(H5Sselect_hyperslab(file_space.get(), H5S_SELECT_SET, box.start.data(), nullptr, box.count.data(), nullptr),
          doing, access);
    const Handle memory_space = own_space(check(H5Screate_simple(1, &n, nullptr), doing, access));
    move(memory_space.get(), file_space.get());
    data += n * size_of(dtype_);
  }
}

void Dataset::read(std::int64_t begin, const Tensor& out) const { transfer(begin, out, false); }

void Dataset::write(std::int64_t begin, const Tensor& values) const { transfer(begin, values, true); }

void Dataset::read(const Tensor& out) const {
  if (out.numel() != numel()) {
    fail<FormatError>("{}: shape is {}, expected {}", where_, shape_.str(), out.shape.str());
  }
  transfer(0, out, false);
}

void Dataset::write(const Tensor& values) const {
  if (values.numel() != numel()) {
    fail<InternalError>("{}: shape is {}, cannot write {}", where_, shape_.str(), values.shape.str());
  }
  transfer(0, values, true);
}

void Dataset::append(const Tensor& values) {
  if (shape_.rank() != 1) fail<InternalError>("{}: only a 1-D dataset grows", where_);
  const std::int64_t old = shape_[0];
  {
    const Call call;
    const hsize_t size = static_cast<hsize_t>(old + values.numel());
    check(H5Dset_extent(id_.get(), &size), "cannot grow " + where_, Access::write);
  }
  shape_ = {old + values.numel()};
  transfer(old, values, true);
}

std::optional<std::uint64_t> Dataset::file_offset() const {
  const Call call;
  const Handle properties =
      own_properties(check(H5Dget_create_plist(id_.get()), "cannot examine " + where_, Access::read));
  if (H5Pget_layout(properties.get()) != H5D_CONTIGUOUS || H5Pget_nfilters(properties.get()) != 0 ||
      H5Pget_external_count(properties.get()) != 0) {
    return std::nullopt;
  }
  const Handle type = own_type(check(H5Dget_type(id_.get()), "cannot examine " + where_, Access::read));
  if (H5Tequal(type.get(), type_of(dtype_).get()) <= 0) return std::nullopt;
  const haddr_t offset = H5Dget_offset(id_.get());
  if (offset == HADDR_UNDEF) return std::nullopt;
  return offset;
}

File File::open(const std::filesystem::path& path) {
  const Call call;
  const hid_t id = H5Fopen(path.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT);
  check(id, "cannot open " + path.string() + " as HDF5", Access::read);
  return {Handle(id, close_file), path, false};
}

File File::create(const std::filesystem::path& path, bool truncate) {
  const Call call;
  const Handle properties = own_properties(H5Pcreate(H5P_FILE_ACCESS));
  H5Pset_alignment(properties.get(), 4096, 4096);  // large datasets begin on a page, so that they can be mapped
  const hid_t id = H5Fcreate(path.c_str(), truncate ? H5F_ACC_TRUNC : H5F_ACC_EXCL, H5P_DEFAULT, properties.get());
  check(id, "cannot create " + path.string(), Access::write);
  return {Handle(id, close_file), path, true};
}

bool File::exists(const std::string& object) const {
  const Call call;
  // The library answers for the last link alone and fails when a group on the way is missing.
  for (std::size_t end = object.find('/', 1);; end = object.find('/', end + 1)) {
    const std::string prefix = object.substr(0, end);
    if (prefix == "/" || prefix.empty()) return true;
    if (H5Lexists(id_.get(), prefix.c_str(), H5P_DEFAULT) <= 0) return false;
    if (end == std::string::npos) return H5Oexists_by_name(id_.get(), object.c_str(), H5P_DEFAULT) > 0;
  }
}

Handle File::open_object(const std::string& object) const {
  return {check(H5Oopen(id_.get(), object.c_str(), H5P_DEFAULT), "cannot open " + where(object),
                writable_ ? Access::write : Access::read),
          H5Oclose};
}

std::vector<std::string> File::list(const std::string& group) const {
  const Call call;
  const Access access = writable_ ? Access::write : Access::read;
  const Handle handle(check(H5Gopen2(id_.get(), group.c_str(), H5P_DEFAULT), "cannot open " + where(group), access),
                      H5Gclose);
  std::vector<std::string> names;
  const auto visit = [](hid_t, const char* name, const H5L_info_t*, void* out) -> herr_t {
    static_cast<std::vector<std::string>*>(out)->emplace_back(name);
    return 0;
  };
  check(H5Literate(handle.get(), H5_INDEX_NAME, H5_ITER_NATIVE, nullptr, visit, &names), "cannot list " + where(group),
        access);
  std::sort(names.begin(), names.end());
  return names;
}

void File::create_group(const std::string& group) {
  const Call call;
  const Handle links = link_properties();
  const hid_t id = H5Gcreate2(id_.get(), group.c_str(), links.get(), H5P_DEFAULT, H5P_DEFAULT);
  Handle(check(id, "cannot create " + where(group), Access::write), H5Gclose);
}

Dataset File::dataset(const std::string& path) const {
  const Call call;
  if (!exists(path)) fail<FormatError>("{}: there is no such dataset", where(path));
  const hid_t id = H5Dopen2(id_.get(), path.c_str(), H5P_DEFAULT);
  return {Handle(check(id, "cannot open " + where(path), Access::read), H5Dclose), where(path), writable_};
}

Dataset File::make_dataset(const std::string& path, DType dtype, std::int64_t space, std::int64_t properties) {
  const Handle links = link_properties();
  const Handle type = type_of(dtype);
  const hid_t id = H5Dcreate2(id_.get(), path.c_str(), type.get(), space, links.get(), properties, H5P_DEFAULT);
  return {Handle(check(id, "cannot create " + where(path), Access::write), H5Dclose), where(path), true};
}

Dataset File::create_dataset(const std::string& path, DType dtype, const Shape& shape) {
  const Call call;
  const Handle space = space_of(shape);
  const Handle properties = dataset_properties();
  H5Pset_layout(properties.get(), H5D_CONTIGUOUS);
  H5Pset_alloc_time(properties.get(), H5D_ALLOC_TIME_EARLY);
  H5Pset_fill_time(properties.get(), H5D_FILL_TIME_NEVER);
  return make_dataset(path, dtype, space.get(), properties.get());
}

Dataset File::create_growing(const std::string& path, DType dtype, std::int64_t chunk) {
  const Call call;
  require(chunk > 0, "hdf5: a chunk needs at least one element");
  const hsize_t none = 0;
  const hsize_t unlimited = H5S_UNLIMITED;
  const Handle space = own_space(H5Screate_simple(1, &none, &unlimited));
  const Handle properties = dataset_properties();
  const auto chunk_size = static_cast<hsize_t>(chunk);
  check(H5Pset_chunk(properties.get(), 1, &chunk_size), "cannot create " + where(path), Access::write);
  return make_dataset(path, dtype, space.get(), properties.get());
}

void File::create_virtual(const std::string& path, DType dtype, const Shape& shape,
                          std::span<const VirtualPiece> pieces) {
  const Call call;
  require(shape.rank() > 0, "hdf5: a virtual dataset needs at least one dimension");
  const std::string doing = "cannot create " + where(path);
  const Handle space = space_of(shape);
  const Handle properties = dataset_properties();
  H5Pset_layout(properties.get(), H5D_VIRTUAL);
  for (const VirtualPiece& piece : pieces) {
    if (piece.begin < 0 || piece.end < piece.begin || piece.end > shape.numel() || piece.source_begin < 0 ||
        piece.source_begin + (piece.end - piece.begin) > piece.source_size) {
      fail<InternalError>("{}: piece [{}, {}) of {} does not fit {}", where(path), piece.begin, piece.end, piece.file,
                          shape.str());
    }
    const Handle source = space_of({piece.source_size});
    auto from = static_cast<hsize_t>(piece.source_begin);
    for (const Box& box : boxes_of(shape, piece.begin, piece.end)) {
      const auto n = static_cast<hsize_t>(numel_of(box, shape.rank()));
      check(H5Sselect_hyperslab(source.get(), H5S_SELECT_SET, &from, nullptr, &n, nullptr), doing, Access::write);
      check(H5Sselect_hyperslab(space.get(), H5S_SELECT_SET, box.start.data(), nullptr, box.count.data(), nullptr),
            doing, Access::write);
      check(H5Pset_virtual(properties.get(), space.get(), piece.file.c_str(), piece.dataset.c_str(), source.get()),
            doing, Access::write);
      from += n;
    }
  }
  make_dataset(path, dtype, space.get(), properties.get());
}

bool File::has_attribute(const std::string& object, const std::string& name) const {
  const Call call;
  const Handle owner = open_object(object);
  return check(H5Aexists(owner.get(), name.c_str()), "cannot examine " + where(object), Access::read) > 0;
}

namespace {

struct Attribute {
  Handle id;
  Handle type;
  hssize_t count = 0;
  std::string what;  // "FILE: OBJECT: attribute NAME"
};

Attribute open_attribute(const Handle& owner, const std::string& object, const std::string& name) {
  Attribute a;
  a.what = object + ": attribute \"" + name + "\"";
  if (H5Aexists(owner.get(), name.c_str()) <= 0) fail<FormatError>("{} is missing", a.what);
  a.id =
      Handle(check(H5Aopen(owner.get(), name.c_str(), H5P_DEFAULT), "cannot open " + a.what, Access::read), H5Aclose);
  a.type = own_type(check(H5Aget_type(a.id.get()), "cannot read " + a.what, Access::read));
  const Handle space = own_space(check(H5Aget_space(a.id.get()), "cannot read " + a.what, Access::read));
  a.count = H5Sget_simple_extent_npoints(space.get());
  return a;
}

void need_one(const Attribute& a) {
  if (a.count != 1) fail<FormatError>("{} has {} values, expected one", a.what, a.count);
}

/// Integers of any width; 64 bits, whose sign is `is_signed`.
std::vector<std::uint64_t> read_integers(const Attribute& a, bool& is_signed) {
  if (H5Tget_class(a.type.get()) != H5T_INTEGER) fail<FormatError>("{} is not an integer", a.what);
  is_signed = H5Tget_sign(a.type.get()) != H5T_SGN_NONE;
  if (a.count < 0 || a.count > (1 << 20)) fail<FormatError>("{} has {} values", a.what, a.count);
  std::vector<std::uint64_t> values(static_cast<std::size_t>(a.count));
  if (values.empty()) return values;
  check(H5Aread(a.id.get(), is_signed ? H5T_NATIVE_INT64 : H5T_NATIVE_UINT64, values.data()), "cannot read " + a.what,
        Access::read);
  return values;
}

std::int64_t to_signed(const Attribute& a, std::uint64_t bits, bool is_signed) {
  const auto value = static_cast<std::int64_t>(bits);
  if (!is_signed && value < 0) fail<FormatError>("{} is {}, too large", a.what, bits);
  return value;
}

std::string read_string(const Attribute& a) {
  if (H5Tget_class(a.type.get()) != H5T_STRING) fail<FormatError>("{} is not a string", a.what);
  if (H5Tis_variable_str(a.type.get()) > 0) {
    const Handle memory = own_type(H5Tcopy(H5T_C_S1));
    H5Tset_size(memory.get(), H5T_VARIABLE);
    H5Tset_cset(memory.get(), H5Tget_cset(a.type.get()));
    char* text = nullptr;
    check(H5Aread(a.id.get(), memory.get(), &text), "cannot read " + a.what, Access::read);
    std::string value = text ? text : "";
    H5free_memory(text);
    return value;
  }
  const std::size_t size = H5Tget_size(a.type.get());
  if (size > (std::size_t{1} << 26)) fail<FormatError>("{} is {} bytes long", a.what, size);
  std::string value(size, '\0');
  check(H5Aread(a.id.get(), a.type.get(), value.data()), "cannot read " + a.what, Access::read);
  if (H5Tget_strpad(a.type.get()) == H5T_STR_SPACEPAD) {
    value.erase(value.find_last_not_of(' ') + 1);
  } else {
    value.resize(std::min(value.size(), value.find('\0')));
  }
  return value;
}

}  // namespace

template <>
std::uint64_t File::attribute(const std::string& object, const std::string& name) const {
  const Call call;
  const Handle owner = open_object(object);
  const Attribute a = open_attribute(owner, where(object), name);
  need_one(a);
  bool is_signed = false;
  const std::uint64_t bits = read_integers(a, is_signed)[0];
  if (is_signed && static_cast<std::int64_t>(bits) < 0) {
    fail<FormatError>("{} is {}, must not be negative", a.what, static_cast<std::int64_t>(bits));
  }
  return bits;
}

template <>
std::int64_t File::attribute(const std::string& object, const std::string& name) const {
  const Call call;
  const Handle owner = open_object(object);
  const Attribute a = open_attribute(owner, where(object), name);
  need_one(a);
  bool is_signed = false;
  const std::uint64_t bits = read_integers(a, is_signed)[0];
  return to_signed(a, bits, is_signed);
}

template <>
std::vector<std::int64_t> File::attribute(const std::string& object, const std::string& name) const {
  const Call call;
  const Handle owner = open_object(object);
  const Attribute a = open_attribute(owner, where(object), name);
  bool is_signed = false;
  std::vector<std::int64_t> values;
  for (const std::uint64_t bits : read_integers(a, is_signed)) values.push_back(to_signed(a, bits, is_signed));
  return values;
}

template <>
double File::attribute(const std::string& object, const std::string& name) const {
  const Call call;
  const Handle owner = open_object(object);
  const Attribute a = open_attribute(owner, where(object), name);
  need_one(a);
  const H5T_class_t kind = H5Tget_class(a.type.get());
  if (kind != H5T_FLOAT && kind != H5T_INTEGER) fail<FormatError>("{} is not a number", a.what);
  double value = 0;
  check(H5Aread(a.id.get(), H5T_NATIVE_DOUBLE, &value), "cannot read " + a.what, Access::read);
  return value;
}

template <>
std::string File::attribute(const std::string& object, const std::string& name) const {
  const Call call;
  const Handle owner = open_object(object);
  const Attribute a = open_attribute(owner, where(object), name);
  need_one(a);
  return read_string(a);
}

void File::put_attribute(const std::string& object, const std::string& name, std::int64_t type, std::int64_t space,
                         const void* value) {
  const Handle owner = open_object(object);
  const std::string doing = "cannot write " + where(object) + ": attribute \"" + name + "\"";
  if (H5Aexists(owner.get(), name.c_str()) > 0) check(H5Adelete(owner.get(), name.c_str()), doing, Access::write);
  const Handle attribute(
      check(H5Acreate2(owner.get(), name.c_str(), type, space, H5P_DEFAULT, H5P_DEFAULT), doing, Access::write),
      H5Aclose);
  if (value != nullptr) check(H5Awrite(attribute.get(), type, value), doing, Access::write);
}

void File::set_attribute(const std::string& object, const std::string& name, std::uint64_t value) {
  const Call call;
  put_attribute(object, name, H5T_STD_U64LE, space_of({}).get(), &value);
}

void File::set_attribute(const std::string& object, const std::string& name, std::int64_t value) {
  const Call call;
  put_attribute(object, name, H5T_STD_I64LE, space_of({}).get(), &value);
}

void File::set_attribute(const std::string& object, const std::string& name, double value) {
  const Call call;
  put_attribute(object, name, H5T_IEEE_F64LE, space_of({}).get(), &value);
}

void File::set_attribute(const std::string& object, const std::string& name, std::string_view value) {
  const Call call;
  const Handle type = own_type(H5Tcopy(H5T_C_S1));
  H5Tset_size(type.get(), value.size() + 1);  // fixed length, with its terminating zero
  H5Tset_cset(type.get(), H5T_CSET_UTF8);
  put_attribute(object, name, type.get(), space_of({}).get(), std::string(value).c_str());
}

void File::set_attribute(const std::string& object, const std::string& name, std::span<const std::int64_t> values) {
  const Call call;
  put_attribute(object, name, H5T_STD_I64LE, space_of({static_cast<std::int64_t>(values.size())}).get(),
                values.empty() ? nullptr : values.data());
}

void File::flush() {
  const Call call;
  check(H5Fflush(id_.get(), H5F_SCOPE_GLOBAL), "cannot write " + path_.string(), Access::write);
}

void File::close() {
  if (!id_) return;
  const Call call;
  if (writable_ && H5Fflush(id_.get(), H5F_SCOPE_GLOBAL) < 0) {
    try {
      fail_hdf5("cannot write " + path_.string(), Access::write);
    } catch (const Error&) {
      id_.reset();
      throw;
    }
  }
  check(id_.reset(), "cannot close " + path_.string(), writable_ ? Access::write : Access::read);
}

}  // namespace deltapipe::hdf5
