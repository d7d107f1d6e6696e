#include "core/hdf5.h"

#include "core/file.h"
#include "core/random.h"

#include <gtest/gtest.h>
#include <hdf5.h>
#include <sys/file.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <thread>

namespace {
int lock_refusal = 0;  // errno that locking gives; 0: it works
}  // namespace

/// The one that the HDF5 library calls, too: the program's symbols come before those of libc.
extern "C" int flock(int fd, int operation) noexcept {
  if (lock_refusal == 0) return static_cast<int>(syscall(SYS_flock, fd, operation));
  errno = lock_refusal;
  return -1;
}

namespace deltapipe {
namespace {

namespace fs = std::filesystem;
using hdf5::File;

class Hdf5 : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "deltapipe-hdf5-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
  }
  void TearDown() override { fs::remove_all(folder_); }
  fs::path folder_;
};

template <class E>
std::string message_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const E& e) {
    return e.what();
  } catch (const std::exception& e) {
    ADD_FAILURE() << "another kind of error: " << e.what();
    return "";
  }
  ADD_FAILURE() << "no error";
  return "";
}

bool contains(const std::string& text, std::string_view part) { return text.find(part) != std::string::npos; }

Tensor whole(std::vector<std::byte>& bytes, DType dtype, const Shape& shape) {
  bytes.resize(static_cast<std::size_t>(shape.numel()) * size_of(dtype));
  return {bytes.data(), dtype, shape};
}

std::vector<std::byte> random_bytes(std::size_t n, std::uint64_t seed) {
  RandomStream random(seed, "bytes");
  std::vector<std::byte> bytes(n);
  for (auto& b : bytes) b = static_cast<std::byte>(random.next_bits());
  return bytes;
}

constexpr DType every_dtype[] = {DType::f32, DType::f64, DType::bf16, DType::f16, DType::u8,
                                 DType::i32, DType::u32, DType::i64,  DType::u64};

TEST_F(Hdf5, KeepsEveryBitOfEveryType) {
  const fs::path path = folder_ / "a.h5";
  const Shape shapes[] = {{}, {1}, {7}, {3, 5}, {2, 3, 4}, {2, 1, 3, 1, 2, 3}, {0, 4}};
  std::vector<std::vector<std::byte>> contents;
  {
    File file = File::create(path);
    for (DType dtype : every_dtype) {
      for (const Shape& shape : shapes) {
        // Random bits hold NaN payloads, subnormals and infinities, all of which must survive.
        contents.push_back(random_bytes(static_cast<std::size_t>(shape.numel()) * size_of(dtype), contents.size()));
        auto d = file.create_dataset("/group/" + std::to_string(contents.size()), dtype, shape);
        d.write({contents.back().data(), dtype, shape});
      }
    }
    file.close();
  }
  const File file = File::open(path);
  std::size_t i = 0;
  for (DType dtype : every_dtype) {
    for (const Shape& shape : shapes) {
      const auto d = file.dataset("/group/" + std::to_string(i + 1));
      EXPECT_EQ(d.dtype(), dtype) << name_of(dtype);
      EXPECT_EQ(d.shape(), shape) << d.shape().str();
      std::vector<std::byte> back;
      d.read(whole(back, dtype, shape));
      EXPECT_EQ(back, contents[i]) << name_of(dtype) << shape.str();
      ++i;
    }
  }
  EXPECT_EQ(file.list("/"), std::vector<std::string>{"group"});
  EXPECT_EQ(file.list("/group").size(), contents.size());
  EXPECT_TRUE(file.exists("/"));
  EXPECT_TRUE(file.exists("/group/1"));
  EXPECT_FALSE(file.exists("/group/none"));
  EXPECT_FALSE(file.exists("/none/1"));
}

TEST_F(Hdf5, OtherReadersSeeBfloat16AsNumbers) {
  const float numbers[] = {1.0f, -2.5f, 3.140625f, 1e30f, 0.0f};
  std::vector<BFloat16> stored;
  for (float x : numbers) stored.push_back(to_bfloat16(x));
  {
    File file = File::create(folder_ / "a.h5");
    file.create_dataset("/x", DType::bf16, {5}).write({stored.data(), DType::bf16, {5}});
    file.close();
  }
  const hid_t id = H5Fopen((folder_ / "a.h5").c_str(), H5F_ACC_RDONLY, H5P_DEFAULT);
  const hid_t x = H5Dopen2(id, "/x", H5P_DEFAULT);
  float seen[5] = {};
  EXPECT_GE(H5Dread(x, H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, H5P_DEFAULT, seen), 0);
  for (std::size_t i = 0; i < 5; ++i) EXPECT_EQ(seen[i], to_float(stored[i]));
  H5Dclose(x);
  H5Fclose(id);
}

