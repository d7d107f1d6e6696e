// Device memory and the checks of addresses.
#include "tests/gpu/stand_in/stand_in.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <memory>
#include <vector>

namespace deltapipe::stand_in {
namespace {

// Devices' addresses. No other mapping is put there, and a pair of 32-bit numbers beside each other in a kernel's
// arguments, read as one of 64 bits, does not look like one: the higher number would have to be in [10817, 10880),
// which leaves out all multiples of 64. Every device has 63 * 4 GiB, so that freed addresses are not used again at
// once.
constexpr std::uintptr_t first_address = 0x2a41'0000'0000;
constexpr std::uintptr_t device_stride = 0x40'0000'0000;
// What is behind them, as far away from all else: among the process's mappings it would make stray numbers look like
// host addresses.
constexpr std::uintptr_t first_address_behind = 0x3a41'0000'0000;
constexpr std::size_t device_span = 0x3f'0000'0000;
constexpr std::size_t page = 4096;
/// cudaMalloc promises this much and the stand-in gives no more: what needs more shows.
constexpr std::size_t alignment = 512;

struct Device {
  std::byte* memory = nullptr;              // what is behind the addresses; null until the first allocation
  std::map<std::size_t, std::size_t> live;  // offset -> bytes
  std::size_t used = 0;
  std::size_t next = page << 12, end = 0;  // where to look first, and the end of all that was ever used
};

std::vector<Device>& devices() {
  static auto& all = *new std::vector<Device>(static_cast<std::size_t>(device_count()));
  return all;
}

std::uintptr_t base_of(int device) { return first_address + static_cast<std::uintptr_t>(device) * device_stride; }

/// -1 for an address outside of all devices.
int range_of(std::uintptr_t address) {
  if (address < first_address) return -1;
  const std::uintptr_t device = (address - first_address) / device_stride;
  return device < static_cast<std::uintptr_t>(device_count()) ? static_cast<int>(device) : -1;
}

struct Place {
  int device = -1;
  std::size_t offset = 0, begin = 0, bytes = 0;  // of the address and the allocation; bytes 0: none
};

/// The allocation that the address lies in, or is the end of.
Place find(const void* p) {
  const auto address = reinterpret_cast<std::uintptr_t>(p);
  Place place{.device = range_of(address)};
  if (place.device < 0) return place;
  place.offset = address - base_of(place.device);
  const auto& live = devices()[static_cast<std::size_t>(place.device)].live;
  const auto after = live.upper_bound(place.offset);
  if (after == live.begin()) return place;
  const auto [begin, bytes] = *std::prev(after);
  if (place.offset <= begin + bytes) {
    place.begin = begin;
    place.bytes = bytes;
  }
  return place;
}

struct sigaction& handler_before() {
  static struct sigaction before {};
  return before;
}

void on_fault(int signal, siginfo_t* information, void* context) {
  if (range_of(reinterpret_cast<std::uintptr_t>(information->si_addr)) >= 0) {
    // The process ends here; memory that malloc guards may be in use, which at worst ends it without the line.
    say_refusal(fmt::format("the host touches {:p}: {}", information->si_addr, describe(information->si_addr)));
    struct sigaction as_usual {};
    as_usual.sa_handler = SIG_DFL;
    sigaction(signal, &as_usual, nullptr);
    return;  // faults again
  }
  const struct sigaction& before = handler_before();
  if ((before.sa_flags & SA_SIGINFO) != 0) {
    before.sa_sigaction(signal, information, context);
  } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
    before.sa_handler(signal);
  } else {
    sigaction(signal, &before, nullptr);  // faults again
  }
}

void reserve(Device& device, std::uintptr_t base) {
  void* addresses = mmap(reinterpret_cast<void*>(base), device_span, PROT_NONE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
  void* memory = mmap(nullptr, device_span, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (addresses != reinterpret_cast<void*>(base) || memory == MAP_FAILED) {
    fmt::print(stderr, "CUDA stand-in: cannot reserve {} bytes of addresses: {}\n", device_span, std::strerror(errno));
    std::abort();
  }
  device.memory = static_cast<std::byte*>(memory);
  static const bool is_installed = [] {
    struct sigaction action {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO;
    return sigaction(SIGSEGV, &action, &handler_before()) == 0;
  }();
  (void)is_installed;
}

std::size_t whole_pages(std::size_t bytes) { return (bytes + alignment + page - 1) / page * page; }

/// The lowest offset from `from` on where the pages are free; device_span when there is none.
std::size_t find_room(const Device& device, std::size_t pages, std::size_t from) {
  std::size_t at = from;
  for (auto i = device.live.lower_bound(from); i != device.live.end(); ++i) {
    const std::size_t begin = i->first - alignment;
    if (at + pages <= begin) return at;
    at = std::max(at, begin + whole_pages(i->second));
  }
  return at + pages <= device_span ? at : device_span;
}

}  // namespace

std::size_t bytes_of_a_device() {
  static const auto bytes =
      std::min(static_cast<std::size_t>(setting("DELTAPIPE_STAND_IN_GIB", 79)) << 30, device_span);
  return bytes;
}

void* allocate_on(int index, std::size_t bytes) {
  const std::lock_guard lock(mutex());
  Device& device = devices()[static_cast<std::size_t>(index)];
  if (device.memory == nullptr) reserve(device, base_of(index));
  if (bytes > bytes_of_a_device() || device.used + bytes > bytes_of_a_device()) return nullptr;
  // An unused page after each, so that the end of one is not the begin of the next.
  const std::size_t pages = whole_pages(bytes) + page;
  std::size_t at = find_room(device, pages, device.next);
  if (at == device_span) at = find_room(device, pages, Device{}.next);
  if (at == device_span) return nullptr;
  device.next = at + pages;
  device.end = std::max(device.end, at + pages);
  device.used += bytes;
  device.live.emplace(at + alignment, bytes);
  static const bool is_poisoned = setting("DELTAPIPE_STAND_IN_POISON", 0) != 0;
  if (is_poisoned) std::memset(device.memory + at + alignment, 0xff, bytes);
  return reinterpret_cast<void*>(base_of(index) + at + alignment);
}

bool release(const void* memory) {
  const std::lock_guard lock(mutex());
  const Place place = find(memory);
  if (place.device < 0 || place.bytes == 0 || place.offset != place.begin) return false;
  Device& device = devices()[static_cast<std::size_t>(place.device)];
  device.used -= place.bytes;
  device.live.erase(place.begin);
  madvise(device.memory + place.begin - alignment, whole_pages(place.bytes), MADV_DONTNEED);  // zeros when used again
  return true;
}

std::size_t bytes_free(int index) {
  const std::lock_guard lock(mutex());
  return bytes_of_a_device() - devices()[static_cast<std::size_t>(index)].used;
}

bool is_on_device(const void* address) { return range_of(reinterpret_cast<std::uintptr_t>(address)) >= 0; }

bool was_ever_used(const void* address) {
  const std::lock_guard lock(mutex());
  const Place place = find(address);
  return place.device >= 0 && place.offset >= Device{}.next &&
         place.offset < devices()[static_cast<std::size_t>(place.device)].end;
}

int device_of(const void* address) {
  const std::lock_guard lock(mutex());
  const Place place = find(address);
  return place.bytes > 0 ? place.device : -1;
}

std::byte* behind(const void* p) {
  const int device = range_of(reinterpret_cast<std::uintptr_t>(p));
  if (device < 0) return static_cast<std::byte*>(const_cast<void*>(p));
  const std::lock_guard lock(mutex());
  return devices()[static_cast<std::size_t>(device)].memory + (reinterpret_cast<std::uintptr_t>(p) - base_of(device));
}

void fill(void* memory, int value, std::size_t bytes) {
  std::byte* begin = behind(memory);
  std::byte* const end = begin + bytes;
  const auto up = reinterpret_cast<std::uintptr_t>(begin) % page;
  std::byte* const first = up == 0 ? begin : begin + (page - up);
  if (value != 0 || first + page > end) {
    std::memset(begin, value, bytes);
    return;
  }
  // Whole pages of zeros are the system's: a job's memory may be larger than the machine's.
  const std::size_t whole = static_cast<std::size_t>(end - first) / page * page;
  madvise(first, whole, MADV_DONTNEED);
  std::memset(begin, 0, static_cast<std::size_t>(first - begin));
  std::memset(first + whole, 0, static_cast<std::size_t>(end - first) - whole);
}

std::string describe(const void* address) {
  if (address == nullptr) return "null";
  const std::lock_guard lock(mutex());
  const Place place = find(address);
  if (place.device < 0) return "host memory";
  if (place.bytes == 0) return fmt::format("memory of device {} that is not allocated", place.device);
  return fmt::format("device {}, {} bytes into an allocation of {}", place.device, place.offset - place.begin,
                     place.bytes);
}

bool is_device_range(const void* begin, std::size_t bytes, const std::string& what) {
  if (bytes == 0) return true;
  const std::lock_guard lock(mutex());
  const Place place = find(begin);
  if (place.bytes > 0 && place.offset + bytes <= place.begin + place.bytes) return true;
  say_refusal(fmt::format("{}: {} bytes from {:p} on must be device memory: {}", what, bytes, begin, describe(begin)));
  return false;
}

bool is_host_range(const void* begin, std::size_t bytes, const std::string& what) {
  if (bytes == 0) return true;
  const auto* last = static_cast<const std::byte*>(begin) + bytes - 1;
  if (begin != nullptr && !is_on_device(begin) && !is_on_device(last)) return true;
  say_refusal(fmt::format("{}: {} bytes from {:p} on must be host memory: {}", what, bytes, begin, describe(begin)));
  return false;
}

}  // namespace deltapipe::stand_in
