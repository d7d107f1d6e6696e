#include "checkpoints/training_checkpoint.h"

#include "core/file.h"
#include "tests/checkpoints/samples.h"

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <hdf5.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <thread>

namespace deltapipe {
namespace {

namespace fs = std::filesystem;

class TrainingCheckpoint : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "deltapipe-checkpoint-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    dir_ = name;
  }
  void TearDown() override { fs::remove_all(dir_); }

  void write(std::int64_t step, int keep = 0) {
    const samples::Step content(step);
    CheckpointWriter writer(dir_, keep);
    writer.write(content.state, content.slices);
    writer.wait();
  }
  std::vector<std::string> entries() const {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(dir_)) names.push_back(entry.path().filename().string());
    std::sort(names.begin(), names.end());
    return names;
  }
  fs::path dir_;
};

using Names = std::vector<std::string>;

TEST_F(TrainingCheckpoint, GivesEveryBitBack) {
  write(123);
  EXPECT_EQ(entries(), Names{"step-00000123"});
  const fs::path folder = newest_checkpoint(dir_).value();
  EXPECT_EQ(folder, dir_ / "step-00000123");
  EXPECT_EQ(read_state(folder), samples::state_of(123));
  EXPECT_EQ(CheckpointReader(folder).tensors().size(), samples::tensors().size());
  samples::verify(folder);
}

TEST_F(TrainingCheckpoint, StateKeepsNumbersThatJsonHasNot) {
  TrainingState s = samples::state_of(1);
  s.values = {{"inf", std::numeric_limits<double>::infinity()},
              {"minus_inf", -std::numeric_limits<double>::infinity()},
              {"minus_zero", -0.0},
              {"third", 1.0 / 3.0},
              {"whole", 3.0}};
  s.config_toml = std::string(100000, 'x') + "\t\n\x01";
  s.model_config = "{\"model_type\": \"arcee_kda\"}";
  const manifest::Manifest back = manifest::parse(
      manifest::format({s, {{"rank-00000.h5", 1, 2}, {"checkpoint.h5", 3, 18446744073709551615u}}, {}}), "there");
  EXPECT_EQ(back.state, s);
  EXPECT_TRUE(std::signbit(back.state.values.at("minus_zero")));
  EXPECT_EQ(back.files[1].hash, 18446744073709551615u);
  s.values = {{"nan", std::numeric_limits<double>::quiet_NaN()}};
  const manifest::Manifest nan =
      manifest::parse(manifest::format({s, {{"rank-00000.h5", 1, 2}, {"checkpoint.h5", 3, 4}}, {}}), "there");
  EXPECT_TRUE(std::isnan(nan.state.values.at("nan")));
}

TEST_F(TrainingCheckpoint, AManifestOfAnotherVersionOrSenseIsRefused) {
  const std::vector<manifest::FileEntry> files = {{"rank-00000.h5", 1, 2}, {"checkpoint.h5", 3, 4}};
  const auto refused = [](const manifest::Manifest& m) {
    EXPECT_THROW(manifest::parse(manifest::format(m), "there"), FormatError);
  };
  refused({{}, {}, {}});
  refused({{}, {files[1], files[0]}, {}});
  refused({{}, {files[0], {"../checkpoint.h5", 3, 4}}, {}});
  const TensorInfo x{"master", "x", DType::f32, {4}};
  manifest::parse(manifest::format({{}, files, {{x, {{0, 0, 4}}}}}), "there");
  refused({{}, files, {{x, {{1, 0, 4}}}}});             // no such rank
  refused({{}, files, {{x, {{0, 0, 3}}}}});             // ends early
  refused({{}, files, {{x, {{0, 0, 5}}}}});             // ends late
  refused({{}, files, {{x, {{0, 0, 2}, {0, 3, 4}}}}});  // gap
  refused({{}, files, {{x, {{0, 0, 3}, {0, 2, 4}}}}});  // overlap
  refused({{}, files, {{x, {}}}});

  // A whole manifest of a later version, its hash right.
  const std::string text = manifest::format({{}, files, {}});
  std::string body = text.substr(text.find('\n') + 1);
  const std::string key = "\"version\": 1";
  body.replace(body.find(key), key.size(), "\"version\": 2");
  const std::string later =
      fmt::format("{{\"manifest_hash\": \"{}\",\n{}", hash_hex(std::as_bytes(std::span(body))), body);
  try {
    manifest::parse(later, "there");
    FAIL();
  } catch (const FormatError& e) {
    EXPECT_NE(std::string(e.what()).find("version is 2"), std::string::npos) << e.what();
    EXPECT_EQ(std::string(e.what()).find("there"), 0u) << e.what();
  }
}