TEST_F(Hdf5, ReadsAndWritesFlatRanges) {
  const Shape shape{3, 4, 5};
  std::vector<std::int32_t> expected(60);
  RandomStream random(7, "ranges");
  File file = File::create(folder_ / "a.h5");
  auto d = file.create_dataset("/x", DType::i32, shape);
  d.write({expected.data(), DType::i32, shape});
  for (int round = 0; round < 200; ++round) {
    const auto a = static_cast<std::int64_t>(random.next_below(61));
    const auto b = static_cast<std::int64_t>(random.next_below(61));
    const std::int64_t begin = std::min(a, b), count = std::max(a, b) - begin;
    for (std::int64_t i = begin; i < begin + count; ++i) {
      expected[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(random.next_bits());
    }
    d.write(begin, {expected.data() + begin, DType::i32, {count}});
    const auto c = static_cast<std::int64_t>(random.next_below(61));
    std::vector<std::int32_t> back(static_cast<std::size_t>(60 - c));
    d.read(c, {back.data(), DType::i32, {60 - c}});
    ASSERT_TRUE(std::equal(back.begin(), back.end(), expected.begin() + c)) << begin << " " << count << " " << c;
  }
}

TEST_F(Hdf5, GrowsByAppending) {
  std::vector<std::uint32_t> all(1000);
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::uint32_t>(i * 7);
  {
    File file = File::create(folder_ / "a.h5");
    auto d = file.create_growing("/tokens", DType::u32, 64);
    std::int64_t done = 0;
    for (std::int64_t n : {1, 63, 0, 500, 436}) {
      d.append({all.data() + done, DType::u32, {n}});
      done += n;
    }
    EXPECT_EQ(d.numel(), 1000);
    file.close();
  }
  const auto file = File::open(folder_ / "a.h5");
  const auto d = file.dataset("/tokens");
  std::vector<std::uint32_t> back(1000);
  d.read({back.data(), DType::u32, {1000}});
  EXPECT_EQ(back, all);
  EXPECT_EQ(d.file_offset(), std::nullopt);
}

TEST_F(Hdf5, FileOffsetPointsAtTheElements) {
  std::vector<std::uint32_t> tokens(5000);
  for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<std::uint32_t>(i);
  std::uint64_t offset = 0;
  {
    File file = File::create(folder_ / "a.h5");
    auto d = file.create_dataset("/tokens", DType::u32, {5000});
    offset = d.file_offset().value();
    d.write({tokens.data(), DType::u32, {5000}});
    file.close();
  }
  const auto file = File::open(folder_ / "a.h5");
  EXPECT_EQ(file.dataset("/tokens").file_offset(), offset);
  EXPECT_EQ(offset % 4096, 0u);
  const MappedFile map(folder_ / "a.h5");
  EXPECT_EQ(std::memcmp(map.bytes().data() + offset, tokens.data(), 20000), 0);
}

TEST_F(Hdf5, Attributes) {
  {
    File file = File::create(folder_ / "a.h5");
    file.create_group("/some/group");
    file.set_attribute("/", "u", std::uint64_t{18446744073709551615u});
    file.set_attribute("/", "i", std::int64_t{-5});
    file.set_attribute("/", "d", 0.1);
    file.set_attribute("/", "s", "größe");
    file.set_attribute("/some/group", "empty", "");
    file.set_attribute("/some/group", "shape", std::vector<std::int64_t>{3, 4});
    file.set_attribute("/some/group", "none", std::vector<std::int64_t>{});
    file.set_attribute("/", "s", "replaced");
    file.close();
  }
  const auto file = File::open(folder_ / "a.h5");
  EXPECT_EQ(file.attribute<std::uint64_t>("/", "u"), 18446744073709551615u);
  EXPECT_EQ(file.attribute<std::int64_t>("/", "i"), -5);
  EXPECT_EQ(file.attribute<double>("/", "d"), 0.1);
  EXPECT_EQ(file.attribute<std::string>("/", "s"), "replaced");
  EXPECT_EQ(file.attribute<std::string>("/some/group", "empty"), "");
  EXPECT_EQ(file.attribute<std::vector<std::int64_t>>("/some/group", "shape"), (std::vector<std::int64_t>{3, 4}));
  EXPECT_TRUE(file.attribute<std::vector<std::int64_t>>("/some/group", "none").empty());
  EXPECT_TRUE(file.has_attribute("/", "u"));
  EXPECT_FALSE(file.has_attribute("/", "v"));
  EXPECT_TRUE(contains(message_of<FormatError>([&] { file.attribute<double>("/", "v"); }), "\"v\" is missing"));
  EXPECT_TRUE(contains(message_of<FormatError>([&] { file.attribute<std::uint64_t>("/", "i"); }), "negative"));
  EXPECT_TRUE(contains(message_of<FormatError>([&] { file.attribute<std::int64_t>("/", "u"); }), "too large"));
  EXPECT_TRUE(contains(message_of<FormatError>([&] { file.attribute<std::string>("/", "u"); }), "not a string"));
  EXPECT_TRUE(contains(message_of<FormatError>([&] { file.attribute<double>("/", "s"); }), "not a number"));
}

TEST_F(Hdf5, ReadsAttributesAsOtherWritersStoreThem) {
  const hid_t id = H5Fcreate((folder_ / "a.h5").c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
  const hid_t scalar = H5Screate(H5S_SCALAR);
  const auto put = [&](const char* name, hid_t type, const void* value) {
    const hid_t a = H5Acreate2(id, name, type, scalar, H5P_DEFAULT, H5P_DEFAULT);
    EXPECT_GE(H5Awrite(a, type, value), 0);
    H5Aclose(a);
  };
  const hid_t variable = H5Tcopy(H5T_C_S1);
  H5Tset_size(variable, H5T_VARIABLE);
  H5Tset_cset(variable, H5T_CSET_UTF8);
  const char* text = "variable";
  put("variable", variable, &text);
  const hid_t padded = H5Tcopy(H5T_FORTRAN_S1);
  H5Tset_size(padded, 8);
  put("padded", padded, "abc     ");
  const std::int16_t narrow = -3;
  put("narrow", H5T_NATIVE_INT16, &narrow);
  const std::uint16_t big_endian = 0x0102;
  put("big_endian", H5T_STD_U16BE, &big_endian);
  H5Tclose(variable);
  H5Tclose(padded);
  H5Sclose(scalar);
  H5Fclose(id);

  const auto file = File::open(folder_ / "a.h5");
  EXPECT_EQ(file.attribute<std::string>("/", "variable"), "variable");
  EXPECT_EQ(file.attribute<std::string>("/", "padded"), "abc");
  EXPECT_EQ(file.attribute<std::int64_t>("/", "narrow"), -3);
  EXPECT_EQ(file.attribute<double>("/", "narrow"), -3.0);
  EXPECT_EQ(file.attribute<std::uint64_t>("/", "big_endian"), 0x0201u);
}

TEST_F(Hdf5, VirtualDatasetsJoinPieces) {
  RandomStream random(11, "virtual");
  const Shape shapes[] = {{17}, {5, 7}, {3, 4, 5}, {2, 3, 1, 4}, {1, 9}};
  for (DType dtype : {DType::f32, DType::bf16, DType::f64}) {
    for (const Shape& shape : shapes) {
      const std::string stem = "t" + std::to_string(random.next_bits());
      const std::int64_t n = shape.numel();
      auto content = random_bytes(static_cast<std::size_t>(n) * size_of(dtype), random.next_bits());
      std::vector<std::int64_t> cuts = {0, n};
      for (int i = 0; i < 3; ++i)
        cuts.push_back(static_cast<std::int64_t>(random.next_below(static_cast<std::uint64_t>(n + 1))));
      std::sort(cuts.begin(), cuts.end());
      std::vector<hdf5::VirtualPiece> pieces;
      for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
        if (cuts[i] == cuts[i + 1]) continue;
        const std::string name = stem + "-" + std::to_string(i) + ".h5";
        const std::int64_t count = cuts[i + 1] - cuts[i];
        File file = File::create(folder_ / name);
        // Two elements of other content stand before the piece.
        auto d = file.create_dataset("/part/x", dtype, {count + 2});
        d.write(2, {content.data() + static_cast<std::size_t>(cuts[i]) * size_of(dtype), dtype, {count}});
        file.close();
        pieces.push_back({name, "/part/x", count + 2, 2, cuts[i], cuts[i + 1]});
      }
      {
        File file = File::create(folder_ / (stem + ".h5"));
        file.create_virtual("/whole/x", dtype, shape, pieces);
        file.close();
      }
      // The folder may move.
      const fs::path moved = folder_ / ("moved-" + stem);
      fs::create_directory(moved);
      for (const auto& entry : fs::directory_iterator(folder_)) {
        if (entry.is_regular_file()) fs::rename(entry.path(), moved / entry.path().filename());
      }
      const auto file = File::open(moved / (stem + ".h5"));
      const auto d = file.dataset("/whole/x");
      EXPECT_EQ(d.shape(), shape);
      EXPECT_EQ(d.dtype(), dtype);
      EXPECT_EQ(d.file_offset(), std::nullopt);
      std::vector<std::byte> back;
      d.read(whole(back, dtype, shape));
      EXPECT_EQ(back, content) << shape.str();
    }
  }
}

TEST_F(Hdf5, NamesWhatIsWrong) {
  const fs::path path = folder_ / "a.h5";
  {
    File file = File::create(path);
    std::vector<float> x(6);
    file.create_dataset("/g/x", DType::f32, {2, 3}).write({x.data(), DType::f32, {2, 3}});
    EXPECT_THROW(file.create_dataset("/g/x", DType::f32, {1}), InternalError);
    file.close();
  }
  EXPECT_TRUE(contains(message_of<IoError>([&] { File::create(path); }), "File exists"));
  const std::string missing = message_of<IoError>([&] { File::open(folder_ / "no.h5"); });
  EXPECT_TRUE(contains(missing, "no.h5") && contains(missing, "No such file")) << missing;
  EXPECT_THROW(File::open(folder_), IoError);
  EXPECT_THROW(File::create(folder_ / "no" / "a.h5"), IoError);

  const auto file = File::open(path);
  const std::string none = message_of<FormatError>([&] { file.dataset("/g/y"); });
  EXPECT_TRUE(contains(none, "a.h5: /g/y")) << none;
  EXPECT_THROW(file.dataset("/g"), FormatError);
  EXPECT_THROW(file.list("/none"), FormatError);
  const auto d = file.dataset("/g/x");
  std::vector<double> doubles(6);
  const std::string dtype = message_of<FormatError>([&] { d.read({doubles.data(), DType::f64, {2, 3}}); });
  EXPECT_TRUE(contains(dtype, "float32") && contains(dtype, "float64") && contains(dtype, "/g/x")) << dtype;
  std::vector<float> floats(8);
  EXPECT_THROW(d.read({floats.data(), DType::f32, {8}}), FormatError);
  EXPECT_THROW(d.read(2, {floats.data(), DType::f32, {5}}), FormatError);
  EXPECT_THROW(d.read(-1, {floats.data(), DType::f32, {1}}), FormatError);
  EXPECT_THROW(d.write({floats.data(), DType::f32, {6}}), InternalError);
}

TEST_F(Hdf5, ForeignAndDamagedFiles) {
  const fs::path path = folder_ / "a.h5";
  std::ofstream(folder_ / "empty.h5");
  EXPECT_TRUE(contains(message_of<FormatError>([&] { File::open(folder_ / "empty.h5"); }), "empty.h5"));
  std::ofstream(folder_ / "text.h5") << std::string(5000, 'x');
  EXPECT_THROW(File::open(folder_ / "text.h5"), FormatError);
  {
    File file = File::create(path);
    std::vector<float> x(3000);
    file.create_dataset("/x", DType::f32, {3000}).write({x.data(), DType::f32, {3000}});
    file.close();
  }
  fs::resize_file(path, fs::file_size(path) - 100);
  EXPECT_TRUE(contains(message_of<FormatError>([&] { File::open(path); }), "truncated"));

  const hid_t id = H5Fcreate((folder_ / "types.h5").c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
  const hsize_t n = 3;
  const hid_t space = H5Screate_simple(1, &n, nullptr);
  const auto make = [&](const char* name, hid_t type, hid_t s) {
    H5Dclose(H5Dcreate2(id, name, type, s, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
  };
  make("string", H5T_C_S1, space);
  make("i16", H5T_STD_I16LE, space);
  make("big", H5T_STD_U32BE, space);
  const hid_t null = H5Screate(H5S_NULL);
  make("null", H5T_STD_U32LE, null);
  H5Sclose(null);
  H5Sclose(space);
  H5Fclose(id);
  const auto file = File::open(folder_ / "types.h5");
  EXPECT_THROW(file.dataset("/string"), FormatError);
  EXPECT_THROW(file.dataset("/i16"), FormatError);
  EXPECT_THROW(file.dataset("/null"), FormatError);
  EXPECT_EQ(file.dataset("/big").dtype(), DType::u32);
  EXPECT_EQ(file.dataset("/big").file_offset(), std::nullopt);
}

TEST_F(Hdf5, ALockedFileIsNamedAsSuch) {
  {
    File file = File::create(folder_ / "a.h5");
    file.close();
  }
  const int fd = open((folder_ / "a.h5").c_str(), O_RDWR);
  ASSERT_GE(fd, 0);
  ASSERT_EQ(flock(fd, LOCK_EX), 0);
  EXPECT_TRUE(contains(message_of<IoError>([&] { File::open(folder_ / "a.h5"); }), "another process"));
  close(fd);
  File::open(folder_ / "a.h5");
}

TEST_F(Hdf5, AFileSystemWithoutLocksIsNamedAsSuch) {
  {
    File file = File::create(folder_ / "a.h5");
    file.close();
  }
  for (int refusal : {ENOLCK, EOPNOTSUPP}) {
    lock_refusal = refusal;
    for (const auto& use : std::vector<std::function<void()>>{[&] { File::open(folder_ / "a.h5"); },
                                                              [&] { File::create(folder_ / "b.h5"); }}) {
      const std::string message = message_of<IoError>(use);
      EXPECT_TRUE(contains(message, "HDF5_USE_FILE_LOCKING=FALSE")) << message;
      EXPECT_TRUE(contains(message, std::strerror(refusal))) << message;
      fs::remove(folder_ / "b.h5");
    }
    lock_refusal = 0;
  }
}

TEST_F(Hdf5, ClosingTakesOpenDatasetsAlong) {
  File file = File::create(folder_ / "a.h5");
  std::vector<float> x(5, 1.5f);
  auto d = file.create_dataset("/x", DType::f32, {5});
  auto growing = file.create_growing("/y", DType::f32, 4);
  d.write({x.data(), DType::f32, {5}});
  growing.append({x.data(), DType::f32, {5}});
  file.close();
  const std::string before = read_file(folder_ / "a.h5");
  EXPECT_THROW(d.write({x.data(), DType::f32, {5}}), Error);
  {
    const File again = File::open(folder_ / "a.h5");  // a writer that were still open would hold the lock
    std::vector<float> back(5);
    again.dataset("/y").read({back.data(), DType::f32, {5}});
    EXPECT_EQ(back, x);
  }
  d = File::open(folder_ / "a.h5").dataset("/x");
  growing = File::open(folder_ / "a.h5").dataset("/y");
  EXPECT_EQ(read_file(folder_ / "a.h5"), before);
}

TEST_F(Hdf5, EqualContentsGiveEqualFiles) {
  for (const char* name : {"a.h5", "b.h5"}) {
    File file = File::create(folder_ / name);
    const float x = 1.5f;
    file.create_dataset("/g/x", DType::f32, {1}).write({const_cast<float*>(&x), DType::f32, {1}});
    file.set_attribute("/g/x", "begin", std::int64_t{0});
    file.close();
    if (*name == 'a') std::this_thread::sleep_for(std::chrono::milliseconds(1100));  // stored times are in seconds
  }
  EXPECT_EQ(read_file(folder_ / "a.h5"), read_file(folder_ / "b.h5"));
}

TEST_F(Hdf5, ThreadsUseTheirOwnFilesAtOnce) {
  std::vector<std::thread> threads;
  std::vector<std::string> errors(4);
  for (std::size_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      try {
        for (int round = 0; round < 20; ++round) {
          const fs::path path = folder_ / (std::to_string(t) + ".h5");
          std::vector<double> x(100, static_cast<double>(t)), back(100);
          {
            File file = File::create(path, true);
            file.create_dataset("/x", DType::f64, {100}).write({x.data(), DType::f64, {100}});
            file.close();
          }
          File::open(path).dataset("/x").read({back.data(), DType::f64, {100}});
          if (back != x) errors[t] = "wrong content";
        }
      } catch (const std::exception& e) {
        errors[t] = e.what();
      }
    });
  }
  for (auto& thread : threads) thread.join();
  for (const auto& e : errors) EXPECT_EQ(e, "");
}

}  // namespace
}  // namespace deltapipe
