// Shared by the KDA tests: random cases, the recurrence in double as the truth, and calls with an exact workspace.
#pragma once

#include "kernels/kda.h"
#include "tests/kernels/testing.h"

#include <cstring>
#include <functional>
#include <vector>

namespace deltapipe::testing {

struct KdaShape {
  std::int64_t segments, length, heads, k, v;
};

/// Distribution of the inputs that decide decay and write strength.
struct KdaRegime {
  float bound = 0.0f;  // gate_lower_bound
  double f_mean = 0.0, f_scale = 1.0;
  double b_mean = 0.0, b_scale = 1.5;
};

template <class T>
struct KdaCase {
  KdaShape n;
  float bound = 0.0f;
  float scale = 0.0f;
  Owned<T> q, k, v, f, b, a_log, dt_bias, state_in, d_o, dstate_out;
  Owned<std::int32_t> start;

  explicit KdaCase(KdaShape shape)
      : n(shape),
        q({n.segments, n.length, n.heads, n.k}),
        k(q.shape()),
        v({n.segments, n.length, n.heads, n.v}),
        f(q.shape()),
        b({n.segments, n.length, n.heads}),
        a_log({n.heads}),
        dt_bias({n.heads, n.k}),
        state_in({n.segments, n.heads, n.k, n.v}),
        d_o(v.shape()),
        dstate_out(state_in.shape()),
        start({n.segments, n.length}) {}

  kernels::KdaInputs inputs() const {
    kernels::KdaInputs in;
    in.q = q;
    in.k = k;
    in.v = v;
    in.f = f;
    in.b = b;
    in.a_log = a_log;
    in.dt_bias = dt_bias;
    in.start = start;
    in.scale = scale;
    in.gate_lower_bound = bound;
    return in;
  }
  template <class U>
  KdaCase<U> cast() const {
    KdaCase<U> out(n);
    out.bound = bound;
    out.scale = scale;
    out.q = q.template cast<U>();
    out.k = k.template cast<U>();
    out.v = v.template cast<U>();
    out.f = f.template cast<U>();
    out.b = b.template cast<U>();
    out.a_log = a_log.template cast<U>();
    out.dt_bias = dt_bias.template cast<U>();
    out.state_in = state_in.template cast<U>();
    out.d_o = d_o.template cast<U>();
    out.dstate_out = dstate_out.template cast<U>();
    out.start = start;
    return out;
  }
  /// Documents of one segment start at these tokens; the first may be negative.
  void pack(std::int64_t segment, const std::vector<std::int32_t>& starts) {
    for (std::int64_t t = 0; t < n.length; ++t) {
      for (std::int32_t s : starts) {
        if (s <= t) start[segment * n.length + t] = s;
      }
    }
  }
};

/// Fresh random inputs, a different a_log a head, documents that began before each segment. Every value is one of
/// float, so that casts between float and double change nothing.
KdaCase<double> random_case(RandomStream& r, KdaShape shape, const KdaRegime& regime = {});

template <class T>
struct KdaOutputs {
  Owned<T> o, state_out;
};
template <class T>
struct KdaResults {
  Owned<T> dq, dk, dv, df, db, da_log, ddt_bias, dstate_in;
};

/// The definition, token by token: L2 norm, gate, beta, S <- diag(exp g) S, delta rule, output.
KdaOutputs<double> recurrence(const KdaCase<double>& c);

/// Runs `f` dry to learn its workspace, then for real in an arena of exactly that size filled with NaN; expects the
/// same peak.
void with_workspace(const std::function<void(const Stream&, Arena&)>& f);

template <class T>
KdaOutputs<T> run_forward(const KdaCase<T>& c) {
  KdaOutputs<T> out{Owned<T>(c.v.shape()), Owned<T>(c.state_in.shape())};
  with_workspace([&](const Stream& stream, Arena& workspace) {
    kernels::kda_forward(stream, c.inputs(), Tensor(), c.state_in, out.o, out.state_out, workspace);
  });
  return out;
}

template <class T>
KdaResults<T> run_backward(const KdaCase<T>& c) {
  KdaResults<T> g{Owned<T>(c.q.shape()),       Owned<T>(c.k.shape()),       Owned<T>(c.v.shape()),
                  Owned<T>(c.f.shape()),       Owned<T>(c.b.shape()),       Owned<T>(c.a_log.shape()),
                  Owned<T>(c.dt_bias.shape()), Owned<T>(c.state_in.shape())};
  g.da_log.fill(0);
  g.ddt_bias.fill(0);
  with_workspace([&](const Stream& stream, Arena& workspace) {
    kernels::kda_backward(stream, c.inputs(), Tensor(), c.state_in, c.d_o, c.dstate_out,
                          {g.dq, g.dk, g.dv, g.df, g.db, g.da_log, g.ddt_bias}, g.dstate_in, workspace);
  });
  return g;
}

/// Each member of `a` within `tolerance` (relative RMS) of `b`'s.
template <class T>
void expect_close(const KdaResults<T>& a, const KdaResults<double>& b, double tolerance) {
  EXPECT_LT(relative_rms(a.dq, b.dq), tolerance) << "dq";
  EXPECT_LT(relative_rms(a.dk, b.dk), tolerance) << "dk";
  EXPECT_LT(relative_rms(a.dv, b.dv), tolerance) << "dv";
  EXPECT_LT(relative_rms(a.df, b.df), tolerance) << "df";
  EXPECT_LT(relative_rms(a.db, b.db), tolerance) << "db";
  EXPECT_LT(relative_rms(a.da_log, b.da_log), tolerance) << "da_log";
  EXPECT_LT(relative_rms(a.ddt_bias, b.ddt_bias), tolerance) << "ddt_bias";
  EXPECT_LT(relative_rms(a.dstate_in, b.dstate_in), tolerance) << "dstate_in";
}

template <class T>
bool all_finite(const Owned<T>& x) {
  for (T value : x) {
    if (!std::isfinite(value)) return false;
  }
  return true;
}

template <class T>
bool same_bits(const Owned<T>& a, const Owned<T>& b) {
  return a.size() == b.size() && std::memcmp(a.begin(), b.begin(), static_cast<std::size_t>(a.size()) * sizeof(T)) == 0;
}

}  // namespace deltapipe::testing
