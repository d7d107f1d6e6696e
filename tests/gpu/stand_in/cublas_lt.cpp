// cuBLASLt without its products: descriptions are kept, algorithms remember what they were chosen for, and a product's
// operands, result, bias and workspace must be device memory with room for what the layouts say.
#include "tests/gpu/stand_in/order.h"
#include "tests/gpu/stand_in/stand_in.h"

#include <cublasLt.h>

#include <array>
#include <cstring>
#include <map>
#include <set>
#include <vector>

namespace deltapipe::stand_in {
namespace {

/// Attributes by number, as their bytes.
using Attributes = std::map<int, std::vector<std::byte>>;

/// What is behind the library's opaque handles.
struct Object {
  enum class Kind { handle, layout, description, preference } kind;
  Attributes attributes;
};

const char* name_of(Object::Kind kind) {
  switch (kind) {
    case Object::Kind::handle: return "cublasLtHandle_t";
    case Object::Kind::layout: return "cublasLtMatrixLayout_t";
    case Object::Kind::description: return "cublasLtMatmulDesc_t";
    case Object::Kind::preference: return "cublasLtMatmulPreference_t";
  }
  return "";
}

std::set<const void*>& objects() {
  static auto& all = *new std::set<const void*>();
  return all;
}

template <class Handle>
Object* make(Object::Kind kind, Handle* out) {
  const std::lock_guard lock(mutex());
  auto* object = new Object{kind, {}};
  objects().insert(object);
  *out = reinterpret_cast<Handle>(object);
  return object;
}

/// Null, said, unless the handle is a live object of this kind.
Object* find(const void* handle, Object::Kind kind, const char* call) {
  const std::lock_guard lock(mutex());
  if (objects().contains(handle)) {
    auto* object = static_cast<Object*>(const_cast<void*>(handle));
    if (object->kind == kind) return object;
  }
  say_refusal(fmt::format("{}: {:p} is no live {}", call, handle, name_of(kind)));
  return nullptr;
}

cublasStatus_t destroy(const void* handle, Object::Kind kind, const char* call) {
  const std::lock_guard lock(mutex());
  const Object* object = find(handle, kind, call);
  if (object == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  objects().erase(object);
  delete object;
  return CUBLAS_STATUS_SUCCESS;
}

template <class T>
void set(Object& object, int attribute, const T& value) {
  const auto* bytes = reinterpret_cast<const std::byte*>(&value);
  object.attributes[attribute].assign(bytes, bytes + sizeof value);
}

template <class T>
T get(const Object& object, int attribute, T otherwise) {
  const auto found = object.attributes.find(attribute);
  if (found != object.attributes.end()) std::memcpy(&otherwise, found->second.data(), sizeof otherwise);
  return otherwise;
}

/// 0: not in the table, any size is taken.
std::size_t size_of_attribute(Object::Kind kind, int attribute) {
  if (kind == Object::Kind::description) {
    switch (attribute) {
      case CUBLASLT_MATMUL_DESC_TRANSA:
      case CUBLASLT_MATMUL_DESC_TRANSB:
      case CUBLASLT_MATMUL_DESC_EPILOGUE:
      case CUBLASLT_MATMUL_DESC_POINTER_MODE:
      case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: return 4;
      case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return 8;
      default: return 0;
    }
  }
  if (kind == Object::Kind::preference) {
    switch (attribute) {
      case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES: return 8;
      case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES:
      case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES:
      case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES:
      case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES: return 4;
      default: return 0;
    }
  }
  return 0;
}

cublasStatus_t set_attribute(const void* handle, Object::Kind kind, int attribute, const void* value, std::size_t bytes,
                             const char* call) {
  const std::lock_guard lock(mutex());
  Object* object = find(handle, kind, call);
  if (object == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  const std::size_t wanted = size_of_attribute(kind, attribute);
  if (value == nullptr || (wanted != 0 && bytes != wanted)) {
    return refuse(CUBLAS_STATUS_INVALID_VALUE, "{}: attribute {} of {} bytes, it has {}", call, attribute, bytes,
                  wanted);
  }
  const auto* from = static_cast<const std::byte*>(value);
  object->attributes[attribute].assign(from, from + bytes);
  return CUBLAS_STATUS_SUCCESS;
}

std::size_t size_of(cudaDataType_t type) {
  switch (type) {
    case CUDA_R_16BF:
    case CUDA_R_16F: return 2;
    case CUDA_R_32F: return 4;
    case CUDA_R_64F: return 8;
    default: return 0;
  }
}

/// A matrix as its layout describes it, column-major.
struct Matrix {
  cudaDataType_t type;
  std::uint64_t rows, columns;
  std::int64_t ld;
  std::int32_t batch;
  std::int64_t batch_stride;

  explicit Matrix(const Object& o)
      : type(get(o, CUBLASLT_MATRIX_LAYOUT_TYPE, CUDA_R_32F)),
        rows(get<std::uint64_t>(o, CUBLASLT_MATRIX_LAYOUT_ROWS, 0)),
        columns(get<std::uint64_t>(o, CUBLASLT_MATRIX_LAYOUT_COLS, 0)),
        ld(get<std::int64_t>(o, CUBLASLT_MATRIX_LAYOUT_LD, 0)),
        batch(get<std::int32_t>(o, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, 1)),
        batch_stride(get<std::int64_t>(o, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, 0)) {}

  std::size_t bytes() const {
    const std::uint64_t one = (columns - 1) * static_cast<std::uint64_t>(ld) + rows;
    return (one + static_cast<std::uint64_t>(batch - 1) * static_cast<std::uint64_t>(batch_stride)) * size_of(type);
  }
  bool is_sound(const char* name) const {
    const bool sound = size_of(type) > 0 && rows > 0 && columns > 0 && ld >= static_cast<std::int64_t>(rows) &&
                       batch >= 1 && (batch == 1 || batch_stride >= 0);
    if (!sound) {
      say_refusal(fmt::format("cublasLtMatmul: {}: type {}, {} rows, {} columns, leading dimension {}", name,
                              static_cast<int>(type), rows, columns, ld));
    }
    return sound;
  }
};

/// op(A) [m, k] times op(B) [k, n] into C and D [m, n], and the types that the library takes together.
bool do_fit(const Object& description, const Matrix& a, const Matrix& b, const Matrix& c, const Matrix& d) {
  if (!a.is_sound("A") || !b.is_sound("B") || !c.is_sound("C") || !d.is_sound("D")) return false;
  const auto is_transposed = [&](int attribute) { return get(description, attribute, CUBLAS_OP_N) != CUBLAS_OP_N; };
  const bool ta = is_transposed(CUBLASLT_MATMUL_DESC_TRANSA), tb = is_transposed(CUBLASLT_MATMUL_DESC_TRANSB);
  const std::uint64_t m = ta ? a.columns : a.rows, k = ta ? a.rows : a.columns;
  const std::uint64_t k_of_b = tb ? b.columns : b.rows, n = tb ? b.rows : b.columns;
  if (k != k_of_b || c.rows != m || c.columns != n || d.rows != m || d.columns != n || a.batch != d.batch ||
      b.batch != d.batch || c.batch != d.batch) {
    say_refusal(fmt::format("cublasLtMatmul: [{}, {}] times [{}, {}] into [{}, {}] and [{}, {}]", m, k, k_of_b, n,
                            c.rows, c.columns, d.rows, d.columns));
    return false;
  }
  if (a.type != b.type || c.type != d.type || (d.type != a.type && d.type != CUDA_R_32F)) {
    say_refusal(fmt::format("cublasLtMatmul: types {} times {} into {} and {}", static_cast<int>(a.type),
                            static_cast<int>(b.type), static_cast<int>(c.type), static_cast<int>(d.type)));
    return false;
  }
  return true;
}

/// What an algorithm says in its opaque words: for which sizes it was chosen, and what it counts on.
struct Choice {
  std::uint64_t magic;
  std::uint64_t m, n, a_rows, a_columns;
  std::uint64_t workspace;
  std::array<std::uint16_t, 4> alignments;  // of A, B, C, D
  std::uint64_t number;
};
constexpr std::uint64_t magic_of_choices = 0xde17a;
static_assert(sizeof(Choice) == sizeof(cublasLtMatmulAlgo_t));

bool is_aligned(const void* address, std::size_t alignment) {
  return reinterpret_cast<std::uintptr_t>(address) % alignment == 0;
}

bool overlap(const void* p, std::size_t bytes_of_p, const void* q, std::size_t bytes_of_q) {
  const auto a = reinterpret_cast<std::uintptr_t>(p), b = reinterpret_cast<std::uintptr_t>(q);
  return a < b + bytes_of_q && b < a + bytes_of_p;
}

bool is_bias_sound(const Object& description, const Matrix& d) {
  const auto epilogue = get(description, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_DEFAULT);
  if (epilogue == CUBLASLT_EPILOGUE_DEFAULT) return true;
  if (epilogue != CUBLASLT_EPILOGUE_BIAS) {
    say_refusal(fmt::format("cublasLtMatmul: the stand-in does not know epilogue {}", static_cast<int>(epilogue)));
    return false;
  }
  const auto* bias = get<const void*>(description, CUBLASLT_MATMUL_DESC_BIAS_POINTER, nullptr);
  const auto type = get(description, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, d.type);
  return is_device_range(bias, d.rows * size_of(type), "cublasLtMatmul: bias");
}

}  // namespace
}  // namespace deltapipe::stand_in

using namespace deltapipe::stand_in;
using Kind = Object::Kind;

STAND_IN cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  make(Kind::handle, handle);
  return CUBLAS_STATUS_SUCCESS;
}
STAND_IN cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
  return destroy(handle, Kind::handle, "cublasLtDestroy");
}
STAND_IN std::size_t cublasLtGetVersion() { return CUBLAS_VERSION; }
STAND_IN const char* cublasLtGetStatusString(cublasStatus_t status) {
  return with_refusal(status == CUBLAS_STATUS_SUCCESS         ? "success"
                      : status == CUBLAS_STATUS_INVALID_VALUE ? "CUBLAS_STATUS_INVALID_VALUE"
                                                              : "CUBLAS_STATUS_EXECUTION_FAILED");
}

