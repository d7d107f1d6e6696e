// Kernels: registered with what their machine code says of parameters, threads and shared memory; launches are checked
// against that, and run nothing.
//
// Formats. A fat binary (fatbinary_section.h): a header of magic, version, size of itself and of what follows, then
// entries with a header each. An entry of kind 2 is an ELF file; its section ".nv.info.NAME" lists attributes of kernel
// NAME, ".nv.shared.NAME" is as large as its static shared memory and the system's, and ".nv.info" has the registers of
// all. ptxas writes attributes as a byte of format (4: 16 bits of size, then the value), a byte of kind, and the value.
#include "tests/gpu/stand_in/order.h"
#include "tests/gpu/stand_in/stand_in.h"

#include <cuda.h>

#include <cxxabi.h>
#include <elf.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <string_view>
#include <vector>

namespace deltapipe::stand_in {
namespace {

constexpr std::size_t default_shared = 48 << 10, most_shared = 227 << 10;
constexpr std::size_t system_shared = 1 << 10;  // of every block
constexpr unsigned registers_of_a_block = 65536;

struct Parameter {
  std::size_t bytes = 0;
};

/// What machine code says of a kernel.
struct Properties {
  std::map<unsigned, Parameter> parameters;  // by position
  unsigned most_threads = 1024, registers = 0;
  std::size_t static_shared = 0;
  std::array<unsigned, 3> cluster{1, 1, 1};
};

struct Module {
  std::map<std::string, Properties, std::less<>> kernels;
};

}  // namespace
}  // namespace deltapipe::stand_in

struct CUkern_st {
  std::string name;  // readable
  deltapipe::stand_in::Properties properties;
  bool is_known = false;  // its machine code was found
  std::size_t most_dynamic = 0;
  bool any_cluster = false;  // larger than 8 blocks
  std::vector<bool> reads;   // by parameter: a pointer to what the kernel only reads
};

