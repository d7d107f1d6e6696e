// NCCL without other ranks: communicators that are connected at once, groups, and checks of what messages read and
// write. What a rank would receive from itself it gets; what others would send leaves memory as it is.
#include "tests/gpu/stand_in/order.h"
#include "tests/gpu/stand_in/stand_in.h"

#include <nccl.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <random>
#include <set>

struct ncclComm {
  int ranks, rank, device;
  bool is_finalized = false;
};

namespace deltapipe::stand_in {
namespace {

std::set<const ncclComm*>& communicators() {
  static auto& all = *new std::set<const ncclComm*>();
  return all;
}

thread_local int open_groups = 0;

bool is_live(const ncclComm* comm, const char* call) {
  const std::lock_guard lock(mutex());
  if (communicators().contains(comm)) return true;
  say_refusal(fmt::format("{}: {:p} is no live communicator", call, static_cast<const void*>(comm)));
  return false;
}

std::size_t size_of(ncclDataType_t type) {
  switch (type) {
    case ncclInt8:
    case ncclUint8:
    case ncclFloat8e4m3:
    case ncclFloat8e5m2: return 1;
    case ncclFloat16:
    case ncclBfloat16: return 2;
    case ncclInt32:
    case ncclUint32:
    case ncclFloat32: return 4;
    case ncclInt64:
    case ncclUint64:
    case ncclFloat64: return 8;
    default: return 0;
  }
}

/// The part of every operation: communicator, stream, type.
bool may_run(const char* call, const ncclComm* comm, ncclDataType_t type, cudaStream_t stream) {
  if (!is_live(comm, call) || !is_stream(stream, call)) return false;
  if (comm->is_finalized) {
    say_refusal(fmt::format("{}: the communicator is finalized", call));
    return false;
  }
  if (size_of(type) == 0) {
    say_refusal(fmt::format("{}: {} is no type", call, static_cast<int>(type)));
    return false;
  }
  return true;
}

bool is_memory(const char* call, const char* name, const ncclComm* comm, const void* memory, std::size_t bytes) {
  const std::string what = fmt::format("{}: {}", call, name);
  if (!is_device_range(memory, bytes, what)) return false;
  if (bytes == 0 || device_of(memory) == comm->device) return true;
  say_refusal(
      fmt::format("{}: memory of device {}, the communicator is of device {}", what, device_of(memory), comm->device));
  return false;
}

bool is_peer(const char* call, const ncclComm* comm, int peer) {
  if (peer >= 0 && peer < comm->ranks) return true;
  say_refusal(fmt::format("{}: rank {} of {}", call, peer, comm->ranks));
  return false;
}

ncclResult_t give(const char* call, cudaStream_t stream, std::initializer_list<Use> uses) {
  return queue(call, stream, {uses.begin(), uses.size()}, Work::transfer) ? ncclSuccess : ncclUnhandledCudaError;
}

void move(void* to, const void* from, std::size_t bytes) {
  if (bytes > 0 && to != from) std::memmove(behind(to), behind(from), bytes);
}

}  // namespace
}  // namespace deltapipe::stand_in

using namespace deltapipe::stand_in;

STAND_IN const char* ncclGetErrorString(ncclResult_t result) {
  switch (result) {
    case ncclSuccess: return "no error";
    case ncclInProgress: return "in progress";
    case ncclInvalidArgument: return with_refusal("invalid argument");
    case ncclUnhandledCudaError: return with_refusal("unhandled cuda error");
    default: return with_refusal("invalid usage");
  }
}
STAND_IN ncclResult_t ncclGetVersion(int* version) {
  *version = NCCL_VERSION_CODE;
  return ncclSuccess;
}
STAND_IN ncclResult_t ncclGetUniqueId(ncclUniqueId* out) {
  static std::atomic<std::uint64_t> made = 0;
  const std::uint64_t words[] = {static_cast<std::uint64_t>(getpid()), ++made, std::random_device{}()};
  std::memset(out, 0, sizeof *out);
  std::memcpy(out->internal, words, sizeof words);
  return ncclSuccess;
}
STAND_IN ncclResult_t ncclCommInitRankConfig(ncclComm_t* out, int ranks, ncclUniqueId id, int rank,
                                             ncclConfig_t* config) {
  constexpr const char* call = "ncclCommInitRankConfig";
  if (ranks < 1 || rank < 0 || rank >= ranks) {
    return refuse(ncclInvalidArgument, "{}: rank {} of {}", call, rank, ranks);
  }
  constexpr unsigned magic = 0xcafebeef;
  if (config != nullptr && config->magic != magic) {
    return refuse(ncclInvalidArgument, "{}: a config that was not initialized", call);
  }
  static const ncclUniqueId none{};
  if (std::memcmp(&id, &none, sizeof id) == 0) return refuse(ncclInvalidArgument, "{}: an empty id", call);
  const std::lock_guard lock(mutex());
  *out = new ncclComm{ranks, rank, current_device()};
  communicators().insert(*out);
  return ncclSuccess;
}
STAND_IN ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
  if (!is_live(comm, "ncclCommGetAsyncError")) return ncclInvalidArgument;
  *error = ncclSuccess;
  return ncclSuccess;
}
STAND_IN ncclResult_t ncclCommFinalize(ncclComm_t comm) {
  if (!is_live(comm, "ncclCommFinalize")) return ncclInvalidArgument;
  comm->is_finalized = true;
  return ncclSuccess;
}
STAND_IN ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  const std::lock_guard lock(mutex());
  if (!is_live(comm, "ncclCommDestroy")) return ncclInvalidArgument;
  communicators().erase(comm);  // the object stays: its address is no other communicator's
  return ncclSuccess;
}
STAND_IN ncclResult_t ncclCommAbort(ncclComm_t comm) {
  const std::lock_guard lock(mutex());
  if (!is_live(comm, "ncclCommAbort")) return ncclInvalidArgument;
  communicators().erase(comm);
  return ncclSuccess;
}
STAND_IN ncclResult_t ncclCommCount(const ncclComm_t comm, int* ranks) {
  if (!is_live(comm, "ncclCommCount")) return ncclInvalidArgument;
  *ranks = comm->ranks;
  return ncclSuccess;
}
STAND_IN ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank) {
  if (!is_live(comm, "ncclCommUserRank")) return ncclInvalidArgument;
  *rank = comm->rank;
  return ncclSuccess;
}

