// cuDNN's backend API without its engines: descriptors keep what they are given, every operation graph has one plan,
// and executing it checks the memory of the graph's tensors.
#include "tests/gpu/stand_in/order.h"
#include "tests/gpu/stand_in/stand_in.h"

#include <cudnn.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <vector>

struct cudnnContext {
  int device;
  cudaStream_t stream = nullptr;
};

namespace deltapipe::stand_in {
namespace {

struct Descriptor;

/// Of one attribute: elements as bytes, and of descriptors the objects.
struct Value {
  cudnnBackendAttributeType_t type;
  std::int64_t count = 0;
  std::vector<std::byte> bytes;
  std::vector<std::shared_ptr<Descriptor>> descriptors;
};

struct Descriptor {
  cudnnBackendDescriptorType_t type;
  bool is_final = false;
  std::map<int, Value> values;
};

std::map<const void*, std::shared_ptr<Descriptor>>& descriptors() {
  static auto& all = *new std::map<const void*, std::shared_ptr<Descriptor>>();
  return all;
}

std::set<const cudnnContext*>& handles() {
  static auto& all = *new std::set<const cudnnContext*>();
  return all;
}

bool is_handle(const cudnnContext* handle, const char* call) {
  if (handles().contains(handle)) return true;
  say_refusal(fmt::format("{}: {:p} is no live handle", call, static_cast<const void*>(handle)));
  return false;
}

std::shared_ptr<Descriptor> find(const void* handle, const char* call) {
  const auto found = descriptors().find(handle);
  if (found != descriptors().end()) return found->second;
  say_refusal(fmt::format("{}: {:p} is no live descriptor", call, handle));
  return nullptr;
}

std::size_t size_of(cudnnBackendAttributeType_t type) {
  switch (type) {
    case CUDNN_TYPE_HANDLE:
    case CUDNN_TYPE_INT64:
    case CUDNN_TYPE_DOUBLE:
    case CUDNN_TYPE_VOID_PTR:
    case CUDNN_TYPE_BACKEND_DESCRIPTOR: return 8;
    case CUDNN_TYPE_BOOLEAN:
    case CUDNN_TYPE_CHAR: return 1;
    case CUDNN_TYPE_FRACTION: return 16;
    default: return 4;
  }
}

std::size_t size_of(cudnnDataType_t type) {
  switch (type) {
    case CUDNN_DATA_DOUBLE:
    case CUDNN_DATA_INT64: return 8;
    case CUDNN_DATA_FLOAT:
    case CUDNN_DATA_INT32: return 4;
    case CUDNN_DATA_HALF:
    case CUDNN_DATA_BFLOAT16: return 2;
    default: return 1;
  }
}

template <class T>
std::vector<T> elements(const Descriptor& d, int attribute) {
  const auto found = d.values.find(attribute);
  if (found == d.values.end()) return {};
  std::vector<T> all(found->second.bytes.size() / sizeof(T));
  std::memcpy(all.data(), found->second.bytes.data(), all.size() * sizeof(T));
  return all;
}

template <class T>
T element(const Descriptor& d, int attribute, T otherwise) {
  const auto found = d.values.find(attribute);
  if (found != d.values.end() && found->second.bytes.size() >= sizeof otherwise) {
    std::memcpy(&otherwise, found->second.bytes.data(), sizeof otherwise);
  }
  return otherwise;
}

template <class T>
Value value_of(cudnnBackendAttributeType_t type, const T& value) {
  const auto* bytes = reinterpret_cast<const std::byte*>(&value);
  return {type, 1, {bytes, bytes + sizeof value}, {}};
}

Value value_of(std::shared_ptr<Descriptor> descriptor) {
  return {CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, {}, {std::move(descriptor)}};
}

/// Tensors below a descriptor, by their unique ids.
using Tensors = std::map<std::int64_t, std::shared_ptr<Descriptor>>;
void collect(const std::shared_ptr<Descriptor>& d, std::set<const Descriptor*>& seen, Tensors& tensors) {
  if (!seen.insert(d.get()).second) return;
  if (d->type == CUDNN_BACKEND_TENSOR_DESCRIPTOR) {
    tensors[element<std::int64_t>(*d, CUDNN_ATTR_TENSOR_UNIQUE_ID, -1)] = d;
  }
  for (const auto& [attribute, value] : d->values) {
    for (const auto& below : value.descriptors) collect(below, seen, tensors);
  }
}

Tensors tensors_of(const std::shared_ptr<Descriptor>& d) {
  std::set<const Descriptor*> seen;
  Tensors tensors;
  collect(d, seen, tensors);
  return tensors;
}

/// What plans of cuDNN 9.19 for attention on an H100 add up to at most: 17 KiB, and 448 bytes a sequence.
std::int64_t workspace_of(const std::shared_ptr<Descriptor>& d) {
  std::int64_t sequences = 1;
  for (const auto& [id, tensor] : tensors_of(d)) {
    const std::vector<std::int64_t> dims = elements<std::int64_t>(*tensor, CUDNN_ATTR_TENSOR_DIMENSIONS);
    const bool is_ragged = tensor->values.contains(CUDNN_ATTR_TENSOR_RAGGED_OFFSET_DESC);
    if (is_ragged && !dims.empty()) sequences = std::max(sequences, dims.front());
  }
  return (17 << 10) + 448 * sequences;
}

std::shared_ptr<Descriptor> make_final(cudnnBackendDescriptorType_t type) {
  return std::make_shared<Descriptor>(Descriptor{type, true, {}});
}

/// What a descriptor knows of itself once it is final.
void complete(const std::shared_ptr<Descriptor>& d) {
  if (d->type == CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR) {
    d->values[CUDNN_ATTR_OPERATIONGRAPH_ENGINE_GLOBAL_COUNT] = value_of(CUDNN_TYPE_INT64, std::int64_t{1});
  } else if (d->type == CUDNN_BACKEND_ENGINE_DESCRIPTOR) {
    d->values[CUDNN_ATTR_ENGINE_BEHAVIOR_NOTE] =
        value_of(CUDNN_TYPE_BEHAVIOR_NOTE, CUDNN_BEHAVIOR_NOTE_RUNTIME_COMPILATION);
  } else if (d->type == CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR) {
    const auto engine = make_final(CUDNN_BACKEND_ENGINE_DESCRIPTOR);
    engine->values[CUDNN_ATTR_ENGINE_OPERATION_GRAPH] = d->values[CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH];
    engine->values[CUDNN_ATTR_ENGINE_GLOBAL_INDEX] = value_of(CUDNN_TYPE_INT64, std::int64_t{0});
    complete(engine);
    const auto config = make_final(CUDNN_BACKEND_ENGINECFG_DESCRIPTOR);
    config->values[CUDNN_ATTR_ENGINECFG_ENGINE] = value_of(engine);
    complete(config);
    d->values[CUDNN_ATTR_ENGINEHEUR_RESULTS] = value_of(config);
  } else if (d->type == CUDNN_BACKEND_ENGINECFG_DESCRIPTOR) {
    d->values[CUDNN_ATTR_ENGINECFG_WORKSPACE_SIZE] = value_of(CUDNN_TYPE_INT64, workspace_of(d));
    d->values[CUDNN_ATTR_ENGINECFG_SHARED_MEMORY_USED] = value_of(CUDNN_TYPE_INT32, std::int32_t{200 << 10});
  } else if (d->type == CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR) {
    d->values[CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE] = value_of(CUDNN_TYPE_INT64, workspace_of(d));
  }
}

/// Dimensions, strides, type and id must be there and fit.
bool is_sound_tensor(const Descriptor& d) {
  const std::size_t dims = elements<std::int64_t>(d, CUDNN_ATTR_TENSOR_DIMENSIONS).size();
  const std::size_t strides = elements<std::int64_t>(d, CUDNN_ATTR_TENSOR_STRIDES).size();
  if (dims > 0 && dims == strides && d.values.contains(CUDNN_ATTR_TENSOR_DATA_TYPE) &&
      d.values.contains(CUDNN_ATTR_TENSOR_UNIQUE_ID)) {
    return true;
  }
  say_refusal(fmt::format("cudnnBackendFinalize: tensor {} with {} dimensions and {} strides",
                          element<std::int64_t>(d, CUDNN_ATTR_TENSOR_UNIQUE_ID, -1), dims, strides));
  return false;
}

/// Bytes from a tensor's first element to its last; of a ragged one, whose offsets are on the device, one element.
std::size_t bytes_of(const Descriptor& tensor) {
  const std::size_t size = size_of(element(tensor, CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_DATA_FLOAT));
  if (tensor.values.contains(CUDNN_ATTR_TENSOR_RAGGED_OFFSET_DESC)) return size;
  const std::vector<std::int64_t> dims = elements<std::int64_t>(tensor, CUDNN_ATTR_TENSOR_DIMENSIONS),
                                  strides = elements<std::int64_t>(tensor, CUDNN_ATTR_TENSOR_STRIDES);
  std::int64_t last = 0;
  for (std::size_t i = 0; i < dims.size(); ++i) last += (dims[i] - 1) * strides[i];
  return static_cast<std::size_t>(last + 1) * size;
}

bool is_sound_memory(std::int64_t id, const Descriptor& tensor, const void* memory) {
  const std::string what = fmt::format("cudnnBackendExecute: tensor {}", id);
  if (element(tensor, CUDNN_ATTR_TENSOR_IS_BY_VALUE, false)) return is_host_range(memory, 1, what);
  if (!is_device_range(memory, bytes_of(tensor), what)) return false;
  const auto address = reinterpret_cast<std::uintptr_t>(memory);
  const auto declared = element<std::int64_t>(tensor, CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, 1);
  if (logs() && address % static_cast<std::uintptr_t>(declared) != 0) {
    // cuDNN's own engines took such pointers on an H100, of tensors that they read element by element.
    fmt::print(stderr, "CUDA stand-in: {}: {:p} is less aligned than the {} bytes declared\n", what, memory, declared);
  }
  const std::size_t size = size_of(element(tensor, CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_DATA_FLOAT));
  if (address % size == 0) return true;
  say_refusal(fmt::format("{}: {:p} is not aligned to its {} bytes", what, memory, size));
  return false;
}

}  // namespace
}  // namespace deltapipe::stand_in