namespace deltapipe::stand_in {
namespace {

template <class T>
T read(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

enum Attribute : unsigned {
  attribute_max_threads = 0x05,
  attribute_parameter = 0x17,
  attribute_registers = 0x2f,
  attribute_cluster = 0x3d
};

/// Calls f(kind, value) for each attribute that has one.
template <class F>
void for_attributes(const std::byte* begin, std::size_t bytes, const F& f) {
  constexpr auto has_size = std::byte{4};
  for (std::size_t i = 0; i + 4 <= bytes;) {
    const std::size_t size = begin[i] == has_size ? read<std::uint16_t>(begin + i + 2) : 0;
    if (i + 4 + size > bytes) return;
    if (size > 0) f(std::to_integer<unsigned>(begin[i + 1]), begin + i + 4, size);
    i += 4 + size;
  }
}

std::array<unsigned, 3> read_three(const std::byte* p) {
  return {read<std::uint32_t>(p), read<std::uint32_t>(p + 4), read<std::uint32_t>(p + 8)};
}

void read_attribute(unsigned kind, const std::byte* value, std::size_t bytes, Properties& kernel) {
  if (bytes < 12) return;
  if (kind == attribute_parameter) {
    // 32 bits unused, 16 of position, 16 of offset, then size in the upper 14 of 32.
    kernel.parameters[read<std::uint16_t>(value + 4)] = {read<std::uint32_t>(value + 8) >> 18};
  } else if (kind == attribute_max_threads) {
    const auto [x, y, z] = read_three(value);
    kernel.most_threads = x * y * z;
  } else if (kind == attribute_cluster) {
    kernel.cluster = read_three(value);
  }
}

void read_machine_code(const std::byte* elf, std::size_t bytes, Module& module) {
  if (bytes < sizeof(Elf64_Ehdr) || std::memcmp(elf, ELFMAG, SELFMAG) != 0) return;
  const auto header = read<Elf64_Ehdr>(elf);
  std::vector<Elf64_Shdr> sections;
  for (unsigned i = 0; i < header.e_shnum; ++i) {
    const std::size_t at = header.e_shoff + i * sizeof(Elf64_Shdr);
    if (at + sizeof(Elf64_Shdr) > bytes) return;
    sections.push_back(read<Elf64_Shdr>(elf + at));
    const Elf64_Shdr& s = sections.back();
    if (s.sh_type != SHT_NOBITS && s.sh_offset + s.sh_size > bytes) return;
  }
  const auto text = [&](const Elf64_Shdr& table, std::size_t offset) {
    return std::string_view(reinterpret_cast<const char*>(elf + table.sh_offset + offset));
  };
  constexpr std::string_view information = ".nv.info.", shared = ".nv.shared.";
  const Elf64_Shdr* of_all = nullptr;
  const Elf64_Shdr* symbols = nullptr;
  for (const Elf64_Shdr& s : sections) {
    const std::string_view name = text(sections[header.e_shstrndx], s.sh_name);
    if (name == ".nv.info") of_all = &s;
    if (s.sh_type == SHT_SYMTAB) symbols = &s;
    if (name.starts_with(information)) {
      Properties& kernel = module.kernels[std::string(name.substr(information.size()))];
      for_attributes(elf + s.sh_offset, s.sh_size, [&](unsigned kind, const std::byte* value, std::size_t size) {
        read_attribute(kind, value, size, kernel);
      });
    }
  }
  for (const Elf64_Shdr& s : sections) {
    const std::string_view name = text(sections[header.e_shstrndx], s.sh_name);
    if (!name.starts_with(shared)) continue;
    const auto kernel = module.kernels.find(name.substr(shared.size()));
    if (kernel != module.kernels.end())
      kernel->second.static_shared = s.sh_size - std::min<std::size_t>(s.sh_size, system_shared);
  }
  if (of_all == nullptr || symbols == nullptr) return;
  for_attributes(elf + of_all->sh_offset, of_all->sh_size,
                 [&](unsigned kind, const std::byte* value, std::size_t size) {
                   const std::size_t symbol = size < 8 ? 0 : read<std::uint32_t>(value) * sizeof(Elf64_Sym);
                   if (kind != attribute_registers || symbol == 0 || symbol >= symbols->sh_size) return;
                   const auto entry = read<Elf64_Sym>(elf + symbols->sh_offset + symbol);
                   const auto kernel = module.kernels.find(text(sections[symbols->sh_link], entry.st_name));
                   if (kernel != module.kernels.end()) kernel->second.registers = read<std::uint32_t>(value + 4);
                 });
}

void read_fat_binary(const std::byte* binary, Module& module) {
  constexpr std::uint32_t magic = 0xba55ed50;
  constexpr std::uint16_t kind_elf = 2;
  if (binary == nullptr || read<std::uint32_t>(binary) != magic) return;
  const std::byte* at = binary + read<std::uint16_t>(binary + 6);
  const std::byte* const end = at + read<std::uint64_t>(binary + 8);
  while (at < end) {
    const std::size_t header = read<std::uint32_t>(at + 4), bytes = read<std::uint64_t>(at + 8);
    if (read<std::uint16_t>(at) == kind_elf) read_machine_code(at + header, bytes, module);
    at += header + bytes;
  }
}

struct Kernels {
  std::map<const void*, cudaKernel_t> by_function;
  std::set<const void*> all;
};

Kernels& kernels() {
  static auto& k = *new Kernels();
  return k;
}

/// The kernel of a host function or a handle; null, said, for any other address.
cudaKernel_t find_kernel(const void* function, const char* call) {
  const std::lock_guard lock(mutex());
  if (kernels().all.contains(function)) return static_cast<cudaKernel_t>(const_cast<void*>(function));
  const auto found = kernels().by_function.find(function);
  if (found != kernels().by_function.end()) return found->second;
  say_refusal(fmt::format("{}: {:p} is no kernel", call, function));
  return nullptr;
}

std::string readable(const char* mangled) {
  int status = 0;
  char* text = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  std::string name = status == 0 ? text : mangled;
  std::free(text);
  return name;
}

bool is_mapped(std::uintptr_t address) {
  constexpr std::uintptr_t page = 4096;
  return msync(reinterpret_cast<void*>(address / page * page), 1, MS_ASYNC) == 0 || errno != ENOMEM;
}

/// Whether 8 bytes of an argument are an address that the device cannot use. In a struct they may as well be a number
/// beside padding that holds half of some old address, so there only what is near the devices' allocations, or mapped
/// and aligned as host data is, counts.
bool is_wrong_address(std::uintptr_t word, bool in_struct) {
  // A small number with zeros above it is no address: programs and their heaps are mapped higher.
  constexpr std::uintptr_t lowest = std::uintptr_t{1} << 32, highest = std::uintptr_t{1} << 47;
  if (word < lowest || word >= highest) return false;
  const auto* address = reinterpret_cast<const void*>(word);
  // Half of an allocation's address above a small number, where allocations begin at multiples of 4 GiB.
  const auto low = static_cast<std::uint32_t>(word);
  const bool is_number = in_struct && low > 0 && low < 4096 && device_of(address) < 0;
  if (is_on_device(address)) {
    return device_of(address) != current_device() && !is_number && (!in_struct || was_ever_used(address));
  }
  return !is_page_locked(address) && (!in_struct || word % sizeof(float) == 0) && is_mapped(word);
}

/// Whether each parameter of a function, as its readable name lists them, is a pointer to constants.
std::vector<bool> pointers_to_constants(std::string_view name) {
  std::vector<bool> all;
  const std::size_t end = name.rfind(')');
  if (end == std::string_view::npos) return all;
  int depth = 0;
  std::size_t last = end;  // of the parameter that is looked at, which reads backward
  for (std::size_t i = end + 1; i-- > 0;) {
    const char c = name[i];
    if (c == ')' || c == '>' || c == '}') ++depth;
    if (c == '(' || c == '<' || c == '{') --depth;
    if ((depth == 1 && c == ',') || depth == 0) {
      all.push_back(name.substr(i + 1, last - i - 1).ends_with("const*"));
      last = i;
    }
    if (depth == 0) break;
  }
  std::reverse(all.begin(), all.end());
  return all;
}

/// False, said, where an argument is wrong. Every address among the arguments that is on a device is a use of its first
/// byte.
bool may_use_arguments(const CUkern_st& kernel, void** arguments, std::vector<Use>& uses) {
  constexpr std::size_t step = sizeof(std::uintptr_t);
  for (const auto& [position, parameter] : kernel.properties.parameters) {
    const auto* value = static_cast<const std::byte*>(arguments[position]);
    for (std::size_t i = 0; i + step <= parameter.bytes; i += step) {
      const auto word = read<std::uintptr_t>(value + i);
      const auto* address = reinterpret_cast<const void*>(word);
      if (!is_wrong_address(word, parameter.bytes > step)) {
        const bool only_reads = position < kernel.reads.size() && kernel.reads[position];
        if (is_on_device(address)) uses.push_back({address, 1, only_reads ? Access::read : Access::unknown});
        continue;
      }
      say_refusal(fmt::format("launch of {}: parameter {}, byte {}, is {:p}: {}", kernel.name, position, i, address,
                              describe(address)));
      return false;
    }
  }
  return true;
}

cudaError_t launch(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, std::size_t dynamic,
                   std::array<unsigned, 3> cluster, cudaStream_t stream) {
  if (kernel == nullptr) return finish(cudaErrorInvalidDeviceFunction);
  const Properties& p = kernel->properties;
  const std::string call = "launch of " + kernel->name;
  if (logs()) {
    fmt::print(stderr, "CUDA stand-in: {} <<<[{}, {}, {}], [{}, {}, {}], {}>>>\n", kernel->name, grid.x, grid.y, grid.z,
               block.x, block.y, block.z, dynamic);
  }
  if (!is_stream_of_current_device(stream, call.c_str())) return finish(cudaErrorInvalidResourceHandle);
  if (!kernel->is_known) {
    return finish(refuse(cudaErrorNoKernelImageForDevice, "{}: its machine code was not found", call));
  }
  const std::size_t threads = std::size_t{block.x} * block.y * block.z;
  const bool grid_fits =
      grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= 0x7fffffff && grid.y <= 65535 && grid.z <= 65535;
  if (!grid_fits || threads == 0 || threads > p.most_threads || block.z > 64) {
    return finish(refuse(cudaErrorInvalidConfiguration,
                         "{}: grid [{}, {}, {}] of blocks [{}, {}, {}], of at most {} "
                         "threads",
                         call, grid.x, grid.y, grid.z, block.x, block.y, block.z, p.most_threads));
  }
  const std::size_t warps = (threads + 31) / 32, registers = (p.registers + 7) / 8 * 8 * 32 * warps;
  if (registers > registers_of_a_block) {
    return finish(refuse(cudaErrorLaunchOutOfResources, "{}: {} threads of {} registers", call, threads, p.registers));
  }
  const std::size_t most = std::max(kernel->most_dynamic, default_shared - std::min(default_shared, p.static_shared));
  if (dynamic > most) {
    return finish(refuse(cudaErrorInvalidValue, "{}: {} bytes of shared memory, at most {}", call, dynamic, most));
  }
  const unsigned blocks = cluster[0] * cluster[1] * cluster[2];
  if (blocks == 0 || blocks > (kernel->any_cluster ? 16u : 8u) || grid.x % cluster[0] != 0 ||
      grid.y % cluster[1] != 0 || grid.z % cluster[2] != 0) {
    return finish(refuse(cudaErrorInvalidClusterSize, "{}: clusters of [{}, {}, {}] in a grid of [{}, {}, {}]", call,
                         cluster[0], cluster[1], cluster[2], grid.x, grid.y, grid.z));
  }
  std::vector<Use> uses;
  if (!may_use_arguments(*kernel, arguments, uses)) return finish(cudaErrorIllegalAddress);
  return queue(kernel->name.c_str(), stream, uses, Work::kernel) ? cudaSuccess : finish(cudaErrorLaunchFailure);
}

struct Configuration {
  dim3 grid, block;
  std::size_t shared;
  cudaStream_t stream;
};

/// Between <<<...>>> and the launch that follows it.
std::vector<Configuration>& pushed() {
  thread_local std::vector<Configuration> all;
  return all;
}

cudaError_t set_attribute(cudaKernel_t kernel, cudaFuncAttribute attribute, int value) {
  if (kernel == nullptr) return finish(cudaErrorInvalidDeviceFunction);
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || static_cast<std::size_t>(value) + kernel->properties.static_shared > most_shared) {
      return finish(refuse(cudaErrorInvalidValue,
                           "cudaFuncSetAttribute of {}: {} bytes of shared memory beside {} "
                           "static ones",
                           kernel->name, value, kernel->properties.static_shared));
    }
    kernel->most_dynamic = static_cast<std::size_t>(value);
  } else if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    kernel->any_cluster = value != 0;
  }
  return cudaSuccess;
}

