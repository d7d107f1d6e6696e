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

cudaDataType_t type_of(DType dtype, const char* call) {
  if (dtype == DType::bf16) return CUDA_R_16BF;
  if (dtype == DType::f32) return CUDA_R_32F;
  fail<InternalError>("{}: {} matrices, on CUDA they must be bfloat16 or float32", call, name_of(dtype));
}

/// The first elements of a row-major matrix's rows, which begin every `pitch` elements.
struct Matrix {
  void* data;
  DType dtype;
  std::int64_t rows, columns, pitch;

  Matrix part(std::int64_t row, std::int64_t n_rows, std::int64_t column, std::int64_t n_columns) const {
    const auto offset = static_cast<std::size_t>(row * pitch + column) * size_of(dtype);
    return {static_cast<std::byte*>(data) + offset, dtype, n_rows, n_columns, pitch};
  }
  std::size_t bytes() const { return static_cast<std::size_t>(rows * pitch) * size_of(dtype); }
  std::string str() const { return Shape{rows, columns}.str(); }
};

/// The largest power of two up to 256 that divides the address: what heuristics may count on.
std::uint32_t alignment_of(const Matrix& m) {
  const auto address = reinterpret_cast<std::uintptr_t>(m.data) | 256u;
  return std::uint32_t{1} << std::countr_zero(address);
}

bool has_aligned_rows(const Matrix& m) {
  return alignment_of(m) >= 16 && static_cast<std::size_t>(m.pitch) * size_of(m.dtype) % 16 == 0;
}

/// A Matmul whose sizes are in its matrices.
struct Product {
  const char* call;
  Matrix a, b, c;
  bool transpose_a, transpose_b;
  const void* bias;  // of b's dtype; may be null
  bool accumulate;

  std::int64_t inner() const { return transpose_b ? b.columns : b.rows; }
};

/// All that an algorithm depends on.
struct Kind {
  std::int64_t rows, columns, inner;
  std::array<std::int64_t, 3> pitches;
  DType operands, result;
  bool transpose_a, transpose_b, bias, accumulate;
  std::array<std::uint32_t, 3> alignments;
  auto operator<=>(const Kind&) const = default;
};

Kind kind_of(const Product& p) {
  return {p.c.rows,
          p.c.columns,
          p.inner(),
          {p.a.pitch, p.b.pitch, p.c.pitch},
          p.a.dtype,
          p.c.dtype,
          p.transpose_a,
          p.transpose_b,
          p.bias != nullptr,
          p.accumulate,
          {alignment_of(p.a), alignment_of(p.b), alignment_of(p.c)}};
}

/// A product in cuBLASLt's terms, and its algorithm.
struct Plan {
  Description description;
  Layout a, b, c;  // of the row-major product; a is cuBLASLt's second operand
  cublasLtMatmulAlgo_t algorithm{};
};

Layout make_layout(const Matrix& m, const char* call) {
  cublasLtMatrixLayout_t layout = nullptr;
  check(cublasLtMatrixLayoutCreate(&layout, type_of(m.dtype, call), static_cast<std::uint64_t>(m.columns),
                                   static_cast<std::uint64_t>(m.rows), m.pitch),
        call, "cublasLtMatrixLayoutCreate");
  return Layout(layout);
}

class DeviceProducts {
 public:
  DeviceProducts() { cuda::check(cudaGetDevice(&device_), "cudaGetDevice"); }

  void run(const Stream& stream, const Product& p) {
    if (handle_ == nullptr) check(cublasLtCreate(&handle_), p.call, "cublasLtCreate");
    void* workspace = workspace_of(stream, p.call);
    const Kind kind = kind_of(p);
    const auto found = plans_.find(kind);
    Plan& plan =
        found != plans_.end() ? found->second : plans_.emplace(kind, make_plan(p, stream, workspace)).first->second;
    set_bias(plan, p);
    execute(plan, plan.algorithm, p, p.c.data, workspace, native(stream));
  }

 private:
  void* workspace_of(const Stream& stream, const char* call) {
    void*& workspace = workspaces_[stream.native()];
    if (workspace == nullptr) cuda::check(cudaMalloc(&workspace, matmul_workspace_bytes), call);
    return workspace;
  }

  static void set_bias(const Plan& plan, const Product& p) {
    if (p.bias == nullptr) return;
    check(cublasLtMatmulDescSetAttribute(plan.description.get(), CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p.bias,
                                         sizeof p.bias),
          p.call, "bias");
  }