using namespace deltapipe::stand_in;

STAND_IN std::size_t cudnnGetVersion() { return CUDNN_VERSION; }
STAND_IN std::size_t cudnnGetCudartVersion() { return CUDART_VERSION; }
STAND_IN const char* cudnnGetErrorString(cudnnStatus_t status) {
  return with_refusal(status == CUDNN_STATUS_SUCCESS ? "CUDNN_STATUS_SUCCESS" : "CUDNN_STATUS_BAD_PARAM");
}
STAND_IN void cudnnGetLastErrorString(char* message, std::size_t size) {
  if (size > 0) *fmt::format_to_n(message, size - 1, "{}", last_refusal()).out = '\0';
}
STAND_IN cudnnStatus_t cudnnCreate(cudnnHandle_t* out) {
  const std::lock_guard lock(mutex());
  *out = new cudnnContext{current_device()};
  handles().insert(*out);
  return CUDNN_STATUS_SUCCESS;
}
STAND_IN cudnnStatus_t cudnnDestroy(cudnnHandle_t handle) {
  const std::lock_guard lock(mutex());
  if (!is_handle(handle, "cudnnDestroy")) return CUDNN_STATUS_BAD_PARAM;
  handles().erase(handle);
  delete handle;
  return CUDNN_STATUS_SUCCESS;
}
STAND_IN cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream) {
  const std::lock_guard lock(mutex());
  if (!is_handle(handle, "cudnnSetStream") || !is_stream(stream, "cudnnSetStream")) return CUDNN_STATUS_BAD_PARAM;
  handle->stream = stream;
  return CUDNN_STATUS_SUCCESS;
}
STAND_IN cudnnStatus_t cudnnGetStream(cudnnHandle_t handle, cudaStream_t* out) {
  const std::lock_guard lock(mutex());
  if (!is_handle(handle, "cudnnGetStream")) return CUDNN_STATUS_BAD_PARAM;
  *out = handle->stream;
  return CUDNN_STATUS_SUCCESS;
}