TEST_F(TrainingCheckpoint, TheMemoryMayChangeAfterWrite) {
  samples::Step content(5);
  CheckpointWriter writer(dir_, 0);
  for (std::int64_t step : {5, 6, 7}) {
    content = samples::Step(step);
    writer.write(content.state, content.slices);
    for (auto& bytes : content.contents) std::fill(bytes.begin(), bytes.end(), std::byte{0xEE});
  }
  writer.wait();
  EXPECT_FALSE(writer.is_writing());
  for (const char* name : {"step-00000005", "step-00000006", "step-00000007"}) samples::verify(dir_ / name);
}

/// Every tensor cut at random into at most `ranks` slices, dealt to the ranks at random.
std::vector<std::vector<TensorSlice>> deal(samples::Step& content, int ranks, RandomStream& random) {
  std::vector<std::vector<TensorSlice>> by_rank(static_cast<std::size_t>(ranks));
  const auto infos = samples::tensors();
  for (std::size_t i = 0; i < infos.size(); ++i) {
    const std::int64_t n = infos[i].shape.numel();
    std::vector<std::int64_t> cuts = {0, n};
    for (int k = 1; k < ranks; ++k) {
      cuts.push_back(static_cast<std::int64_t>(random.next_below(static_cast<std::uint64_t>(n + 1))));
    }
    std::sort(cuts.begin(), cuts.end());
    std::vector<std::size_t> order(static_cast<std::size_t>(ranks));
    for (std::size_t r = 0; r < order.size(); ++r) order[r] = r;
    for (std::size_t r = order.size(); r > 1; --r) std::swap(order[r - 1], order[random.next_below(r)]);
    for (std::size_t k = 0; k + 1 < cuts.size(); ++k) {
      if (cuts[k] == cuts[k + 1]) continue;
      by_rank[order[k]].push_back(samples::slice_of(infos[i], content.contents[i], cuts[k], cuts[k + 1]));
    }
  }
  return by_rank;
}

fs::path write_by_ranks(const fs::path& dir, const TrainingState& state,
                        const std::vector<std::vector<TensorSlice>>& by_rank) {
  const fs::path partial = begin_checkpoint(dir, state.step);
  std::vector<FileRecord> records;
  for (const auto& slices : by_rank) {
    records.push_back(write_rank_file(partial, static_cast<int>(records.size()), slices));
  }
  return publish_checkpoint(dir, state, records);
}

/// The bits of a whole tensor as any HDF5 program sees them.
std::vector<std::byte> read_plainly(const fs::path& file, const TensorInfo& t) {
  const hid_t id = H5Fopen(file.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT);
  const hid_t dataset = H5Dopen2(id, ("/" + t.group + "/" + t.name).c_str(), H5P_DEFAULT);
  const hid_t type = H5Dget_type(dataset);
  const hid_t space = H5Dget_space(dataset);
  hsize_t dims[Shape::max_rank] = {};
  EXPECT_EQ(H5Sget_simple_extent_dims(space, dims, nullptr), t.shape.rank());
  for (int i = 0; i < t.shape.rank(); ++i) EXPECT_EQ(dims[i], static_cast<hsize_t>(t.shape[i]));
  EXPECT_EQ(H5Tget_size(type), size_of(t.dtype));
  std::vector<std::byte> bytes(static_cast<std::size_t>(t.shape.numel()) * size_of(t.dtype));
  EXPECT_GE(H5Dread(dataset, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, bytes.data()), 0);
  H5Sclose(space);
  H5Tclose(type);
  H5Dclose(dataset);
  H5Fclose(id);
  return bytes;
}