  void execute(const Plan& plan, const cublasLtMatmulAlgo_t& algorithm, const Product& p, void* c, void* workspace,
               cudaStream_t stream) const {
    const float alpha = 1, beta = p.accumulate ? 1 : 0;
    check(cublasLtMatmul(handle_, plan.description.get(), &alpha, p.b.data, plan.b.get(), p.a.data, plan.a.get(), &beta,
                         c, plan.c.get(), c, plan.c.get(), &algorithm, workspace, matmul_workspace_bytes, stream),
          p.call, "cublasLtMatmul");
  }

  Plan make_plan(const Product& p, const Stream& stream, void* workspace) const {
    Plan plan;
    cublasLtMatmulDesc_t description = nullptr;
    check(cublasLtMatmulDescCreate(&description, CUBLAS_COMPUTE_32F, CUDA_R_32F), p.call, "cublasLtMatmulDescCreate");
    plan.description.reset(description);
    const auto set = [&](cublasLtMatmulDescAttributes_t attribute, const auto& value) {
      check(cublasLtMatmulDescSetAttribute(description, attribute, &value, sizeof value), p.call,
            "cublasLtMatmulDescSetAttribute");
    };
    set(CUBLASLT_MATMUL_DESC_TRANSA, p.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_TRANSB, p.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N);
    if (p.bias != nullptr) {
      set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
      set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, type_of(p.b.dtype, p.call));
      set_bias(plan, p);
    }
    plan.a = make_layout(p.a, p.call);
    plan.b = make_layout(p.b, p.call);
    plan.c = make_layout(p.c, p.call);
    const std::vector<cublasLtMatmulHeuristicResult_t> candidates = find_candidates(plan, p);
    plan.algorithm = settings().deterministic || candidates.size() == 1
                         ? candidates.front().algo
                         : fastest(plan, p, candidates, workspace, native(stream));
    return plan;
  }

  std::vector<cublasLtMatmulHeuristicResult_t> find_candidates(const Plan& plan, const Product& p) const {
    cublasLtMatmulPreference_t preference = nullptr;
    check(cublasLtMatmulPreferenceCreate(&preference), p.call, "cublasLtMatmulPreferenceCreate");
    const Preference owner(preference);
    const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
      check(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value), p.call,
            "cublasLtMatmulPreferenceSetAttribute");
    };
    set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, matmul_workspace_bytes);
    // A bfloat16 result is rounded once. Where cuBLASLt splits a sum, it rounds the joined parts before it adds a bias
    // or what is accumulated to, so such products are not split; without those, parts join in fp32.
    const bool added_to = p.c.dtype != DType::f32 && (p.bias != nullptr || p.accumulate);
    set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
        static_cast<std::uint32_t>(added_to ? CUBLASLT_REDUCTION_SCHEME_NONE : CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment_of(p.b));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment_of(p.a));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment_of(p.c));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment_of(p.c));
    constexpr int wanted = 6;  // beyond the first few, heuristics' guesses are rarely near the best
    std::vector<cublasLtMatmulHeuristicResult_t> results(wanted);
    int found = 0;
    check(cublasLtMatmulAlgoGetHeuristic(handle_, plan.description.get(), plan.b.get(), plan.a.get(), plan.c.get(),
                                         plan.c.get(), preference, wanted, results.data(), &found),
          p.call, "cublasLtMatmulAlgoGetHeuristic");
    results.resize(static_cast<std::size_t>(found));
    if (results.empty()) {
      fail<InternalError>("{}: cuBLASLt has no algorithm for {} times {}", p.call, p.a.str(), p.b.str());
    }
    return results;
  }

  /// Times the candidates on the call's operands, with a scratch result. The first where there is no memory for one.
  cublasLtMatmulAlgo_t fastest(const Plan& plan, const Product& p,
                               const std::vector<cublasLtMatmulHeuristicResult_t>& candidates, void* workspace,
                               cudaStream_t stream) const {
    void* scratch = nullptr;
    if (cudaMalloc(&scratch, p.c.bytes()) != cudaSuccess) {
      cudaGetLastError();
      return candidates.front().algo;
    }
    cuda::check(cudaMemsetAsync(scratch, 0, p.c.bytes(), stream), p.call);
    cudaEvent_t begin = nullptr, end = nullptr;
    cuda::check(cudaEventCreate(&begin), p.call);
    cuda::check(cudaEventCreate(&end), p.call);
    constexpr int runs = 3;
    std::size_t best = 0;
    float best_ms = std::numeric_limits<float>::infinity();
    for (std::size_t i = 0; i < candidates.size(); ++i) {
      for (int run = 0; run <= runs; ++run) {  // the first warms up
        if (run == 1) cuda::check(cudaEventRecord(begin, stream), p.call);
        execute(plan, candidates[i].algo, p, scratch, workspace, stream);
      }
      cuda::check(cudaEventRecord(end, stream), p.call);
      cuda::check(cudaEventSynchronize(end), p.call);
      float ms = 0;
      cuda::check(cudaEventElapsedTime(&ms, begin, end), p.call);
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

/// f of parts of `p` that make up the whole. Where all rows begin at multiples of 16 bytes, a dimension of c along
/// which rows of c or a run is cut to such a multiple, for the fast kernels, and its last few elements are a part of
/// their own.
template <class F>
void for_parts(const Product& p, const F& f) {
  const auto unit = static_cast<std::int64_t>(16 / size_of(p.a.dtype));
  const std::int64_t rows = p.c.rows, columns = p.c.columns;
  const auto whole = [&](std::int64_t size) { return size - size % unit; };
  const auto is_cut = [&](std::int64_t size) { return whole(size) > 0 && whole(size) < size; };
  const auto part_of_rows = [](const Matrix& m, bool transposed, std::int64_t begin, std::int64_t end) {
    return transposed ? m.part(0, m.rows, begin, end - begin) : m.part(begin, end - begin, 0, m.columns);
  };
  const auto part_of_columns = [&](const Matrix& m, bool transposed, std::int64_t begin, std::int64_t end) {
    return part_of_rows(m, !transposed, begin, end);
  };
  const auto with_rows = [&](std::int64_t begin, std::int64_t end) {
    Product q = p;
    q.a = part_of_rows(p.a, p.transpose_a, begin, end);
    q.c = part_of_rows(p.c, false, begin, end);
    f(q);
  };
  const auto with_columns = [&](std::int64_t begin, std::int64_t end) {
    Product q = p;
    q.b = part_of_columns(p.b, p.transpose_b, begin, end);
    q.c = part_of_columns(p.c, false, begin, end);
    if (p.bias != nullptr) {
      q.bias = static_cast<const std::byte*>(p.bias) + static_cast<std::size_t>(begin) * size_of(p.b.dtype);
    }
    f(q);
  };
  const bool is_aligned = has_aligned_rows(p.a) && has_aligned_rows(p.b) && has_aligned_rows(p.c);
  if (is_aligned && p.transpose_a && is_cut(rows)) {
    with_rows(0, whole(rows));
    with_rows(whole(rows), rows);
  } else if (is_aligned && is_cut(columns)) {
    with_columns(0, whole(columns));
    with_columns(whole(columns), columns);
  } else {
    f(p);
  }
}

}  // namespace

void matmul(const Stream& stream, const Matmul& m) {
  const std::int64_t rows = m.c.dim(0), columns = m.b.dim(m.transpose_b ? 0 : 1),
                     inner = m.b.dim(m.transpose_b ? 1 : 0);
  if (m.a.dtype != m.b.dtype || (m.c.dtype != m.a.dtype && m.c.dtype != DType::f32)) {
    fail<InternalError>("{}: {} times {} gives no {} on CUDA", m.call, name_of(m.a.dtype), name_of(m.b.dtype),
                        name_of(m.c.dtype));
  }
  type_of(m.a.dtype, m.call);
  if (rows == 0 || columns == 0) return;
  require(inner > 0, "matmul: nothing to sum over");
  const auto matrix = [](const Tensor& t, std::int64_t n_rows, std::int64_t n_columns) -> Matrix {
    return {t.data, t.dtype, n_rows, n_columns, t.dim(1)};
  };
  const Product whole{.call = m.call,
                      .a = m.transpose_a ? matrix(m.a, inner, rows) : matrix(m.a, rows, inner),
                      .b = matrix(m.b, m.b.dim(0), m.b.dim(1)),
                      .c = matrix(m.c, rows, columns),
                      .transpose_a = m.transpose_a,
                      .transpose_b = m.transpose_b,
                      .bias = m.bias.data,
                      .accumulate = m.accumulate};
  // A product may run on any thread; each device has its own handle, plans and workspaces.
  static std::mutex mutex;
  static auto& devices = *new std::map<int, DeviceProducts>();  // outlives all users: the driver goes first at exit
  const std::lock_guard lock(mutex);
  DeviceProducts& products = devices[stream.device().index];
  for_parts(whole, [&](const Product& p) { products.run(stream, p); });
}

}  // namespace deltapipe::kernels::cuda