int blocks_of_a_multiprocessor(const Properties& p, int threads, std::size_t dynamic) {
  if (threads <= 0 || static_cast<unsigned>(threads) > p.most_threads) return 0;
  const int warps = (threads + 31) / 32;
  const int registers = static_cast<int>((p.registers + 7) / 8 * 8) * 32 * warps;
  const std::size_t shared = p.static_shared + dynamic + system_shared;
  int blocks = std::min(32, 64 / warps);
  if (registers > 0) blocks = std::min(blocks, static_cast<int>(registers_of_a_block) / registers);
  return std::min(blocks, static_cast<int>((std::size_t{228} << 10) / shared));
}

/// Of a launch; the kernel's own where the launch names none.
std::array<unsigned, 3> cluster_of(cudaKernel_t kernel, const cudaLaunchConfig_t& config) {
  std::array<unsigned, 3> cluster = kernel ? kernel->properties.cluster : std::array{1u, 1u, 1u};
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& a = config.attrs[i];
    if (a.id == cudaLaunchAttributeClusterDimension) {
      cluster = {a.val.clusterDim.x, a.val.clusterDim.y, a.val.clusterDim.z};
    }
  }
  return cluster;
}

}  // namespace
}  // namespace deltapipe::stand_in

using namespace deltapipe::stand_in;