TEST_F(TrainingCheckpoint, AnyMeshReadsWhatAnyMeshWrote) {
  RandomStream random(99, "ranks");
  const auto infos = samples::tensors();
  for (int ranks = 1; ranks <= 5; ++ranks) {
    for (int round = 0; round < 3; ++round) {
      const std::int64_t step = ranks * 10 + round;
      samples::Step content(step);
      const fs::path written = write_by_ranks(dir_, content.state, deal(content, ranks, random));
      const fs::path moved = dir_ / fmt::format("moved to {}", step);
      fs::rename(written, moved);
      samples::verify(moved);
      CheckpointReader reader(moved, CheckpointReader::Verify::on_use);
      for (std::size_t i = 0; i < infos.size(); ++i) {
        const TensorInfo& t = infos[i];
        const std::size_t size = size_of(t.dtype);
        EXPECT_EQ(read_plainly(moved / "checkpoint.h5", t), content.contents[i]) << t.group << " " << t.name;
        const auto n = static_cast<std::uint64_t>(t.shape.numel());
        for (int part = 0; part < 8; ++part) {
          const std::uint64_t a = random.next_below(n + 1), b = random.next_below(n + 1);
          const std::uint64_t begin = std::min(a, b), end = std::max(a, b);
          std::vector<std::byte> back((end - begin) * size);
          reader.read(t.group, t.name, static_cast<std::int64_t>(begin), static_cast<std::int64_t>(end),
                      {back.data(), t.dtype, {static_cast<std::int64_t>(end - begin)}});
          EXPECT_TRUE(std::equal(back.begin(), back.end(),
                                 content.contents[i].begin() + static_cast<std::ptrdiff_t>(begin * size)))
              << t.group << " " << t.name << " [" << begin << ", " << end << ")";
        }
      }
    }
  }
}

TEST_F(TrainingCheckpoint, EqualContentsGiveEqualFiles) {
  write(1);
  fs::rename(dir_ / "step-00000001", dir_ / "first");
  write(1);
  for (const char* name : {"rank-00000.h5", "checkpoint.h5", "manifest.json"}) {
    EXPECT_EQ(read_file(dir_ / "first" / name), read_file(dir_ / "step-00000001" / name)) << name;
  }
}

TEST_F(TrainingCheckpoint, SlicesThatDoNotCoverATensorOnceAreRefused) {
  samples::Step content(1, {{"master", "x", DType::f32, {4, 5}}});
  const TensorInfo x{"master", "x", DType::f32, {4, 5}};
  const auto part = [&](std::int64_t begin, std::int64_t end) {
    return samples::slice_of(x, content.contents[0], begin, end);
  };
  const auto refused = [&](const std::vector<std::vector<TensorSlice>>& by_rank) {
    EXPECT_THROW(write_by_ranks(dir_, content.state, by_rank), InternalError);
    abandon_checkpoint(dir_, content.state.step);
    EXPECT_EQ(entries(), Names{});
  };
  refused({{part(0, 19)}});
  refused({{part(0, 10)}, {part(11, 20)}});
  refused({{part(0, 10)}, {part(9, 20)}});
  refused({{part(0, 20)}, {part(0, 20)}});
  refused({{part(0, 20), part(0, 20)}});  // twice on one rank
  TensorSlice other = part(10, 20);
  other.shape = {5, 4};
  refused({{part(0, 10)}, {other}});
  other = part(0, 20);
  other.name = "a/b";
  refused({{other}});
  other = part(0, 20);
  other.end = 21;
  refused({{other}});
  write_by_ranks(dir_, content.state, {{part(10, 20)}, {part(0, 10)}});
  samples::verify(dir_ / "step-00000001");
}

TEST_F(TrainingCheckpoint, KeepsTheNewestAndTheJustWritten) {
  for (std::int64_t step : {10, 20, 30, 40}) write(step);
  EXPECT_EQ(entries().size(), 4u);
  write(50, 3);
  EXPECT_EQ(entries(), (Names{"step-00000030", "step-00000040", "step-00000050"}));
  write(5, 2);  // a run that went back
  EXPECT_EQ(entries(), (Names{"step-00000005", "step-00000050"}));
  write(60, 1);
  EXPECT_EQ(entries(), Names{"step-00000060"});
}

