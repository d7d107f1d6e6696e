#include "checkpoints/safetensors.h"

#include "core/random.h"
#include "tests/checkpoints/testing.h"

#include <fmt/format.h>

#include <cstring>
#include <numeric>

namespace deltapipe {
namespace {

using testing::expect_error;
using testing::TemporaryFolder;

std::string file_content(std::string_view header, std::size_t data_bytes) {
  const std::uint64_t n = header.size();
  std::string s(reinterpret_cast<const char*>(&n), 8);
  s += header;
  for (std::size_t i = 0; i < data_bytes; ++i) s += static_cast<char>(i);
  return s;
}

std::string entry(std::string_view name, std::string_view dtype, std::string_view shape, std::string_view offsets) {
  return fmt::format(R"("{}":{{"dtype":"{}","shape":{},"data_offsets":{}}})", name, dtype, shape, offsets);
}

/// A header of these entries.
std::string object(std::initializer_list<std::string> entries) {
  return fmt::format("{{{}}}", fmt::join(entries, ","));
}

struct Malformed {
  const char* what;
  std::string header;
  std::size_t data_bytes;
  std::string_view names;  // what the message must contain
};

TEST(Safetensors, RefusesEveryMalformedHeaderNamingTheTensor) {
  const std::string good = entry("weight.a", "F32", "[2]", "[0,8]");
  const auto one = [](std::string_view shape, std::string_view offsets, std::string_view dtype = "F32") {
    return object({entry("weight.a", dtype, shape, offsets)});
  };
  const std::vector<Malformed> cases{
      {"empty header", "", 0, "does not begin"},
      {"not JSON", "{hello}", 0, "not valid JSON"},
      {"cut JSON", object({good}).substr(0, good.size() + 1), 8, "not valid JSON"},
      {"text after JSON", object({good}) + "x", 8, "not valid JSON"},
      {"NUL after JSON", object({good}) + std::string(3, '\0'), 8, "NUL"},
      {"not UTF-8", "{\"a\xff\":1}", 0, "UTF-8"},
      {"an array", "[1]", 0, "does not begin"},
      {"byte order mark", "\xef\xbb\xbf{}", 0, "does not begin"},
      {"deep nesting", "{\"a\":" + std::string(100'000, '['), 0, "nested"},
      {"duplicate name", object({good, good}), 8, "weight.a"},
      {"duplicate key in an entry", R"({"weight.a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1,
       "'dtype'"},
      {"entry is not an object", R"({"weight.a":[1]})", 0, "weight.a"},
      {"no dtype", R"({"weight.a":{"shape":[1],"data_offsets":[0,1]}})", 1, "weight.a"},
      {"no shape", R"({"weight.a":{"dtype":"U8","data_offsets":[0,1]}})", 1, "weight.a"},
      {"no offsets", R"({"weight.a":{"dtype":"U8","shape":[1]}})", 1, "weight.a"},
      {"foreign key", R"({"weight.a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":0}})", 1, "weight.a"},
      {"dtype is a number", R"({"weight.a":{"dtype":7,"shape":[1],"data_offsets":[0,1]}})", 1, "weight.a"},
      {"unknown dtype", one("[2]", "[0,8]", "F33"), 8, "weight.a"},
      {"lower-case dtype", one("[2]", "[0,8]", "f32"), 8, "weight.a"},
      {"shape is a number", one("2", "[0,8]"), 8, "weight.a"},
      {"fractional dimension", one("[2.0]", "[0,8]"), 8, "weight.a"},
      {"boolean dimension", one("[true]", "[0,4]"), 4, "weight.a"},
      {"negative dimension", one("[-2]", "[0,8]"), 8, "weight.a"},
      {"two negative dimensions", one("[-2,-1]", "[0,8]"), 8, "weight.a"},
      {"dimension over 2^63", one("[9223372036854775808]", "[0,8]"), 8, "weight.a"},
      {"dimension over 2^64", one("[18446744073709551618]", "[0,8]"), 8, "weight.a"},
      {"product wraps to the right size", one("[4294967296,4294967296,4294967296]", "[0,0]"), 0, "weight.a"},
      {"bytes wrap to the right size", one("[4611686018427387904]", "[0,0]", "F64"), 0, "weight.a"},
      {"overflow hidden behind a zero", one("[4611686018427387904,4,0]", "[0,0]"), 0, "weight.a"},
      {"seven dimensions", one("[1,1,1,1,1,1,2]", "[0,8]"), 8, "weight.a"},
      {"offsets are an object", one("[2]", "{}"), 8, "weight.a"},
      {"one offset", one("[2]", "[0]"), 8, "weight.a"},
      {"three offsets", one("[2]", "[0,8,8]"), 8, "weight.a"},
      {"negative offset", one("[2]", "[-8,0]"), 8, "weight.a"},
      {"fractional offset", one("[2]", "[0,8.0]"), 8, "weight.a"},
      {"begin > end", one("[2]", "[8,0]"), 8, "weight.a"},
      {"end past the file", one("[2]", "[0,8]"), 7, "weight.a"},
      {"range past the file", one("[2]", "[8,16]"), 8, "weight.a"},
      {"huge range", one("[2]", "[18446744073709551608,18446744073709551615]"), 8, "weight.a"},
      {"fewer bytes than the shape", one("[3]", "[0,8]"), 8, "weight.a"},
      {"more bytes than the shape", one("[1]", "[0,8]"), 8, "weight.a"},
      {"part of a byte", one("[3]", "[0,2]", "F4"), 2, "weight.a"},
      {"trailing bytes", one("[2]", "[0,8]"), 9, "weight.a"},
      {"only trailing bytes", "{}", 3, "unused"},
      {"gap at the beginning", one("[2]", "[1,9]"), 9, "weight.a"},
      {"gap in the middle", object({good, entry("weight.b", "U8", "[1]", "[9,10]")}), 10, "weight.b"},
      {"overlap", object({good, entry("weight.b", "U8", "[2]", "[7,9]")}), 9, "weight.b"},
      {"same range twice", object({good, entry("weight.b", "F32", "[2]", "[0,8]")}), 8, "weight.b"},
      {"one range inside another", object({good, entry("weight.b", "U8", "[1]", "[3,4]")}), 8, "weight.b"},
      {"metadata is a string", R"({"__metadata__":"pt"})", 0, "__metadata__"},
      {"metadata of numbers", R"({"__metadata__":{"format":1}})", 0, "format"},
      {"newline in a name", R"({"a\nb":1})", 0, "a\\x0ab"},
  };
  const TemporaryFolder folder;
  for (const Malformed& c : cases) {
    SCOPED_TRACE(c.what);
    testing::write_text(folder / "bad.safetensors", file_content(c.header, c.data_bytes));
    expect_error<FormatError>([&] { SafetensorsFile(folder / "bad.safetensors"); }, {"bad.safetensors", c.names});
  }
  // The same scaffold without a fault is accepted: the cases above fail for their own reason.
  testing::write_text(folder / "good.safetensors", file_content(object({good}) + "  ", 8));
  EXPECT_EQ(SafetensorsFile(folder / "good.safetensors").at("weight.a").shape, Shape({2}));
}

TEST(Safetensors, RefusesWrongHeaderLengthsAndTruncation) {
  const TemporaryFolder folder;
  const auto path = folder / "bad.safetensors";
  const std::string good = file_content(object({entry("weight.a", "F32", "[2]", "[0,8]")}), 8);
  for (std::size_t n = 0; n < good.size(); ++n) {
    testing::write_text(path, good.substr(0, n));
    expect_error<FormatError>([&] { SafetensorsFile{path}; }, {"bad.safetensors"});
  }
  for (const std::uint64_t length : {std::uint64_t{good.size() - 7}, SafetensorsFile::max_header_bytes + 1,
                                     std::uint64_t{1} << 63, ~std::uint64_t{0}, ~std::uint64_t{0} - 7}) {
    std::string s = good;
    std::memcpy(s.data(), &length, 8);
    testing::write_text(path, s);
    expect_error<FormatError>([&] { SafetensorsFile{path}; }, {"bad.safetensors", std::to_string(length)});
  }
  expect_error<IoError>([&] { SafetensorsFile(folder / "none.safetensors"); }, {"none.safetensors"});
  expect_error<IoError>([&] { SafetensorsFile(folder.path()); }, {folder.path().string()});
}

TEST(Safetensors, AcceptsScalarsEmptyTensorsAndForeignDtypes) {
  const TemporaryFolder folder;
  const auto path = folder / "f.safetensors";
  testing::write_text(
      path, file_content(object({entry("scalar", "F64", "[]", "[0,8]"), entry("empty", "F32", "[0,5]", "[8,8]"),
                                 entry("mask", "BOOL", "[3]", "[8,11]"), entry("four", "F4", "[4]", "[11,13]"),
                                 R"("__metadata__":{"k":"v"})"}),
                         13));
  const SafetensorsFile file(path);
  EXPECT_EQ(file.tensors().size(), 4u);
  EXPECT_EQ(file.metadata().at("k"), "v");
  EXPECT_EQ(file.at("scalar").shape.rank(), 0);
  EXPECT_EQ(file.at("empty").bytes.size(), 0u);
  EXPECT_EQ(file.find("absent"), nullptr);
  EXPECT_EQ(supported_dtype(file.at("scalar"), path), DType::f64);
  expect_error<FormatError>([&] { supported_dtype(file.at("mask"), path); }, {"f.safetensors", "mask", "BOOL", "BF16"});
  expect_error<FormatError>([&] { file.at("absent"); }, {"f.safetensors", "absent"});
}

// Whatever bytes change, the reader gives tensors inside the file or a FormatError.
TEST(Safetensors, SurvivesRandomDamage) {
  const std::string good =
      file_content(object({entry("a", "F32", "[2,1]", "[0,8]"), entry("b", "BF16", "[3]", "[8,14]"),
                           entry("c", "U8", "[]", "[14,15]"), R"("__metadata__":{"format":"pt"})"}),
                   15);
  const TemporaryFolder folder;
  const auto path = folder / "f.safetensors";
  RandomStream random(20250, "safetensors damage");
  int parsed = 0, refused = 0;
  for (int round = 0; round < 6000; ++round) {
    std::string s = good;
    switch (random.next_below(5)) {
      case 0: s.resize(random.next_below(s.size())); break;
      case 1:
        s.insert(random.next_below(s.size()), 1 + random.next_below(3), "0[]{},:\"-9"[random.next_below(10)]);
        break;
      case 2: s.erase(random.next_below(s.size()), 1 + random.next_below(3)); break;
      case 3:  // digits for digits: the JSON stays whole and its numbers go wrong
        for (char& c : s) {
          if (c >= '0' && c <= '9' && random.next_below(12) == 0) c = static_cast<char>('0' + random.next_below(10));
        }
        break;
      default:
        for (std::uint64_t i = 0, n = 1 + random.next_below(3); i < n; ++i) {
          s[random.next_below(s.size())] ^= static_cast<char>(1u << random.next_below(8));
        }
    }
    testing::write_text(path, s);
    try {
      const SafetensorsFile file(path);
      std::size_t sum = 0, bytes = 0;
      for (const SafetensorsTensor& t : file.tensors()) {
        bytes += t.bytes.size();
        sum = std::accumulate(t.bytes.begin(), t.bytes.end(), sum,
                              [](std::size_t a, std::byte b) { return a + std::to_integer<std::size_t>(b); });
        supported_dtype(t, path);
      }
      EXPECT_LT(bytes, s.size());
      EXPECT_LE(sum, bytes * 255);
      ++parsed;
    } catch (const FormatError&) {
      ++refused;
    }
  }
  EXPECT_GT(parsed, 100);  // damage to data and to names goes unnoticed, as the format has no checksum
  EXPECT_GT(refused, 3000);
}

std::vector<std::byte> random_bytes(std::size_t n, std::uint64_t stream) {
  RandomStream random(7, stream);
  std::vector<std::byte> v(n);
  for (auto& b : v) b = static_cast<std::byte>(random.next_below(256));
  return v;
}

TEST(SafetensorsWriter, RoundTripsEveryDtype) {
  const TemporaryFolder folder;
  const auto path = folder / "f.safetensors";
  const std::vector<SafetensorsEntry> entries{
      {"odd", DType::u8, {3}},      {"half", DType::f16, {5}},  {"brain", DType::bf16, {1, 3}}, {"f", DType::f32, {7}},
      {"d", DType::f64, {2, 3, 1}}, {"i", DType::i32, {3}},     {"l", DType::i64, {2}},         {"u", DType::u32, {1}},
      {"ul", DType::u64, {1}},      {"scalar", DType::f32, {}}, {"none", DType::f32, {0, 4}},
  };
  std::vector<std::vector<std::byte>> data;
  SafetensorsWriter writer(path, entries);
  for (std::size_t i = entries.size(); i-- > 0;) {  // any order
    const auto& e = entries[i];
    data.push_back(random_bytes(static_cast<std::size_t>(e.shape.numel()) * size_of(e.dtype), i));
    writer.write(e.name, Tensor(data.back().data(), e.dtype, e.shape));
    EXPECT_FALSE(std::filesystem::exists(path));
  }
  writer.finish();
  EXPECT_EQ(testing::names_in(folder.path()).size(), 1u);

  const SafetensorsFile file(path);
  EXPECT_EQ(file.metadata(), (std::map<std::string, std::string>{{"format", "pt"}}));
  ASSERT_EQ(file.tensors().size(), entries.size());
  const std::string content = read_file(path);
  std::uint64_t header = 0;
  std::memcpy(&header, content.data(), 8);
  EXPECT_EQ(header % 8, 0u);
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const SafetensorsTensor& t = file.at(entries[i].name);
    SCOPED_TRACE(t.name);
    EXPECT_EQ(t.dtype, entries[i].dtype);
    EXPECT_EQ(t.shape, entries[i].shape);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(t.bytes.data()) % size_of(*t.dtype), 0u);  // the map is page-aligned
    const auto& expected = data[entries.size() - 1 - i];
    EXPECT_TRUE(std::equal(t.bytes.begin(), t.bytes.end(), expected.begin(), expected.end()));
  }
}

TEST(SafetensorsWriter, LeavesNothingWhenItIsNotFinished) {
  const TemporaryFolder folder;
  const auto path = folder / "f.safetensors";
  std::vector<float> values(4096, 1.0f);
  const Tensor t(values.data(), DType::f32, {4096});
  { SafetensorsWriter writer(path, {{"a", DType::f32, {4096}}}); }
  EXPECT_TRUE(testing::names_in(folder.path()).empty());
  expect_error<InternalError>(
      [&] {
        SafetensorsWriter writer(path, {{"a", DType::f32, {4096}}, {"b", DType::f32, {1}}});
        writer.write("a", t);
        writer.finish();
      },
      {"'b'"});
  EXPECT_TRUE(testing::names_in(folder.path()).empty());
  {
    SafetensorsWriter writer(path, {{"a", DType::f32, {4096}}});
    expect_error<InternalError>([&] { writer.write("z", t); }, {"'z'"});
    expect_error<InternalError>([&] { writer.write("a", t.rows(0, 5)); }, {"'a'", "[5]", "[4096]"});
    writer.write("a", t);
    expect_error<InternalError>([&] { writer.write("a", t); }, {"'a'"});
  }
  EXPECT_TRUE(testing::names_in(folder.path()).empty());
}

TEST(SafetensorsWriter, KeepsTheOldFileWhenTheDiskIsFull) {
  const TemporaryFolder folder;
  const auto path = folder / "f.safetensors";
  testing::write_text(path, "old");
  std::vector<float> values(4096, 1.0f);
  for (const rlim_t limit : {0, 40, 4096}) {  // fails in the header, in the header, in the tensor
    const testing::FileSizeLimit full(limit);
    expect_error<IoError>(
        [&] {
          SafetensorsWriter writer(path, {{"a", DType::f32, {4096}}});
          writer.write("a", Tensor(values.data(), DType::f32, {4096}));
          writer.finish();
        },
        {"f.safetensors"});
  }
  EXPECT_EQ(read_file(path), "old");
  EXPECT_EQ(testing::names_in(folder.path()).size(), 1u);
  expect_error<IoError>([&] { SafetensorsWriter(path / "g.safetensors", {}); }, {"g.safetensors"});
}

}  // namespace
}  // namespace deltapipe
