#include "kernels/activation.h"
#include "kernels/elementwise.h"
#include "kernels/reduce.h"
#include "tests/gpu/device.h"

#include <algorithm>
#include <cmath>
#include <functional>

namespace deltapipe {
namespace {

using testing::OnDevice;
using testing::Owned;
using testing::relative_rms;

// One pack, less, more, a whole block of threads and its neighbours.
const std::int64_t sizes[] = {1, 7, 8, 129, 4096, 8192, 8193, 40001};

class ElementwiseCuda : public testing::CudaTest {
 protected:
  /// call(inputs, outputs) on the device against the CPU in double, aligned and not, and with output i in the memory of
  /// input aliases[i] (-1: in its own).
  void expect_cpu(
      int inputs, int outputs, const std::vector<int>& aliases, double error,
      const std::function<void(const Stream&, const std::vector<Tensor>&, const std::vector<Tensor>&)>& call) {
    for (const std::int64_t n : sizes) {
      for (const std::int64_t shift : {0, 3}) {
        SCOPED_TRACE(std::to_string(n) + " elements, shift " + std::to_string(shift));
        std::vector<Owned<double>> in, expected;
        std::vector<OnDevice> device;
        std::vector<Tensor> cpu_in, cpu_out, gpu_in, gpu_out;
        for (int i = 0; i < inputs; ++i) in.push_back(normal({n}));
        for (int i = 0; i < outputs; ++i) expected.emplace_back(Shape{n});
        for (int i = 0; i < inputs; ++i) {
          device.push_back(upload(in[static_cast<std::size_t>(i)], shift));
          cpu_in.push_back(in[static_cast<std::size_t>(i)]);
        }
        for (int i = 0; i < outputs; ++i) {
          if (aliases[static_cast<std::size_t>(i)] < 0) device.push_back(poisoned({n}, shift));
          cpu_out.push_back(expected[static_cast<std::size_t>(i)]);
        }
        std::size_t own = static_cast<std::size_t>(inputs);
        for (int i = 0; i < inputs; ++i) gpu_in.push_back(device[static_cast<std::size_t>(i)]);
        for (const int alias : aliases) gpu_out.push_back(device[alias < 0 ? own++ : static_cast<std::size_t>(alias)]);
        call(Stream::cpu(), cpu_in, cpu_out);
        call(stream(), gpu_in, gpu_out);
        own = static_cast<std::size_t>(inputs);
        for (std::size_t i = 0; i < aliases.size(); ++i) {
          const std::size_t at = aliases[i] < 0 ? own++ : static_cast<std::size_t>(aliases[i]);
          // Of few elements all may be where a derivative crosses zero: errors are then held against the inputs' size.
          const double few = n < 100 ? std::sqrt(static_cast<double>(n)) : 0.0;
          const Owned<double> got = device[at].host();
          double size = 0;
          for (const double x : expected[i]) size += x * x;
          EXPECT_LT(relative_rms(got, expected[i]) * std::sqrt(size), error * std::max(std::sqrt(size), few));
        }
      }
    }
  }
};

TEST_P(ElementwiseCuda, Add) {
  const auto add = [](const Stream& s, const auto& in, const auto& out) { kernels::add(s, in[0], in[1], out[0]); };
  expect_cpu(2, 1, {-1}, tolerance(), add);
  expect_cpu(2, 1, {1}, tolerance(), add);
}

TEST_P(ElementwiseCuda, AddInPlaceAndScale) {
  for (const std::int64_t n : sizes) {
    const Owned<double> x = normal({n}), y = normal({n});
    const OnDevice dx = upload(x), dy = upload(y);
    Owned<double> sum = y, scaled = x;
    kernels::add_in_place(stream(), dx, dy);
    kernels::scale_in_place(stream(), -1.5, dx);
    kernels::add_in_place(Stream::cpu(), x, sum);
    kernels::scale_in_place(Stream::cpu(), -1.5, scaled);
    EXPECT_LT(relative_rms(dy.host(), sum), tolerance());
    EXPECT_LT(relative_rms(dx.host(), scaled), tolerance());
  }
}

TEST_P(ElementwiseCuda, SumsOfLossesAreAddedInDouble) {
  Owned<double> x({2}), y({2});
  x[0] = 1e-17, x[1] = 0.1, y[0] = 1.0, y[1] = 0.2;
  const OnDevice dx(DType::f64, x), dy(DType::f64, y, 1);
  kernels::add_in_place(stream(), dx, dy);
  EXPECT_EQ(dy.host()[0], 1.0);
  EXPECT_EQ(dy.host()[1], 0.1 + 0.2);
}

// The same bits as the CPU's: both round to nearest even, once.
TEST_P(ElementwiseCuda, CopyCast) {
  for (const DType from : {DType::bf16, DType::f32, DType::f64}) {
    for (const std::int64_t n : sizes) {
      for (const std::int64_t shift : {0, 1}) {
        const Owned<double> x = testing::round_to(from == DType::bf16 ? from : DType::f32, normal({n}));
        const OnDevice src(from, x, shift), dst = poisoned({n}, shift);
        kernels::copy_cast(stream(), src, dst);
        EXPECT_EQ(dst.bytes(), OnDevice(dtype(), x).bytes()) << name_of(from) << " " << n;
        const OnDevice wide(DType::f64, Shape{n}, shift);
        kernels::copy_cast(stream(), dst, wide);
        EXPECT_EQ(wide.bytes(), OnDevice(DType::f64, testing::round_to(dtype(), x)).bytes());
      }
    }
  }
}

TEST_P(ElementwiseCuda, FillZero) {
  const OnDevice x = poisoned({1237}, 1);
  kernels::fill_zero(stream(), x);
  for (const std::uint8_t b : x.bytes()) ASSERT_EQ(b, 0);
}

TEST_P(ElementwiseCuda, SquaredRelu) {
  const auto forward = [](const Stream& s, const auto& in, const auto& out) {
    kernels::squared_relu_forward(s, in[0], out[0]);
  };
  const auto backward = [](const Stream& s, const auto& in, const auto& out) {
    kernels::squared_relu_backward(s, in[0], in[1], out[0]);
  };
  expect_cpu(1, 1, {-1}, tolerance(), forward);
  expect_cpu(1, 1, {0}, tolerance(), forward);
  expect_cpu(2, 1, {-1}, tolerance(), backward);
  expect_cpu(2, 1, {0}, tolerance(), backward);
}

TEST_P(ElementwiseCuda, GatedSilu) {
  const auto forward = [](const Stream& s, const auto& in, const auto& out) {
    kernels::gated_silu_forward(s, in[0], in[1], out[0]);
  };
  const auto backward = [](const Stream& s, const auto& in, const auto& out) {
    kernels::gated_silu_backward(s, in[0], in[1], in[2], out[0], out[1]);
  };
  expect_cpu(2, 1, {-1}, tolerance(), forward);
  expect_cpu(2, 1, {0}, tolerance(), forward);
  expect_cpu(3, 2, {-1, -1}, tolerance(), backward);
  expect_cpu(3, 2, {1, 0}, tolerance(), backward);
}

TEST_P(ElementwiseCuda, NotANumberStays) {
  Owned<double> x({9});
  x.fill(-1);
  x[4] = std::numeric_limits<double>::quiet_NaN();
  const OnDevice dx = upload(x), y = poisoned({9});
  kernels::squared_relu_forward(stream(), dx, y);
  const Owned<double> out = y.host();
  for (int i = 0; i < 9; ++i) EXPECT_EQ(std::isnan(out[i]), i == 4);
}

TEST_P(ElementwiseCuda, SumOfSquares) {
  // One block and several, whole steps and not, as few tensors have one size.
  for (const std::int64_t n : {1, 9, 2048, 16384, 16385, 100000, 20000001}) {
    const Owned<double> few = normal({9973});
    Owned<double> x({n});
    for (std::int64_t i = 0; i < n; ++i) x[i] = few[i % 9973];
    const OnDevice aligned = upload(x), shifted = upload(x, 1);
    Owned<double> expected({1}), start({1});
    expected.fill(3);
    start.fill(3);
    const OnDevice a(DType::f64, start), b(DType::f64, start);
    kernels::sum_of_squares(Stream::cpu(), x, expected, testing::no_workspace());
    kernels::sum_of_squares(stream(), aligned, a, workspace());
    kernels::sum_of_squares(stream(), shifted, b, workspace());
    // Squares of floats are exact in double; their sum keeps 1e-16 times the root of their number.
    EXPECT_NEAR(a.host()[0], expected[0], 1e-12 * expected[0]) << n;
    expect_same_bits(a, b, "the sum does not depend on where x lies");
  }
}

INSTANTIATE_TEST_SUITE_P(DTypes, ElementwiseCuda, testing::model_dtypes(), testing::dtype_name);

}  // namespace
}  // namespace deltapipe
