#include "kernels/cuda/matmul.h"

#include "kernels/cuda/common.h"
#include "kernels/settings.h"

#include <cublasLt.h>

#include <array>
#include <bit>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

// cuBLASLt's matrices are column-major, so a row-major C = op(A) op(B) is asked for as C^T = op(B)^T op(A)^T: operands
// change places, and a row-major matrix with n columns is a column-major one with leading dimension n.
namespace deltapipe::kernels::cuda {
namespace {

void check(cublasStatus_t status, const char* call, const char* step) {
  if (status != CUBLAS_STATUS_SUCCESS) {
    fail<InternalError>("{}: {}: {}", call, step, cublasLtGetStatusString(status));
  }
}

template <class T, cublasStatus_t (*destroy)(T)>
struct Destroy {
  using pointer = T;
  void operator()(T t) const { destroy(t); }
};
using Layout = std::unique_ptr<cublasLtMatrixLayout_t, Destroy<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>>;
using Description = std::unique_ptr<cublasLtMatmulDesc_t, Destroy<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>>;
using Preference =
    std::unique_ptr<cublasLtMatmulPreference_t, Destroy<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy>>;

cudaDataType_t type_of(const Tensor& t, const char* call) {
  if (t.dtype == DType::bf16) return CUDA_R_16BF;
  if (t.dtype == DType::f32) return CUDA_R_32F;
  fail<InternalError>("{}: {} matrices, on CUDA they must be bfloat16 or float32", call, name_of(t.dtype));
}

/// The largest power of two up to 256 that divides the address: what heuristics may count on.
std::uint32_t alignment_of(const Tensor& t) {
  const auto address = reinterpret_cast<std::uintptr_t>(t.data) | 256u;
  return std::uint32_t{1} << std::countr_zero(address);
}

/// All that an algorithm depends on.
struct Kind {
  std::int64_t rows, columns, inner;
  DType operands, result;
  bool transpose_a, transpose_b, bias, accumulate;
  std::array<std::uint32_t, 3> alignments;
  auto operator<=>(const Kind&) const = default;
};

/// A product in cuBLASLt's terms, and its algorithm.
struct Plan {
  Description description;
  Layout a, b, c;  // of the row-major product; a is cuBLASLt's second operand
  cublasLtMatmulAlgo_t algorithm{};
};

Layout make_layout(const Tensor& t, const char* call) {
  cublasLtMatrixLayout_t layout = nullptr;
  check(cublasLtMatrixLayoutCreate(&layout, type_of(t, call), static_cast<std::uint64_t>(t.dim(1)),
                                   static_cast<std::uint64_t>(t.dim(0)), t.dim(1)),
        call, "cublasLtMatrixLayoutCreate");
  return Layout(layout);
}

class DeviceProducts {
 public:
  DeviceProducts() { cuda::check(cudaGetDevice(&device_), "cudaGetDevice"); }

  void run(const Stream& stream, const Matmul& m, const Kind& kind) {
    if (handle_ == nullptr) check(cublasLtCreate(&handle_), m.call, "cublasLtCreate");
    void* workspace = workspace_of(stream, m.call);
    const auto found = plans_.find(kind);
    Plan& plan =
        found != plans_.end() ? found->second : plans_.emplace(kind, make_plan(m, stream, workspace)).first->second;
    set_bias(plan, m);
    execute(plan, plan.algorithm, m, m.c.data, workspace, native(stream));
  }

 private:
  void* workspace_of(const Stream& stream, const char* call) {
    void*& workspace = workspaces_[stream.native()];
    if (workspace == nullptr) cuda::check(cudaMalloc(&workspace, matmul_workspace_bytes), call);
    return workspace;
  }

  static void set_bias(const Plan& plan, const Matmul& m) {
    if (!m.bias) return;
    const void* p = m.bias.data;
    check(cublasLtMatmulDescSetAttribute(plan.description.get(), CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p, sizeof p),
          m.call, "bias");
  }

  void execute(const Plan& plan, const cublasLtMatmulAlgo_t& algorithm, const Matmul& m, void* c, void* workspace,
               cudaStream_t stream) const {
    const float alpha = 1, beta = m.accumulate ? 1 : 0;
    check(cublasLtMatmul(handle_, plan.description.get(), &alpha, m.b.data, plan.b.get(), m.a.data, plan.a.get(), &beta,
                         c, plan.c.get(), c, plan.c.get(), &algorithm, workspace, matmul_workspace_bytes, stream),
          m.call, "cublasLtMatmul");
  }

  Plan make_plan(const Matmul& m, const Stream& stream, void* workspace) const {
    Plan plan;
    cublasLtMatmulDesc_t description = nullptr;
    check(cublasLtMatmulDescCreate(&description, CUBLAS_COMPUTE_32F, CUDA_R_32F), m.call, "cublasLtMatmulDescCreate");
    plan.description.reset(description);
    const auto set = [&](cublasLtMatmulDescAttributes_t attribute, const auto& value) {
      check(cublasLtMatmulDescSetAttribute(description, attribute, &value, sizeof value), m.call,
            "cublasLtMatmulDescSetAttribute");
    };
    set(CUBLASLT_MATMUL_DESC_TRANSA, m.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_TRANSB, m.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N);
    if (m.bias) {
      set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
      set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, type_of(m.bias, m.call));
      set_bias(plan, m);
    }
    plan.a = make_layout(m.a, m.call);
    plan.b = make_layout(m.b, m.call);
    plan.c = make_layout(m.c, m.call);
    const std::vector<cublasLtMatmulHeuristicResult_t> candidates = find_candidates(plan, m);
    plan.algorithm = settings().deterministic || candidates.size() == 1
                         ? candidates.front().algo
                         : fastest(plan, m, candidates, workspace, native(stream));
    return plan;
  }

