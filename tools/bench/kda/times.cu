// Times of the CUDA kernels of KDA alone: medians of CUDA events over calls that rotate among three sets of inputs, as
// in run.py, without Python or a peer.
//
//   build/cuda/tools/bench/kda/kda_times [repeats]
#include "kernels/cuda/kda_kernels.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

namespace {

using namespace deltapipe::kernels::cuda::kda;

void check(cudaError_t e) {
  if (e == cudaSuccess) return;
  std::printf("CUDA error: %s\n", cudaGetErrorString(e));
  std::exit(1);
}

template <class T>
struct Memory {
  T* p = nullptr;
  explicit Memory(std::size_t n) { check(cudaMalloc(&p, std::max<std::size_t>(n, 1) * sizeof(T))); }
  explicit Memory(const std::vector<T>& v) : Memory(v.size()) {
    check(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~Memory() { cudaFree(p); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
};

/// n normal numbers as bf16: a block of them, again and again.
std::vector<std::uint16_t> normals(std::size_t n) {
  static const std::vector<std::uint16_t> block = [] {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<std::uint16_t> x((1 << 20) + 7);
    for (auto& e : x) {
      const float value = normal(random);
      std::uint32_t bits;
      std::memcpy(&bits, &value, 4);
      e = static_cast<std::uint16_t>(bits >> 16);
    }
    return x;
  }();
  std::vector<std::uint16_t> x(n);
  for (std::size_t i = 0; i < n; ++i) x[i] = block[i % block.size()];
  return x;
}

struct Shape {
  int segments, length, heads;
  float bound;
  bool documents;  // of 100 to 3,000 tokens
};

struct Set {
  Memory<std::uint16_t> q, k, v, f, b, d_o;
  Memory<float> a_log, dt_bias;
  Memory<std::int32_t> start;
  Problem p;

  Set(const Shape& s, const std::vector<std::uint16_t>& x, const std::vector<float>& rate,
      const std::vector<float>& bias, const std::vector<std::int32_t>& first)
      : q(x),
        k(x),
        v(x),
        f(x),
        b(std::vector<std::uint16_t>(x.begin(), x.begin() + static_cast<std::ptrdiff_t>(x.size() / 128))),
        d_o(x),
        a_log(rate),
        dt_bias(bias),
        start(first),
        p{q.p,     k.p,        v.p,      f.p,     b.p, a_log.p, dt_bias.p, start.p, 1.0f / std::sqrt(128.0f),
          s.bound, s.segments, s.length, s.heads, 128} {}
};

template <class F>
float median_ms(int repeats, const F& call) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  std::vector<float> ms;
  for (int i = 0; i < repeats + 3; ++i) {
    check(cudaEventRecord(begin));
    check(call(i % 3));
    check(cudaEventRecord(end));
    check(cudaEventSynchronize(end));
    float t;
    check(cudaEventElapsedTime(&t, begin, end));
    if (i >= 3) ms.push_back(t);
  }
  std::nth_element(ms.begin(), ms.begin() + static_cast<std::ptrdiff_t>(ms.size() / 2), ms.end());
  check(cudaEventDestroy(begin));
  check(cudaEventDestroy(end));
  return ms[ms.size() / 2];
}

void measure(const Shape& s, int repeats) {
  const std::size_t tokens = static_cast<std::size_t>(s.segments) * s.length, wide = tokens * s.heads * 128;
  std::mt19937 random(2);
  std::vector<float> rate(static_cast<std::size_t>(s.heads)), bias(static_cast<std::size_t>(s.heads) * 128);
  for (auto& e : rate) e = s.bound < 0 ? 0.0f : std::log(std::uniform_real_distribution<float>(1, 16)(random));
  for (auto& e : bias) e = std::normal_distribution<float>(s.bound < 0 ? 0.0f : -4.0f, 0.5f)(random);
  std::vector<std::int32_t> start(tokens, s.documents ? 0 : -1);
  int documents = 0;
  for (int t = 0; s.documents && t < s.length; ++documents) {
    const int end = std::min(s.length, t + std::uniform_int_distribution<int>(100, 3000)(random));
    std::fill(start.begin() + t, start.begin() + end, t);
    t = end;
  }
  const auto x = normals(wide);
  const Set sets[3] = {{s, x, rate, bias, start}, {s, x, rate, bias, start}, {s, x, rate, bias, start}};
  const Memory<std::uint16_t> o(wide), dq(wide), dk(wide), dv(wide), df(wide), db(wide / 128);
  const Memory<float> da_log(rate), ddt_bias(bias);
  const std::size_t states = static_cast<std::size_t>(s.segments) * s.heads * 128 * 128;
  const Memory<float> m(states), e(states);
  const Problem& any = sets[0].p;
  const Memory<std::uint8_t> records(records_bytes(any)), memory(backward_workspace(any));
  const Gradients gradients{dq.p, dk.p, dv.p, df.p, db.p, da_log.p, ddt_bias.p};
  const auto forward_of = [&](int i, bool prepared) {
    return forward(sets[i].p, records.p, prepared, nullptr, o.p, nullptr, nullptr);
  };
  const auto backward_of = [&](int i, bool prepared) {
    return backward(sets[i].p, records.p, prepared, nullptr, sets[i].d_o.p, nullptr, gradients, nullptr, memory.p,
                    nullptr);
  };
  const float fwd = median_ms(repeats, [&](int i) { return forward_of(i, false); });
  const float scan = median_ms(repeats, [&](int i) { return forward_of(i, true); });
  const float bwd = median_ms(repeats, [&](int i) { return backward_of(i, false); });
  const float mapped = median_ms(repeats, [&](int i) {
    const cudaError_t status = segment_map(sets[i].p, records.p, m.p, e.p, nullptr);
    return status != cudaSuccess ? status : forward_of(i, true);
  });
  const float mapped_back = median_ms(repeats, [&](int i) {
    const cudaError_t status = backward_map(sets[i].p, records.p, sets[i].d_o.p, e.p, nullptr);
    return status != cudaSuccess ? status : backward_of(i, true);
  });
  std::printf(
      "%2d x %5d x %2d heads%s%4d documents: forward %.3f (scan %.3f) backward %.3f both %.3f ms; "
      "map + %.3f = %.0f %%, backward's + %.3f = %.0f %%\n",
      s.segments, s.length, s.heads, s.bound < 0 ? " bounded" : " ", documents, fwd, scan, bwd, fwd + bwd, mapped - fwd,
      100 * (mapped / fwd - 1), mapped_back - bwd, 100 * (mapped_back / bwd - 1));
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  const int repeats = argc > 1 ? std::atoi(argv[1]) : 15;
  for (const Shape& s : {Shape{1, 32768, 20, 0, false},
                         {1, 8192, 20, 0, false},
                         {1, 4096, 20, 0, false},
                         {1, 32768, 5, 0, false},
                         {1, 32768, 10, 0, false},
                         {16, 2048, 20, 0, false},
                         {1, 32768, 20, 0, true},
                         {1, 32768, 20, -5, false}}) {
    measure(s, repeats);
  }
}