TEST_F(TrainingCheckpoint, ADamagedOneDoesNotCountAsKept) {
  for (std::int64_t step : {1, 2, 3}) write(step);
  fs::remove(dir_ / "step-00000003" / "rank-00000.h5");
  EXPECT_EQ(newest_checkpoint(dir_), dir_ / "step-00000002");
  write(4, 2);
  EXPECT_EQ(entries(), (Names{"step-00000002", "step-00000003", "step-00000004"}));
  write(3, 2);  // takes the damaged one's place
  samples::verify(dir_ / "step-00000003");
  EXPECT_EQ(entries(), (Names{"step-00000003", "step-00000004"}));
}

TEST_F(TrainingCheckpoint, LeftoversAreNeverTakenAndCleanedUp) {
  write(1);
  for (const char* name : {".step-00000009.partial", ".step-00000008.deleting"}) {
    fs::copy(dir_ / "step-00000001", dir_ / name, fs::copy_options::recursive);
  }
  fs::create_directory(dir_ / "step-abc");
  fs::create_directory(dir_ / ".hidden");
  EXPECT_EQ(newest_checkpoint(dir_), dir_ / "step-00000001");
  write(2);
  EXPECT_EQ(entries(), (Names{".hidden", "step-00000001", "step-00000002", "step-abc"}));
}

TEST_F(TrainingCheckpoint, FindsWhatAUserMeans) {
  EXPECT_EQ(newest_checkpoint(dir_), std::nullopt);
  EXPECT_EQ(newest_checkpoint(dir_ / "none"), std::nullopt);
  EXPECT_THROW(find_checkpoint(dir_), IoError);
  EXPECT_THROW(find_checkpoint(dir_ / "none"), IoError);
  write(1);
  write(2);
  EXPECT_EQ(find_checkpoint(dir_), dir_ / "step-00000002");
  EXPECT_EQ(find_checkpoint(dir_ / "latest"), dir_ / "step-00000002");
  EXPECT_EQ(find_checkpoint(dir_ / "latest" / ""), dir_ / "step-00000002");
  EXPECT_EQ(find_checkpoint(dir_ / "step-00000001" / ""), dir_ / "step-00000001");
  EXPECT_THROW(find_checkpoint(dir_ / "step-00000007"), IoError);
}

TEST_F(TrainingCheckpoint, WrongRequestsAreNamed) {
  write(1);
  CheckpointReader reader(dir_ / "step-00000001");
  EXPECT_TRUE(reader.contains("master", "model.norm.weight"));
  EXPECT_FALSE(reader.contains("master", "model.norm"));
  EXPECT_FALSE(reader.contains("momentum", "model.norm.weight"));
  std::vector<float> x(1000);
  const Tensor out(x.data(), DType::f32, {481});
  reader.read("master", "lm_head.weight", 0, 481, out);
  EXPECT_THROW(reader.read("master", "lm_head.bias", 0, 481, out), FormatError);
  EXPECT_THROW(reader.read("master", "model.norm.weight", 0, 19, {x.data(), DType::f32, {19}}), FormatError);
  EXPECT_THROW(reader.read("master", "lm_head.weight", 1, 482, out), InternalError);
  EXPECT_THROW(reader.read("master", "lm_head.weight", 0, 480, out), InternalError);
}

TEST_F(TrainingCheckpoint, DescribesItself) {
  write(123);
  const std::string text = describe_checkpoint(dir_ / "step-00000123");
  for (const char* part : {"step-00000123", "stage 1", "tokens seen", "4030464", "data 2, pipeline 3, sequence 4",
                           "rank-00000.h5", "exp_avg_sq: 4 tensors", "model.layers.0.mlp.up_proj.weight", "[37, 13]",
                           "bfloat16", "loss_average      0.1"}) {
    EXPECT_NE(text.find(part), std::string::npos) << part << "\n" << text;
  }
}

}  // namespace
}  // namespace deltapipe
