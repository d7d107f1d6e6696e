#include "tests/kernels/kda_testing.h"

#include <algorithm>

namespace deltapipe::testing {

KdaCase<double> random_case(RandomStream& r, KdaShape shape, const KdaRegime& regime) {
  KdaCase<double> c(shape);
  c.bound = regime.bound;
  c.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(shape.k)));
  c.q.normal(r);
  c.k.normal(r);
  c.v.normal(r);
  c.f.normal(r, regime.f_scale, regime.f_mean);
  c.b.normal(r, regime.b_scale, regime.b_mean);
  c.a_log.uniform(r, -2.0, 1.0);
  c.dt_bias.normal(r, 0.5, -1.0);
  c.state_in.normal(r);
  c.d_o.normal(r);
  c.dstate_out.normal(r);
  c.start.fill(-1);
  return c.cast<float>().cast<double>();
}

KdaOutputs<double> recurrence(const KdaCase<double>& c) {
  const auto [segments, length, heads, K, V] = c.n;
  KdaOutputs<double> out{Owned<double>(c.v.shape()), c.state_in};
  const auto softplus = [](double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); };
  const auto sigmoid = [](double x) { return 1.0 / (1.0 + std::exp(-x)); };
  for (std::int64_t s = 0; s < segments; ++s) {
    for (std::int64_t h = 0; h < heads; ++h) {
      double* state = out.state_out.begin() + (s * heads + h) * K * V;
      const double rate = std::exp(c.a_log[h]);
      for (std::int64_t t = 0; t < length; ++t) {
        const std::int64_t row = (s * length + t) * heads + h;
        if (c.start[s * length + t] == t) std::fill(state, state + K * V, 0.0);
        const double *q = c.q.begin() + row * K, *k = c.k.begin() + row * K, *v = c.v.begin() + row * V;
        double norm_q = 1e-6, norm_k = 1e-6;
        for (std::int64_t x = 0; x < K; ++x) {
          norm_q += q[x] * q[x];
          norm_k += k[x] * k[x];
        }
        std::vector<double> seen(static_cast<std::size_t>(V), 0.0);  // k^T S after the decay
        for (std::int64_t x = 0; x < K; ++x) {
          const double z = c.f[row * K + x] + c.dt_bias[h * K + x];
          const double bound = static_cast<double>(c.bound);
          const double g = bound == 0 ? -rate * softplus(z) : bound * sigmoid(rate * z);
          for (std::int64_t y = 0; y < V; ++y) {
            state[x * V + y] *= std::exp(g);
            seen[static_cast<std::size_t>(y)] += k[x] / std::sqrt(norm_k) * state[x * V + y];
          }
        }
        const double beta = sigmoid(c.b[row]);
        for (std::int64_t y = 0; y < V; ++y) {
          double o = 0;
          for (std::int64_t x = 0; x < K; ++x) {
            double& entry = state[x * V + y];
            entry += beta * k[x] / std::sqrt(norm_k) * (v[y] - seen[static_cast<std::size_t>(y)]);
            o += q[x] / std::sqrt(norm_q) * entry;
          }
          out.o[row * V + y] = static_cast<double>(c.scale) * o;
        }
      }
    }
  }
  return out;
}

void with_workspace(const std::function<void(const Stream&, Arena&)>& f) {
  Arena measured = Arena::measuring("workspace");
  f(Stream::dry({}), measured);
  EXPECT_EQ(measured.used(), 0u);
  Arena real("workspace", measured.peak());
  const auto bytes = static_cast<std::int64_t>(real.capacity());
  std::memset(real.allocate(DType::u8, {bytes}, "all").data, 0xff, real.capacity());  // 0xffff...: NaN
  real.reset();
  f(Stream::cpu(), real);
  EXPECT_EQ(real.used(), 0u);
  EXPECT_EQ(real.peak(), measured.peak());
}

}  // namespace deltapipe::testing
