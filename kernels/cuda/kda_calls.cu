// The phases of each call, in order, and their workspace.
#include "kernels/cuda/kda_common.cuh"

#include <algorithm>
#include <cmath>

namespace deltapipe::kernels::cuda::kda {
namespace {

/// Hands out parts of a workspace, 256-byte aligned; with a null base it only counts.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<std::uint8_t*>(base)) {}
  template <class T>
  T* take(std::size_t n) {
    T* p = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (n * sizeof(T) + 255) / 256 * 256;
    return p;
  }
  std::size_t used() const { return used_; }

 private:
  std::uint8_t* base_;
  std::size_t used_ = 0;
};

struct BackwardWorkspace {
  std::uint16_t *states, *dstates, *v_new, *minus_y;
  float* sums;

  BackwardWorkspace(Carver& carver, const Problem& p) {
    const std::size_t n = p.head_chunks(), k = static_cast<std::size_t>(p.head_dim);
    states = carver.take<std::uint16_t>(n * k * k);
    dstates = carver.take<std::uint16_t>(n * k * k);
    v_new = carver.take<std::uint16_t>(n * k * chunk_tokens);
    minus_y = carver.take<std::uint16_t>(n * k * chunk_tokens);
    sums = carver.take<float>(n * (k + 1));
  }
};

std::size_t records_alone(const Problem& p) {
  return p.head_chunks() * (p.head_dim == 128 ? Record<128>::bytes : Record<64>::bytes);
}

/// What a call's records are made of.
struct Records {
  std::uint8_t* all;
  int* ready;      // a flag each
  PieceMaps maps;  // segment_map's, of pieces, where those are more than one
  float* states;   // and what comes into each
  std::size_t bytes;

  Records(void* base, const Problem& p) {
    Carver carver(base);
    const std::size_t k = static_cast<std::size_t>(p.head_dim);
    all = carver.take<std::uint8_t>(records_alone(p));
    ready = carver.take<int>(p.head_chunks());
    maps = map_pieces(p);
    const std::size_t n = maps.pieces == 1 ? 0 : static_cast<std::size_t>(maps.pieces) * p.segments * p.heads * k * k;
    maps.m = carver.take<float>(n);
    maps.e = carver.take<float>(n);
    states = carver.take<float>(n);
    bytes = carver.used();
  }
};

/// Records are prepared while the scan, which takes some of the multiprocessors, reads them. Its blocks start when all
/// blocks of the preparation run or have ended, and those wait for nothing: whatever else takes multiprocessors, the
/// records that a scan waits for come.
///
/// What the spare multiprocessors prepare while a chunk of all heads is scanned is 0.13 chunks of one head each (H100,
/// K = 128: 0.93 us beside 7.2); leaving them half as much again has measured best. All multiprocessors together take
/// whole rounds of records, or some would wait for the others; before the maps of whole segments, whose chunks take
/// longer, more of them (4 us of 8,192 tokens).
Pace pace_of(const Problem& p, const Records& records, bool backwards, bool maps = false) {
  const int spare = spare_processors(p, maps), heads = p.segments * p.heads;
  if (spare < 16) return {};
  const double late = std::min(0.2 * spare / heads, maps ? 0.8 : 0.9), all = static_cast<double>(p.head_chunks());
  const int round = prepared_at_once(p.head_dim);
  const double early = std::max(1.0, std::round((1 - late) * all / round)) * round;
  return {.ready = records.ready,
          .late = static_cast<int>(std::max(all - early, 0.0)),
          .late_blocks = spare,
          .backwards = backwards};
}

/// The first error of a sequence of calls; later ones are skipped.
class Status {
 public:
  template <class F>
  Status& then(const F& f) {
    if (error_ == cudaSuccess) error_ = f();
    return *this;
  }
  cudaError_t error() const { return error_; }

 private:
  cudaError_t error_ = cudaSuccess;
};

}  // namespace

