#include "kernels/adamw.h"
#include "tests/gpu/device.h"

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

namespace deltapipe {
namespace {

using testing::OnDevice;
using testing::Owned;

/// Parameter: the dtype of param; the state is float32.
using AdamWCuda = testing::CudaTest;

TEST_P(AdamWCuda, FollowsTheCpu) {
  for (const std::int64_t n : {1, 7, 2048, 2049, 40001}) {
    for (const std::int64_t shift : {0, 1}) {
      const auto floats = [&](double scale) {
        return testing::round_to(DType::f32, Owned<double>({n}).normal(random_, scale));
      };
      Owned<double> w = floats(1), m = floats(0.01), v = floats(0.1), g = floats(1), out({n});
      for (double& x : v) x = x * x;
      v = testing::round_to(DType::f32, v);
      const OnDevice dw(DType::f32, w, shift), dm(DType::f32, m, shift), dv(DType::f32, v, shift),
          dg(DType::f32, g, shift), param = poisoned({n}, shift);
      for (int step = 3; step < 6; ++step) {
        const kernels::AdamWStep s{.learning_rate = 0.01, .weight_decay = 0.1, .step = step, .gradient_scale = 0.3};
        kernels::adamw(Stream::cpu(), s, w, g, m, v, out);
        kernels::adamw(stream(), s, dw, dg, dm, dv, param);
      }
      // Three float updates: a few roundings of 2^-24, the largest relative to a gradient of order 1.
      EXPECT_LT(testing::relative_rms(dw.host(), w), 5e-7);
      EXPECT_LT(testing::relative_rms(dm.host(), m), 5e-7);
      EXPECT_LT(testing::relative_rms(dv.host(), v), 5e-7);
      // param is master, rounded: the same bits.
      EXPECT_EQ(param.bytes(), OnDevice(dtype(), dw.host()).bytes());
    }
  }
}

TEST_P(AdamWCuda, ParamMayBeMaster) {
  if (dtype() != DType::f32) GTEST_SKIP() << "master is float32";
  const std::int64_t n = 1001;
  const Owned<double> w = normal({n}), g = normal({n});
  const OnDevice alone = upload(w), with_param = upload(w), dg = upload(g), param = poisoned({n});
  const kernels::AdamWStep s{.learning_rate = 0.01};
  for (const OnDevice* master : {&alone, &with_param}) {
    Owned<double> zeros({n});
    zeros.fill(0);
    const OnDevice m = upload(zeros), v = upload(zeros);
    kernels::adamw(stream(), s, *master, dg, m, v, master == &alone ? *master : param);
    testing::check_cuda(cudaDeviceSynchronize());
  }
  expect_same_bits(alone, with_param, "master");
}

/// Weights and moments bfloat16, gradient float32.
using AdamWBFloat16Cuda = testing::CudaTest;

TEST_P(AdamWBFloat16Cuda, SameBitsAsTheCpu) {
  const auto kept = [&](Owned<BFloat16>& to, const Owned<double>& from) {
    for (std::int64_t i = 0; i < from.size(); ++i) to[i] = to_bfloat16(static_cast<float>(from[i]));
  };
  for (const std::int64_t n : {1, 7, 2048, 2049, 40001}) {
    for (const std::int64_t shift : {0, 1}) {
      for (const std::int64_t offset : {std::int64_t{0}, std::int64_t{12'345'678'901}}) {
        SCOPED_TRACE(std::to_string(n) + " elements from " + std::to_string(offset) + ", shift " +
                     std::to_string(shift));
        const Owned<double> w = normal({n}), m = normal({n}, 0.01);
        Owned<double> v = normal({n}, 0.1);
        for (double& x : v) x = std::abs(x);
        Owned<BFloat16> cpu_w({n}), cpu_m({n}), cpu_v({n});
        kept(cpu_w, w);
        kept(cpu_m, m);
        kept(cpu_v, v);
        const OnDevice dw = upload(w, shift), dm = upload(m, shift), dv = upload(v, shift);
        for (int step = 3; step < 6; ++step) {
          Owned<float> g = Owned<double>({n}).normal(random_).cast<float>();
          const OnDevice dg(DType::f32, g.cast<double>(), shift);
          const kernels::AdamWStep s{.learning_rate = 0.01, .weight_decay = 0.1, .step = step, .gradient_scale = 0.3};
          const kernels::StochasticRounding rounding{.seed = 0x123456789abcdef, .stream = 77, .offset = offset};
          kernels::adamw_bfloat16(Stream::cpu(), s, rounding, cpu_w, g, cpu_m, cpu_v);
          kernels::adamw_bfloat16(stream(), s, rounding, dw, dg, dm, dv);
          const auto expect_bits = [&](const OnDevice& device, const Owned<BFloat16>& cpu, const char* what) {
            const std::vector<std::uint8_t> bytes = device.bytes();
            ASSERT_EQ(std::memcmp(bytes.data(), cpu.begin(), bytes.size()), 0) << what << ", step " << step;
          };
          expect_bits(dw, cpu_w, "weights");
          expect_bits(dm, cpu_m, "exp_avg");
          expect_bits(dv, cpu_v, "exp_avg_sq");
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(DTypes, AdamWBFloat16Cuda, ::testing::Values(DType::bf16), testing::dtype_name);
INSTANTIATE_TEST_SUITE_P(DTypes, AdamWCuda, testing::model_dtypes(), testing::dtype_name);

}  // namespace
}  // namespace deltapipe
