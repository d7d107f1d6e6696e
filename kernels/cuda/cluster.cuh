// How the blocks of a cluster send each other small values: stores that a barrier in the receiver's shared memory
// counts, so that only who needs them waits, and nothing else of anyone's memory traffic is waited for.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace deltapipe::kernels::cuda {

// Barriers in shared memory. A phase ends with the block's own arrivals and, where one of them is `expect`, as many
// bytes sent by others.
__device__ __forceinline__ std::uint32_t address_of(const void* shared) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
}
__device__ __forceinline__ void expect(std::uint64_t& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(&barrier)), "r"(bytes)
               : "memory");
}
/// For the block's `arrivals` a phase.
__device__ __forceinline__ void start_barrier(std::uint64_t& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_of(&barrier)), "r"(arrivals) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void arrive(std::uint64_t& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address_of(&barrier)) : "memory");
}
/// Waits for a barrier's phase, counted from 0.
__device__ __forceinline__ void await(std::uint64_t& barrier, unsigned phase) {
  std::uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(address_of(&barrier)), "r"(phase % 2)
        : "memory");
  }
}
/// Copies `from` to where `to` and its barrier are in block `rank`.
template <class V>
__device__ __forceinline__ void send(const V& from, V& to, std::uint64_t& barrier, int rank) {
  static_assert(sizeof(V) % 8 == 0);
  const auto in_rank = [rank](std::uint32_t address) {
    std::uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
  };
  const std::uint32_t at = in_rank(address_of(&to)), end = in_rank(address_of(&barrier));
  std::uint64_t words[sizeof(V) / 8];
  memcpy(words, &from, sizeof(V));
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(V) / 8); ++i) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(at + 8 * i),
                 "l"(words[i]), "r"(end)
                 : "memory");
  }
}

}  // namespace deltapipe::kernels::cuda
