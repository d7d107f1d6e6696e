#include "kernels/cuda/elementwise.cuh"
#include "kernels/cuda/launches.h"

namespace deltapipe::kernels::cuda {
namespace {

template <class P>
struct AdamW {
  static constexpr int width = pack_width<float>, packs = 2;
  AdamWConstants c;
  float* master;
  const float* gradient;
  float *exp_avg, *exp_avg_sq;
  P* param;  // null: param is master
  struct Inputs {
    Pack<float, width> w, g, m, v;
  };
  template <bool aligned>
  __device__ void load(std::int64_t i, int count, Inputs& in) const {
    in.w.template load<aligned>(master + i, count);
    in.g.template load<aligned>(gradient + i, count);
    in.m.template load<aligned>(exp_avg + i, count);
    in.v.template load<aligned>(exp_avg_sq + i, count);
  }
  template <bool aligned>
  __device__ void store(std::int64_t i, int count, const Inputs& in) const {
    float w[width], g[width], m[width], v[width];
    in.w.get(w);
    in.g.get(g);
    in.m.get(m);
    in.v.get(v);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const float x = c.gradient_scale * g[j];
      m[j] = c.beta1 * m[j] + c.rest1 * x;
      v[j] = c.beta2 * v[j] + c.rest2 * x * x;
      w[j] = c.keep * w[j] - c.rate * m[j] / (sqrtf(v[j]) * c.correction + c.epsilon);
    }
    Pack<float, width> out;
    out.set(m);
    out.template store<aligned>(exp_avg + i, count);
    out.set(v);
    out.template store<aligned>(exp_avg_sq + i, count);
    out.set(w);
    out.template store<aligned>(master + i, count);
    if (param == nullptr) return;
    Pack<P, width> rounded_weights;
    rounded_weights.set(w);
    rounded_weights.template store<aligned>(param + i, count);
  }
};

/// The values of core/random.h's philox.
__device__ __forceinline__ uint4 philox(std::uint64_t key, std::uint64_t stream, std::uint64_t counter) {
  uint4 c = make_uint4(static_cast<std::uint32_t>(counter), static_cast<std::uint32_t>(counter >> 32),
                       static_cast<std::uint32_t>(stream), static_cast<std::uint32_t>(stream >> 32));
  auto k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c.x, p1 = std::uint64_t{0xCD9E8D57u} * c.z;
    c = make_uint4(static_cast<std::uint32_t>(p1 >> 32) ^ c.y ^ k0, static_cast<std::uint32_t>(p1),
                   static_cast<std::uint32_t>(p0 >> 32) ^ c.w ^ k1, static_cast<std::uint32_t>(p0));
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

/// A float's bits after `random` in [0, 2^16) was added below those that a bfloat16 keeps, the upper half.
__device__ __forceinline__ std::uint32_t add_below(float x, std::uint32_t random) {
  const std::uint32_t b = __float_as_uint(x);
  return (b & 0x7fffffffu) > 0x7f800000u ? b | 0x400000u : b + random;  // NaN stays NaN
}

struct AdamWBits {
  static constexpr int width = pack_width<Bits>, packs = 1;
  AdamWConstants c;
  RoundingBits random;
  Bits* weights;
  const float* gradient;
  Bits *exp_avg, *exp_avg_sq;
  struct Inputs {
    Pack<Bits, width> w, m, v;
    Pack<float, width> g;
  };
  template <bool aligned>
  __device__ void load(std::int64_t i, int count, Inputs& in) const {
    in.w.template load<aligned>(weights + i, count);
    in.m.template load<aligned>(exp_avg + i, count);
    in.v.template load<aligned>(exp_avg_sq + i, count);
    in.g.template load<aligned>(gradient + i, count);
  }
  template <bool aligned>
  __device__ void store(std::int64_t i, int count, const Inputs& in) const {
    float w[width], g[width], m[width], v[width];
    in.w.get(w);
    in.g.get(g);
    in.m.get(m);
    in.v.get(v);
    const std::uint64_t first = random.offset + static_cast<std::uint64_t>(i);
    const bool odd = first % 2 != 0;  // the same for all threads: packs are of even width
    uint4 next = philox(random.seed, random.stream, first / 2);
    Pack<Bits, width> out_w, out_m, out_v;
#pragma unroll
    for (int pair = 0; pair < width / 2; ++pair) {
      uint4 r = next;  // low half: words of this pair's first element, high half: of its second
      if (odd || pair + 1 < width / 2) {
        next = philox(random.seed, random.stream, first / 2 + static_cast<std::uint64_t>(pair) + 1);
      }
      if (odd) r = make_uint4(r.z, r.w, next.x, next.y);
      std::uint32_t bits_w[2], bits_m[2], bits_v[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int j = 2 * pair + k;
        const std::uint32_t a = k == 0 ? r.x : r.z, b = k == 0 ? r.y : r.w;
        const float x = c.gradient_scale * g[j];
        const float mean = fmaf(c.beta1, m[j], c.rest1 * x);
        const float square = fmaf(c.beta2, v[j], c.rest2 * x * x);
        const float step_size = c.rate * mean / fmaf(sqrtf(square), c.correction, c.epsilon);
        bits_w[k] = add_below(fmaf(c.keep, w[j], -step_size), a & 0xffffu);
        bits_m[k] = add_below(mean, a >> 16);
        bits_v[k] = add_below(square, b & 0xffffu);
      }
      out_w.words[pair] = __byte_perm(bits_w[0], bits_w[1], 0x7632);
      out_m.words[pair] = __byte_perm(bits_m[0], bits_m[1], 0x7632);
      out_v.words[pair] = __byte_perm(bits_v[0], bits_v[1], 0x7632);
    }
    out_w.template store<aligned>(weights + i, count);
    out_m.template store<aligned>(exp_avg + i, count);
    out_v.template store<aligned>(exp_avg_sq + i, count);
  }
};

}  // namespace

template <class P>
cudaError_t adamw(const AdamWConstants& c, float* master, const float* gradient, float* exp_avg, float* exp_avg_sq,
                  P* param, std::int64_t n, cudaStream_t stream) {
  if (static_cast<void*>(param) == master) param = nullptr;
  const bool aligned = all_aligned(master, gradient, exp_avg, exp_avg_sq, param);
  return apply_to(AdamW<P>{c, master, gradient, exp_avg, exp_avg_sq, param}, n, aligned, stream);
}
template cudaError_t adamw(const AdamWConstants&, float*, const float*, float*, float*, Bits*, std::int64_t,
                           cudaStream_t);
template cudaError_t adamw(const AdamWConstants&, float*, const float*, float*, float*, float*, std::int64_t,
                           cudaStream_t);

cudaError_t adamw_bfloat16(const AdamWConstants& c, const RoundingBits& random, Bits* weights, const float* gradient,
                           Bits* exp_avg, Bits* exp_avg_sq, std::int64_t n, cudaStream_t stream) {
  const bool aligned = all_aligned(weights, gradient, exp_avg, exp_avg_sq);
  return apply_to(AdamWBits{c, random, weights, gradient, exp_avg, exp_avg_sq}, n, aligned, stream);
}

}  // namespace deltapipe::kernels::cuda