STAND_IN cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* out, cudaDataType type, std::uint64_t rows,
                                                   std::uint64_t columns, std::int64_t ld) {
  Object& layout = *make(Kind::layout, out);
  set(layout, CUBLASLT_MATRIX_LAYOUT_TYPE, type);
  set(layout, CUBLASLT_MATRIX_LAYOUT_ROWS, rows);
  set(layout, CUBLASLT_MATRIX_LAYOUT_COLS, columns);
  set(layout, CUBLASLT_MATRIX_LAYOUT_LD, ld);
  return CUBLAS_STATUS_SUCCESS;
}
STAND_IN cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
  return destroy(layout, Kind::layout, "cublasLtMatrixLayoutDestroy");
}
STAND_IN cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                         cublasLtMatrixLayoutAttribute_t attribute, const void* value,
                                                         std::size_t bytes) {
  return set_attribute(layout, Kind::layout, attribute, value, bytes, "cublasLtMatrixLayoutSetAttribute");
}

STAND_IN cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* out, cublasComputeType_t compute,
                                                 cudaDataType_t scale) {
  Object& description = *make(Kind::description, out);
  set(description, CUBLASLT_MATMUL_DESC_COMPUTE_TYPE, compute);
  set(description, CUBLASLT_MATMUL_DESC_SCALE_TYPE, scale);
  return CUBLAS_STATUS_SUCCESS;
}
STAND_IN cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t description) {
  return destroy(description, Kind::description, "cublasLtMatmulDescDestroy");
}
STAND_IN cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t description,
                                                       cublasLtMatmulDescAttributes_t attribute, const void* value,
                                                       std::size_t bytes) {
  return set_attribute(description, Kind::description, attribute, value, bytes, "cublasLtMatmulDescSetAttribute");
}