// What nvcc's code calls when a program starts.

STAND_IN void** __cudaRegisterFatBinary(void* wrapper) {
  struct Wrapper {
    int magic, version;
    const std::byte* binary;
    void* more;
  };
  const std::lock_guard lock(mutex());
  auto* module = new Module();
  read_fat_binary(static_cast<const Wrapper*>(wrapper)->binary, *module);
  return reinterpret_cast<void**>(module);
}
STAND_IN void __cudaRegisterFatBinaryEnd(void**) {}
STAND_IN void __cudaUnregisterFatBinary(void**) {}  // kernels stay: the process is ending
STAND_IN char __cudaInitModule(void**) { return 1; }
STAND_IN void __cudaRegisterVar(void**, char*, char*, const char*, int, std::size_t, int, int) {}
STAND_IN void __cudaRegisterFunction(void** handle, const char* function, char*, const char* name, int, uint3*, uint3*,
                                     dim3*, dim3*, int*) {
  const std::lock_guard lock(mutex());
  const auto* module = reinterpret_cast<const Module*>(handle);
  auto* kernel = new CUkern_st{.name = readable(name), .properties = {}, .reads = {}};
  kernel->reads = pointers_to_constants(kernel->name);
  const auto found = module->kernels.find(std::string_view(name));
  if (found != module->kernels.end()) {
    kernel->properties = found->second;
    kernel->is_known = true;
  }
  kernels().by_function[function] = kernel;
  kernels().all.insert(kernel);
}