cudaError_t box_map(CUtensorMap* map, const Problem& p, const std::uint16_t* tensor) {
  static const auto encode = [] {  // the driver's, so that programs need not be linked with it
    void* f = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess
               ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(f)
               : nullptr;
  }();
  if (encode == nullptr) return cudaErrorSymbolNotFound;
  const auto k = static_cast<cuuint64_t>(p.head_dim), heads = static_cast<cuuint64_t>(p.heads),
             length = static_cast<cuuint64_t>(p.length);
  const cuuint64_t sizes[4] = {k, length, heads, static_cast<cuuint64_t>(p.segments)};
  const cuuint64_t strides[3] = {2 * k * heads, 2 * k, 2 * k * heads * length};  // of all sizes but the first; bytes
  const cuuint32_t box[4] = {64, chunk_tokens, 1, 1}, steps[4] = {1, 1, 1, 1};
  const CUresult result = encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<std::uint16_t*>(tensor), sizes,
                                 strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

bool supports(int head_dim) { return head_dim == 64 || head_dim == 128; }

std::size_t records_bytes(const Problem& p) { return Records(nullptr, p).bytes; }

cudaError_t forward(const Problem& p, void* records, bool prepared, const float* state_in, std::uint16_t* o,
                    float* state_out, cudaStream_t stream) {
  const Records r(records, p);
  const Pace pace = prepared ? Pace{} : pace_of(p, r, false);
  ForwardScan scan{.records = r.all, .state_in = state_in, .state_out = state_out, .o = o, .ready = pace.ready};
  Status status;
  if (!prepared) {
    status.then([&] { return prepare(p, r.all, pace, stream); });
  } else if (r.maps.pieces > 1) {
    status.then([&] { return piece_states(p, r.maps, state_in, r.states, stream); });
    scan.state_in = r.states;
    scan.pieces = r.maps.pieces;
  }
  return status.then([&] { return scan_forward(p, scan, stream); }).error();
}

std::size_t backward_workspace(const Problem& p) {
  Carver count(nullptr);
  const BackwardWorkspace all(count, p);
  return count.used();
}

cudaError_t backward(const Problem& p, void* records, bool prepared, const float* state_in, const std::uint16_t* d_o,
                     const float* dstate_out, const Gradients& gradients, float* dstate_in, void* workspace,
                     cudaStream_t stream) {
  Carver carver(workspace);
  const BackwardWorkspace w(carver, p);
  const Records r(records, p);
  const Pace pace = prepared ? Pace{} : pace_of(p, r, true);
  const ForwardScan states{.records = r.all, .state_in = state_in, .states = w.states, .v_new = w.v_new};
  const ReverseScan dstates{.records = r.all,
                            .d_o = d_o,
                            .dstate_out = dstate_out,
                            .dstate_in = dstate_in,
                            .dstates = w.dstates,
                            .minus_y = w.minus_y,
                            .ready = pace.ready};
  const ChunkGradients chunks{d_o, w.states, w.dstates, w.v_new, w.minus_y, gradients, w.sums};
  return Status()
      .then([&] { return prepared ? cudaSuccess : prepare(p, r.all, pace, stream); })
      .then([&] { return scan_reverse(p, dstates, stream); })
      .then([&] { return scan_forward(p, states, stream); })
      .then([&] { return chunk_gradients(p, chunks, stream); })
      .then([&] {
        if (gradients.da_log == nullptr && gradients.ddt_bias == nullptr) return cudaSuccess;
        return reduce_sums(p, w.sums, gradients.da_log, gradients.ddt_bias, stream);
      })
      .error();
}

cudaError_t segment_map(const Problem& p, void* records, float* m, float* e, cudaStream_t stream) {
  const Records r(records, p);
  const Pace pace = r.maps.whole() ? pace_of(p, r, false, true) : Pace{};
  return Status()
      .then([&] { return prepare(p, r.all, pace, stream); })
      .then([&] { return scan_maps(p, r.all, pace.ready, r.maps, m, e, stream); })
      .then([&] { return r.maps.whole() ? cudaSuccess : join_maps(p, r.maps, m, e, stream); })
      .error();
}

cudaError_t backward_map(const Problem& p, void* records, const std::uint16_t* d_o, float* e, cudaStream_t stream) {
  const Records r(records, p);
  const Pace pace = pace_of(p, r, true);
  const ReverseScan scan{.records = r.all, .d_o = d_o, .dstate_in = e, .ready = pace.ready};
  return Status()
      .then([&] { return prepare(p, r.all, pace, stream); })
      .then([&] { return scan_reverse(p, scan, stream); })
      .error();
}

}  // namespace deltapipe::kernels::cuda::kda
