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

}  // namespace deltapipe::kernels::cuda