  std::vector<cublasLtMatmulHeuristicResult_t> find_candidates(const Plan& plan, const Matmul& m) const {
    cublasLtMatmulPreference_t preference = nullptr;
    check(cublasLtMatmulPreferenceCreate(&preference), m.call, "cublasLtMatmulPreferenceCreate");
    const Preference owner(preference);
    const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
      check(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value), m.call,
            "cublasLtMatmulPreferenceSetAttribute");
    };
    set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, matmul_workspace_bytes);
    // A bfloat16 result is rounded once. Where cuBLASLt splits a sum, it rounds the joined parts before it adds a bias
    // or what is accumulated to, so such products are not split; without those, parts join in fp32.
    const bool added_to = m.c.dtype != DType::f32 && (m.bias || m.accumulate);
    set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
        static_cast<std::uint32_t>(added_to ? CUBLASLT_REDUCTION_SCHEME_NONE : CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment_of(m.b));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment_of(m.a));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment_of(m.c));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment_of(m.c));
    constexpr int wanted = 6;  // beyond the first few, heuristics' guesses are rarely near the best
    std::vector<cublasLtMatmulHeuristicResult_t> results(wanted);
    int found = 0;
    check(cublasLtMatmulAlgoGetHeuristic(handle_, plan.description.get(), plan.b.get(), plan.a.get(), plan.c.get(),
                                         plan.c.get(), preference, wanted, results.data(), &found),
          m.call, "cublasLtMatmulAlgoGetHeuristic");
    results.resize(static_cast<std::size_t>(found));
    if (results.empty()) {
      fail<InternalError>("{}: cuBLASLt has no algorithm for {} times {}", m.call, m.a.shape.str(), m.b.shape.str());
    }
    return results;
  }

  /// Times the candidates on the call's operands, with a scratch result. The first where there is no memory for one.
  cublasLtMatmulAlgo_t fastest(const Plan& plan, const Matmul& m,
                               const std::vector<cublasLtMatmulHeuristicResult_t>& candidates, void* workspace,
                               cudaStream_t stream) const {
    void* scratch = nullptr;
    if (cudaMalloc(&scratch, m.c.bytes()) != cudaSuccess) {
      cudaGetLastError();
      return candidates.front().algo;
    }
    cuda::check(cudaMemsetAsync(scratch, 0, m.c.bytes(), stream), m.call);
    cudaEvent_t begin = nullptr, end = nullptr;
    cuda::check(cudaEventCreate(&begin), m.call);
    cuda::check(cudaEventCreate(&end), m.call);
    constexpr int runs = 3;
    std::size_t best = 0;
    float best_ms = std::numeric_limits<float>::infinity();
    for (std::size_t i = 0; i < candidates.size(); ++i) {
      for (int run = 0; run <= runs; ++run) {  // the first warms up
        if (run == 1) cuda::check(cudaEventRecord(begin, stream), m.call);
        execute(plan, candidates[i].algo, m, scratch, workspace, stream);
      }
      cuda::check(cudaEventRecord(end, stream), m.call);
      cuda::check(cudaEventSynchronize(end), m.call);
      float ms = 0;
      cuda::check(cudaEventElapsedTime(&ms, begin, end), m.call);
      if (ms < best_ms) {
        best_ms = ms;
        best = i;
      }
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    cudaFree(scratch);
    return candidates[best].algo;
  }

  int device_ = 0;
  cublasLtHandle_t handle_ = nullptr;
  std::map<void*, void*> workspaces_;  // by stream; live as long as the process, as the streams that compute do
  std::map<Kind, Plan> plans_;
};

}  // namespace

void matmul(const Stream& stream, const Matmul& m) {
  const std::int64_t rows = m.c.dim(0), columns = m.c.dim(1), inner = m.a.dim(m.transpose_a ? 0 : 1);
  if (m.a.dtype != m.b.dtype || (m.c.dtype != m.a.dtype && m.c.dtype != DType::f32)) {
    fail<InternalError>("{}: {} times {} gives no {} on CUDA", m.call, name_of(m.a.dtype), name_of(m.b.dtype),
                        name_of(m.c.dtype));
  }
  type_of(m.a, m.call);
  if (rows == 0 || columns == 0) return;
  require(inner > 0, "matmul: nothing to sum over");
  // A product may run on any thread; each device has its own handle, plans and workspaces.
  static std::mutex mutex;
  static auto& devices = *new std::map<int, DeviceProducts>();  // outlives all users: the driver goes first at exit
  const std::lock_guard lock(mutex);
  devices[stream.device().index].run(stream, m,
                                     {rows,
                                      columns,
                                      inner,
                                      m.a.dtype,
                                      m.c.dtype,
                                      m.transpose_a,
                                      m.transpose_b,
                                      static_cast<bool>(m.bias),
                                      m.accumulate,
                                      {alignment_of(m.a), alignment_of(m.b), alignment_of(m.c)}});
}

}  // namespace deltapipe::kernels::cuda
