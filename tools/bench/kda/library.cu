// kernels/cuda/kda*.cu behind a plain C interface, for programs that own device memory themselves (run.py).
#include "kernels/cuda/kda_kernels.h"

namespace kda = deltapipe::kernels::cuda::kda;

extern "C" {

std::size_t kda_records_bytes(const kda::Problem* p) { return kda::records_bytes(*p); }
std::size_t kda_backward_workspace(const kda::Problem* p) { return kda::backward_workspace(*p); }

int kda_forward(const kda::Problem* p, void* records, int prepared, const float* state_in, std::uint16_t* o,
                float* state_out, void* stream) {
  return kda::forward(*p, records, prepared != 0, state_in, o, state_out, static_cast<cudaStream_t>(stream));
}
int kda_backward(const kda::Problem* p, void* records, int prepared, const float* state_in, const std::uint16_t* d_o,
                 const float* dstate_out, const kda::Gradients* gradients, float* dstate_in, void* workspace,
                 void* stream) {
  return kda::backward(*p, records, prepared != 0, state_in, d_o, dstate_out, *gradients, dstate_in, workspace,
                       static_cast<cudaStream_t>(stream));
}
int kda_segment_map(const kda::Problem* p, void* records, float* m, float* e, void* stream) {
  return kda::segment_map(*p, records, m, e, static_cast<cudaStream_t>(stream));
}
int kda_backward_map(const kda::Problem* p, void* records, const std::uint16_t* d_o, float* e, void* stream) {
  return kda::backward_map(*p, records, d_o, e, static_cast<cudaStream_t>(stream));
}
int kda_multiply_add(int n, int rows, int columns, const float* a, int transpose, const float* b, const float* c,
                     float* out, void* stream) {
  return kda::multiply_add(n, rows, columns, a, transpose != 0, b, c, out, static_cast<cudaStream_t>(stream));
}

}  // extern "C"