// Launches.

STAND_IN unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, std::size_t shared, CUstream_st* stream) {
  pushed().push_back({grid, block, shared, stream});
  return 0;
}
STAND_IN cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, std::size_t* shared, void* stream) {
  if (pushed().empty()) return finish(cudaErrorMissingConfiguration);
  const Configuration c = pushed().back();
  pushed().pop_back();
  *grid = c.grid;
  *block = c.block;
  *shared = c.shared;
  *static_cast<cudaStream_t*>(stream) = c.stream;
  return cudaSuccess;
}
STAND_IN cudaError_t __cudaGetKernel(cudaKernel_t* out, const void* function) {
  *out = find_kernel(function, "__cudaGetKernel");
  return *out != nullptr ? cudaSuccess : finish(cudaErrorInvalidDeviceFunction);
}
STAND_IN cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                                        std::size_t shared, cudaStream_t stream) {
  const cudaKernel_t known = find_kernel(kernel, "a launch");
  return launch(known, grid, block, arguments, shared, known ? known->properties.cluster : std::array{1u, 1u, 1u},
                stream);
}
STAND_IN cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, std::size_t shared,
                                      cudaStream_t stream) {
  return __cudaLaunchKernel(find_kernel(function, "cudaLaunchKernel"), grid, block, arguments, shared, stream);
}
STAND_IN cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  const cudaKernel_t kernel = find_kernel(function, "cudaLaunchKernelExC");
  return launch(kernel, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes,
                cluster_of(kernel, *config), config->stream);
}