STAND_IN cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* out) {
  make(Kind::preference, out);
  return CUBLAS_STATUS_SUCCESS;
}
STAND_IN cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  return destroy(preference, Kind::preference, "cublasLtMatmulPreferenceDestroy");
}
STAND_IN cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                             cublasLtMatmulPreferenceAttributes_t attribute,
                                                             const void* value, std::size_t bytes) {
  return set_attribute(preference, Kind::preference, attribute, value, bytes, "cublasLtMatmulPreferenceSetAttribute");
}

/// Two algorithms, so that callers have to choose; the first wants workspace, as much as it may have up to 4 MiB.
STAND_IN cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t description,
                                                       cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                                       cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                                       cublasLtMatmulPreference_t preference, int requested,
                                                       cublasLtMatmulHeuristicResult_t results[], int* returned) {
  constexpr const char* call = "cublasLtMatmulAlgoGetHeuristic";
  const std::lock_guard lock(mutex());
  const Object *desc = find(description, Kind::description, call), *pref = find(preference, Kind::preference, call);
  std::array<const Object*, 4> layouts{find(a, Kind::layout, call), find(b, Kind::layout, call),
                                       find(c, Kind::layout, call), find(d, Kind::layout, call)};
  for (const Object* o : layouts) {
    if (o == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  }
  if (find(handle, Kind::handle, call) == nullptr || desc == nullptr || pref == nullptr || requested < 1) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  const Matrix of_a(*layouts[0]), of_d(*layouts[3]);
  if (!do_fit(*desc, of_a, Matrix(*layouts[1]), Matrix(*layouts[2]), of_d)) return CUBLAS_STATUS_INVALID_VALUE;
  const auto alignment = [&](int attribute) {
    return static_cast<std::uint16_t>(get<std::uint32_t>(*pref, attribute, 256));
  };
  Choice choice{.magic = magic_of_choices,
                .m = of_d.rows,
                .n = of_d.columns,
                .a_rows = of_a.rows,
                .a_columns = of_a.columns,
                .workspace = 0,
                .alignments = {alignment(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES),
                               alignment(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES),
                               alignment(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES),
                               alignment(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES)},
                .number = 0};
  constexpr std::uint64_t wanted = 4 << 20;
  const auto most = get<std::uint64_t>(*pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, 0);
  *returned = std::min(requested, 2);
  for (int i = 0; i < *returned; ++i) {
    choice.number = static_cast<std::uint64_t>(i);
    choice.workspace = i == 0 ? std::min(wanted, most) : 0;
    results[i] = {};
    std::memcpy(&results[i].algo, &choice, sizeof choice);
    results[i].workspaceSize = choice.workspace;
    results[i].state = CUBLAS_STATUS_SUCCESS;
    results[i].wavesCount = 1;
  }
  return CUBLAS_STATUS_SUCCESS;
}

STAND_IN cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t description, const void* alpha,
                                       const void* a, cublasLtMatrixLayout_t layout_a, const void* b,
                                       cublasLtMatrixLayout_t layout_b, const void* beta, const void* c,
                                       cublasLtMatrixLayout_t layout_c, void* d, cublasLtMatrixLayout_t layout_d,
                                       const cublasLtMatmulAlgo_t* algorithm, void* workspace,
                                       std::size_t workspace_bytes, cudaStream_t stream) {
  constexpr const char* call = "cublasLtMatmul";
  constexpr auto bad = CUBLAS_STATUS_INVALID_VALUE;
  const std::lock_guard lock(mutex());
  const Object *desc = find(description, Kind::description, call), *la = find(layout_a, Kind::layout, call),
               *lb = find(layout_b, Kind::layout, call), *lc = find(layout_c, Kind::layout, call),
               *ld = find(layout_d, Kind::layout, call);
  if (find(handle, Kind::handle, call) == nullptr || !desc || !la || !lb || !lc || !ld) return bad;
  if (!is_stream_of_current_device(stream, call)) return bad;
  const Matrix of_a(*la), of_b(*lb), of_c(*lc), of_d(*ld);
  if (!do_fit(*desc, of_a, of_b, of_c, of_d)) return bad;
  if (logs())
    fmt::print(stderr, "CUDA stand-in: product of [{}, {}] by op(A) [{}, {}]\n", of_d.rows, of_d.columns, of_a.rows,
               of_a.columns);
  if (!is_host_range(alpha, sizeof(float), "cublasLtMatmul: alpha") ||
      !is_host_range(beta, sizeof(float), "cublasLtMatmul: beta")) {
    return bad;
  }
  float scale_of_c = 0;
  std::memcpy(&scale_of_c, beta, sizeof scale_of_c);
  if (!is_device_range(a, of_a.bytes(), "cublasLtMatmul: A") ||
      !is_device_range(b, of_b.bytes(), "cublasLtMatmul: B") ||
      !is_device_range(d, of_d.bytes(), "cublasLtMatmul: D") || !is_bias_sound(*desc, of_d)) {
    return bad;
  }
  if (scale_of_c != 0 && !is_device_range(c, of_c.bytes(), "cublasLtMatmul: C")) return bad;
  if (overlap(d, of_d.bytes(), a, of_a.bytes()) || overlap(d, of_d.bytes(), b, of_b.bytes())) {
    return refuse(bad, "{}: the result lies over an operand", call);
  }
  Choice choice;
  if (algorithm == nullptr) return refuse(bad, "{}: no algorithm", call);
  std::memcpy(&choice, algorithm, sizeof choice);
  if (choice.magic != magic_of_choices || choice.m != of_d.rows || choice.n != of_d.columns ||
      choice.a_rows != of_a.rows || choice.a_columns != of_a.columns) {
    return refuse(bad, "{}: an algorithm that was chosen for other sizes", call);
  }
  const std::array<const void*, 4> memory{a, b, c, d};
  for (std::size_t i = 0; i < memory.size(); ++i) {
    if (!is_aligned(memory[i], choice.alignments[i])) {
      return refuse(bad, "{}: {:p} is not aligned to the {} bytes that the algorithm was chosen for", call, memory[i],
                    choice.alignments[i]);
    }
  }
  if (workspace_bytes < choice.workspace) {
    return refuse(bad, "{}: {} bytes of workspace, the algorithm wants {}", call, workspace_bytes, choice.workspace);
  }
  constexpr std::size_t workspace_alignment = 256;
  if (!is_device_range(workspace, workspace_bytes, "cublasLtMatmul: workspace")) return bad;
  if (!is_aligned(workspace, workspace_alignment)) return refuse(bad, "{}: workspace is not aligned", call);
  const std::array<Use, 4> uses{{{a, of_a.bytes(), Access::read},
                                 {b, of_b.bytes(), Access::read},
                                 {d, of_d.bytes(), Access::write},
                                 {workspace, workspace_bytes, Access::write}}};
  return queue(call, stream, uses, Work::kernel) ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}
