// Attributes: the part of core/hdf5.h that reads and writes them.
#include "core/error.h"
#include "core/hdf5_detail.h"

#include <algorithm>

namespace deltapipe::hdf5 {

Handle File::open_object(const std::string& object) const {
  return {check(H5Oopen(id_.get(), object.c_str(), H5P_DEFAULT), "cannot open " + where(object),
                writable_ ? Access::write : Access::read),
          H5Oclose};
}

bool File::has_attribute(const std::string& object, const std::string& name) const {
  const Call call;
  const Handle owner = open_object(object);
  return check(H5Aexists(owner.get(), name.c_str()), "cannot examine " + where(object), Access::read) > 0;
}

namespace {

Handle scalar_space() { return own_space(H5Screate(H5S_SCALAR)); }

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
  put_attribute(object, name, H5T_STD_U64LE, scalar_space().get(), &value);
}

void File::set_attribute(const std::string& object, const std::string& name, std::int64_t value) {
  const Call call;
  put_attribute(object, name, H5T_STD_I64LE, scalar_space().get(), &value);
}

void File::set_attribute(const std::string& object, const std::string& name, double value) {
  const Call call;
  put_attribute(object, name, H5T_IEEE_F64LE, scalar_space().get(), &value);
}

void File::set_attribute(const std::string& object, const std::string& name, std::string_view value) {
  const Call call;
  const Handle type = own_type(H5Tcopy(H5T_C_S1));
  H5Tset_size(type.get(), value.size() + 1);  // fixed length, with its terminating zero
  H5Tset_cset(type.get(), H5T_CSET_UTF8);
  put_attribute(object, name, type.get(), scalar_space().get(), std::string(value).c_str());
}

void File::set_attribute(const std::string& object, const std::string& name, std::span<const std::int64_t> values) {
  const Call call;
  const auto count = static_cast<hsize_t>(values.size());
  const Handle list_space = own_space(H5Screate_simple(1, &count, nullptr));
  put_attribute(object, name, H5T_STD_I64LE, list_space.get(), values.empty() ? nullptr : values.data());
}

}  // namespace deltapipe::hdf5