/// Tensor maps, by which kernels move boxes: the driver's checks of those of bfloat16, and that the tensor is device
/// memory. What they hold stays empty.
static CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* tensor,
                             const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                             const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                             CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const std::lock_guard lock(mutex());
  constexpr const char* call = "cuTensorMapEncodeTiled";
  if (type != CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || rank < 1 || rank > 5) {
    return refuse(CUDA_ERROR_INVALID_VALUE, "{}: not a bfloat16 tensor of 1 to 5 dimensions", call);
  }
  std::size_t bytes = 2 * sizes[0];
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (sizes[i] < 1 || box[i] < 1 || box[i] > 256 || steps[i] < 1) {
      return refuse(CUDA_ERROR_INVALID_VALUE, "{}: size {} and box {} of dimension {}", call, sizes[i], box[i], i);
    }
    if (i == 0) continue;
    if (strides[i - 1] % 16 != 0) {
      return refuse(CUDA_ERROR_INVALID_VALUE, "{}: {} bytes to the next of dimension {}", call, strides[i - 1], i);
    }
    bytes += (sizes[i] - 1) * strides[i - 1];
  }
  if (reinterpret_cast<std::uintptr_t>(tensor) % 16 != 0 ||
      (swizzle == CU_TENSOR_MAP_SWIZZLE_128B && 2 * box[0] > 128)) {
    return refuse(CUDA_ERROR_INVALID_VALUE, "{}: an address of {}, boxes {} wide", call, describe(tensor), box[0]);
  }
  if (!is_device_range(tensor, bytes, call)) return CUDA_ERROR_INVALID_VALUE;
  *map = {};
  return CUDA_SUCCESS;
}
STAND_IN cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                      cudaDriverEntryPointQueryResult* found) {
  const bool known = std::string_view(name) == "cuTensorMapEncodeTiled";
  *function = known ? reinterpret_cast<void*>(&encode_tiled) : nullptr;
  if (found != nullptr) *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

STAND_IN cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  return set_attribute(find_kernel(function, "cudaFuncSetAttribute"), attribute, value);
}
STAND_IN cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t kernel, cudaFuncAttribute attribute, int value, int) {
  return set_attribute(find_kernel(kernel, "cudaKernelSetAttributeForDevice"), attribute, value);
}
STAND_IN cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void* function) {
  const cudaKernel_t kernel = find_kernel(function, "cudaFuncGetAttributes");
  if (kernel == nullptr) return finish(cudaErrorInvalidDeviceFunction);
  cudaFuncAttributes a{};
  a.sharedSizeBytes = kernel->properties.static_shared;
  a.numRegs = static_cast<int>(kernel->properties.registers);
  a.maxThreadsPerBlock = static_cast<int>(kernel->properties.most_threads);
  a.maxDynamicSharedSizeBytes = static_cast<int>(kernel->most_dynamic);
  a.ptxVersion = a.binaryVersion = 90;
  *out = a;
  return cudaSuccess;
}
STAND_IN cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function,
                                                                            int threads, std::size_t shared, unsigned) {
  const cudaKernel_t kernel = find_kernel(function, "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  if (kernel == nullptr) return finish(cudaErrorInvalidDeviceFunction);
  *blocks = blocks_of_a_multiprocessor(kernel->properties, threads, shared);
  return cudaSuccess;
}
STAND_IN cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads,
                                                                   std::size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}
STAND_IN cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* function,
                                                    const cudaLaunchConfig_t* config) {
  const cudaKernel_t kernel = find_kernel(function, "cudaOccupancyMaxActiveClusters");
  if (kernel == nullptr) return finish(cudaErrorInvalidDeviceFunction);
  const auto [x, y, z] = cluster_of(kernel, *config);
  const int threads = static_cast<int>(config->blockDim.x * config->blockDim.y * config->blockDim.z);
  constexpr int multiprocessors = 132;
  *clusters = blocks_of_a_multiprocessor(kernel->properties, threads, config->dynamicSmemBytes) *
              (multiprocessors / std::max(1, static_cast<int>(x * y * z)));
  return cudaSuccess;
}