STAND_IN ncclResult_t ncclGroupStart() {
  ++open_groups;
  return ncclSuccess;
}
STAND_IN ncclResult_t ncclGroupEnd() {
  if (open_groups == 0) return refuse(ncclInvalidUsage, "ncclGroupEnd: no group is open");
  --open_groups;
  return ncclSuccess;
}

STAND_IN ncclResult_t ncclSend(const void* memory, std::size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                               cudaStream_t stream) {
  constexpr const char* call = "ncclSend";
  const bool is_sound = may_run(call, comm, type, stream) && is_peer(call, comm, peer) &&
                        is_memory(call, "memory", comm, memory, count * size_of(type));
  return is_sound ? give(call, stream, {{memory, count * size_of(type), Access::read}}) : ncclInvalidArgument;
}
STAND_IN ncclResult_t ncclRecv(void* memory, std::size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                               cudaStream_t stream) {
  constexpr const char* call = "ncclRecv";
  const bool is_sound = may_run(call, comm, type, stream) && is_peer(call, comm, peer) &&
                        is_memory(call, "memory", comm, memory, count * size_of(type));
  return is_sound ? give(call, stream, {{memory, count * size_of(type), Access::write}}) : ncclInvalidArgument;
}
STAND_IN ncclResult_t ncclAllReduce(const void* from, void* to, std::size_t count, ncclDataType_t type, ncclRedOp_t,
                                    ncclComm_t comm, cudaStream_t stream) {
  constexpr const char* call = "ncclAllReduce";
  const std::size_t bytes = count * size_of(type);
  if (!may_run(call, comm, type, stream) || !is_memory(call, "source", comm, from, bytes) ||
      !is_memory(call, "target", comm, to, bytes)) {
    return ncclInvalidArgument;
  }
  const ncclResult_t given = give(call, stream, {{from, bytes, Access::read}, {to, bytes, Access::write}});
  if (given != ncclSuccess) return given;
  move(to, from, bytes);
  return ncclSuccess;
}
STAND_IN ncclResult_t ncclBroadcast(const void* from, void* to, std::size_t count, ncclDataType_t type, int root,
                                    ncclComm_t comm, cudaStream_t stream) {
  constexpr const char* call = "ncclBroadcast";
  const std::size_t bytes = count * size_of(type);
  if (!may_run(call, comm, type, stream) || !is_peer(call, comm, root) || !is_memory(call, "target", comm, to, bytes)) {
    return ncclInvalidArgument;
  }
  if (comm->rank != root) return give(call, stream, {{to, bytes, Access::write}});
  if (!is_memory(call, "source", comm, from, bytes)) return ncclInvalidArgument;
  const ncclResult_t given = give(call, stream, {{from, bytes, Access::read}, {to, bytes, Access::write}});
  if (given == ncclSuccess) move(to, from, bytes);
  return given;
}
STAND_IN ncclResult_t ncclAllGather(const void* from, void* to, std::size_t count, ncclDataType_t type, ncclComm_t comm,
                                    cudaStream_t stream) {
  constexpr const char* call = "ncclAllGather";
  const std::size_t bytes = count * size_of(type);
  if (!may_run(call, comm, type, stream) || !is_memory(call, "source", comm, from, bytes) ||
      !is_memory(call, "target", comm, to, bytes * static_cast<std::size_t>(comm->ranks))) {
    return ncclInvalidArgument;
  }
  const ncclResult_t given = give(
      call, stream, {{from, bytes, Access::read}, {to, bytes * static_cast<std::size_t>(comm->ranks), Access::write}});
  if (given != ncclSuccess) return given;
  move(static_cast<std::byte*>(to) + bytes * static_cast<std::size_t>(comm->rank), from, bytes);
  return ncclSuccess;
}
STAND_IN ncclResult_t ncclReduceScatter(const void* from, void* to, std::size_t count, ncclDataType_t type, ncclRedOp_t,
                                        ncclComm_t comm, cudaStream_t stream) {
  constexpr const char* call = "ncclReduceScatter";
  const std::size_t bytes = count * size_of(type);
  if (!may_run(call, comm, type, stream) ||
      !is_memory(call, "source", comm, from, bytes * static_cast<std::size_t>(comm->ranks)) ||
      !is_memory(call, "target", comm, to, bytes)) {
    return ncclInvalidArgument;
  }
  const ncclResult_t given = give(
      call, stream, {{from, bytes * static_cast<std::size_t>(comm->ranks), Access::read}, {to, bytes, Access::write}});
  if (given != ncclSuccess) return given;
  move(to, static_cast<const std::byte*>(from) + bytes * static_cast<std::size_t>(comm->rank), bytes);
  return ncclSuccess;
}
