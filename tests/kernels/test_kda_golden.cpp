// kda_forward against flash-linear-attention's plain recurrence, through tests/golden/kda.safetensors.
#include "tests/kernels/kda_testing.h"

#include <nlohmann/json.hpp>

#include <bit>
#include <fstream>

namespace deltapipe {
namespace {

using testing::KdaCase;
using testing::KdaShape;
using testing::Owned;

/// A safetensors file of float32 tensors: u64 header length, JSON header, data.
class Golden {
 public:
  explicit Golden(const std::string& path) {
    static_assert(std::endian::native == std::endian::little);
    std::ifstream in(path, std::ios::binary);
    if (!in) fail<IoError>("cannot open {}", path);
    std::uint64_t length = 0;
    in.read(reinterpret_cast<char*>(&length), sizeof length);
    std::string header(length, '\0');
    in.read(header.data(), static_cast<std::streamsize>(length));
    header_ = nlohmann::json::parse(header);
    data_.assign(std::istreambuf_iterator<char>(in), {});
  }
  std::string metadata(const std::string& key) const { return header_.at("__metadata__").at(key).get<std::string>(); }
  Shape shape(const std::string& name) const {
    Shape s;
    for (std::int64_t d : header_.at(name).at("shape")) s.append(d);
    return s;
  }
  /// The values of `name` into `out`, which fixes their number but not their shape.
  void read(const std::string& name, Owned<float>& out) const {
    const auto& entry = header_.at(name);
    const std::size_t begin = entry.at("data_offsets").at(0), end = entry.at("data_offsets").at(1);
    ASSERT_EQ(entry.at("dtype"), "F32") << name;
    ASSERT_EQ(end - begin, static_cast<std::size_t>(out.size()) * sizeof(float)) << name;
    ASSERT_LE(end, data_.size()) << name;
    std::memcpy(out.begin(), data_.data() + begin, end - begin);
  }

 private:
  nlohmann::json header_;
  std::vector<char> data_;
};

TEST(KdaGolden, MatchesFlashLinearAttention) {
  const Golden golden(DELTAPIPE_GOLDEN_DIR "/kda.safetensors");
  const int cases = std::stoi(golden.metadata("cases"));
  ASSERT_GT(cases, 0);
  for (int i = 0; i < cases; ++i) {
    const std::string prefix = "case" + std::to_string(i) + ".";
    SCOPED_TRACE(prefix);
    const Shape q = golden.shape(prefix + "q"), v = golden.shape(prefix + "v");
    KdaCase<float> c(KdaShape{1, q[0], q[1], q[2], v[2]});
    const std::string bound = golden.metadata(prefix + "lower_bound");
    c.bound = bound == "none" ? 0.0f : std::stof(bound);
    c.scale = std::stof(golden.metadata(prefix + "scale"));
    c.start.fill(-1);
    Owned<float> o(c.v.shape()), state_out(c.state_in.shape());
    for (const auto& [name, tensor] : {std::pair{"q", &c.q},
                                       {"k", &c.k},
                                       {"v", &c.v},
                                       {"f", &c.f},
                                       {"b", &c.b},
                                       {"a_log", &c.a_log},
                                       {"dt_bias", &c.dt_bias},
                                       {"state_in", &c.state_in},
                                       {"o", &o},
                                       {"state_out", &state_out}}) {
      golden.read(prefix + name, *tensor);
    }
    // The file holds a float64 recurrence rounded to float32; float then keeps 1e-7 a step over about a hundred.
    const auto got = testing::run_forward(c);
    EXPECT_LT(testing::relative_rms(got.o, o), 1e-5);
    EXPECT_LT(testing::relative_rms(got.state_out, state_out), 1e-5);
    const auto exact = testing::run_forward(c.cast<double>());
    EXPECT_LT(testing::relative_rms(exact.o, o), 2e-7);  // the file's own rounding, and that of scale
    EXPECT_LT(testing::relative_rms(exact.state_out, state_out), 2e-7);
  }
}

}  // namespace
}  // namespace deltapipe