STAND_IN cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t type, cudnnBackendDescriptor_t* out) {
  const std::lock_guard lock(mutex());
  auto d = std::make_shared<Descriptor>(Descriptor{type, false, {}});
  *out = d.get();
  descriptors()[d.get()] = std::move(d);
  return CUDNN_STATUS_SUCCESS;
}
/// Descriptors that others hold stay with them.
STAND_IN cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t descriptor) {
  const std::lock_guard lock(mutex());
  if (find(descriptor, "cudnnBackendDestroyDescriptor") == nullptr) return CUDNN_STATUS_BAD_PARAM;
  descriptors().erase(descriptor);
  return CUDNN_STATUS_SUCCESS;
}
STAND_IN cudnnStatus_t cudnnBackendSetAttribute(cudnnBackendDescriptor_t descriptor,
                                                cudnnBackendAttributeName_t attribute, cudnnBackendAttributeType_t type,
                                                std::int64_t count, const void* from) {
  constexpr const char* call = "cudnnBackendSetAttribute";
  const std::lock_guard lock(mutex());
  const auto d = find(descriptor, call);
  if (d == nullptr) return CUDNN_STATUS_BAD_PARAM;
  if (d->is_final || count < 0 || (count > 0 && from == nullptr)) {
    return refuse(CUDNN_STATUS_BAD_PARAM, "{}: {} elements of attribute {}{}", call, count, static_cast<int>(attribute),
                  d->is_final ? ", the descriptor is final" : "");
  }
  const auto* bytes = static_cast<const std::byte*>(from);
  Value value{type, count, {}, {}};
  if (type == CUDNN_TYPE_BACKEND_DESCRIPTOR) {
    for (std::int64_t i = 0; i < count; ++i) {
      auto below = find(static_cast<void* const*>(from)[i], call);
      if (below == nullptr) return CUDNN_STATUS_BAD_PARAM;
      if (!below->is_final) {
        return refuse(CUDNN_STATUS_BAD_PARAM, "{}: a descriptor of attribute {} is not final", call,
                      static_cast<int>(attribute));
      }
      value.descriptors.push_back(std::move(below));
    }
  } else if (count > 0) {
    value.bytes.assign(bytes, bytes + static_cast<std::size_t>(count) * size_of(type));
  }
  d->values[attribute] = std::move(value);
  return CUDNN_STATUS_SUCCESS;
}
STAND_IN cudnnStatus_t cudnnBackendFinalize(cudnnBackendDescriptor_t descriptor) {
  const std::lock_guard lock(mutex());
  const auto d = find(descriptor, "cudnnBackendFinalize");
  if (d == nullptr) return CUDNN_STATUS_BAD_PARAM;
  if (d->type == CUDNN_BACKEND_TENSOR_DESCRIPTOR && !is_sound_tensor(*d)) return CUDNN_STATUS_BAD_PARAM;
  d->is_final = true;
  complete(d);
  return CUDNN_STATUS_SUCCESS;
}
/// An attribute that was not set has no elements. Descriptors are copied into those of the caller.
STAND_IN cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t const descriptor,
                                                cudnnBackendAttributeName_t attribute, cudnnBackendAttributeType_t type,
                                                std::int64_t requested, std::int64_t* count, void* to) {
  constexpr const char* call = "cudnnBackendGetAttribute";
  const std::lock_guard lock(mutex());
  const auto d = find(descriptor, call);
  if (d == nullptr) return CUDNN_STATUS_BAD_PARAM;
  if (!d->is_final) {
    return refuse(CUDNN_STATUS_NOT_INITIALIZED, "{}: attribute {} of a descriptor that is not final", call,
                  static_cast<int>(attribute));
  }
  const auto found = d->values.find(attribute);
  if (count != nullptr) *count = found == d->values.end() ? 0 : found->second.count;
  if (found == d->values.end() || to == nullptr) return CUDNN_STATUS_SUCCESS;
  const Value& value = found->second;
  if (value.type != type) {
    return refuse(CUDNN_STATUS_BAD_PARAM, "{}: attribute {} is of type {}, not {}", call, static_cast<int>(attribute),
                  static_cast<int>(value.type), static_cast<int>(type));
  }
  const auto filled = static_cast<std::size_t>(std::clamp<std::int64_t>(requested, 0, value.count));
  if (type != CUDNN_TYPE_BACKEND_DESCRIPTOR) {
    std::memcpy(to, value.bytes.data(), filled * size_of(type));
    return CUDNN_STATUS_SUCCESS;
  }
  for (std::size_t i = 0; i < filled; ++i) {
    const auto target = find(static_cast<void**>(to)[i], call);
    if (target == nullptr) return CUDNN_STATUS_BAD_PARAM;
    *target = *value.descriptors[i];
  }
  return CUDNN_STATUS_SUCCESS;
}
STAND_IN cudnnStatus_t cudnnBackendExecute(cudnnHandle_t handle, cudnnBackendDescriptor_t plan,
                                           cudnnBackendDescriptor_t variant_pack) {
  constexpr const char* call = "cudnnBackendExecute";
  const std::lock_guard lock(mutex());
  const auto p = find(plan, call), pack = find(variant_pack, call);
  if (!is_handle(handle, call) || p == nullptr || pack == nullptr) return CUDNN_STATUS_BAD_PARAM;
  if (!p->is_final || !pack->is_final || p->type != CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR) {
    return refuse(CUDNN_STATUS_BAD_PARAM, "{}: a plan or variant pack that is not final", call);
  }
  if (!is_stream_of_current_device(handle->stream, call)) return CUDNN_STATUS_BAD_PARAM;
  const auto ids = elements<std::int64_t>(*pack, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS);
  const auto memory = elements<void*>(*pack, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS);
  if (ids.size() != memory.size()) return refuse(CUDNN_STATUS_BAD_PARAM, "{}: ids and pointers differ in number", call);
  std::map<std::int64_t, const void*> given;
  for (std::size_t i = 0; i < ids.size(); ++i) given[ids[i]] = memory[i];
  const Tensors tensors = tensors_of(p);
  std::vector<Use> uses;
  if (logs()) fmt::print(stderr, "CUDA stand-in: a cuDNN plan of {} tensors\n", tensors.size());
  for (const auto& [id, tensor] : tensors) {
    if (element(*tensor, CUDNN_ATTR_TENSOR_IS_VIRTUAL, false)) continue;
    const auto found = given.find(id);
    if (found == given.end()) return refuse(CUDNN_STATUS_BAD_PARAM, "{}: no memory for tensor {}", call, id);
    if (!is_sound_memory(id, *tensor, found->second)) return CUDNN_STATUS_BAD_PARAM;
    if (is_on_device(found->second)) uses.push_back({found->second, bytes_of(*tensor), Access::unknown});
  }
  const auto* workspace = element<const void*>(*pack, CUDNN_ATTR_VARIANT_PACK_WORKSPACE, nullptr);
  const auto bytes = element<std::int64_t>(*p, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, 0);
  const bool fits = is_device_range(workspace, static_cast<std::size_t>(bytes), "cudnnBackendExecute: workspace");
  if (!fits) return CUDNN_STATUS_BAD_PARAM;
  return queue(call, handle->stream, uses, Work::kernel) ? CUDNN_STATUS_SUCCESS : CUDNN_STATUS_EXECUTION_FAILED;
}
