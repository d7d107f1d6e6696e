#include "tests/train/count_allocations.h"

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <new>

namespace {

std::atomic<std::int64_t> count{0};

}  // namespace

#if !defined(__SANITIZE_ADDRESS__)  // a sanitizer's malloc cannot be replaced

// The program's own malloc stands before the C library's, for every library that it loads.
extern "C" {
extern const char __executable_start, etext;  // from the linker: where the executable's code lies

void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);

static void count_own(const void* caller) {
  if (caller >= &__executable_start && caller < &etext) ++count;
}

void* malloc(std::size_t n) noexcept {
  count_own(__builtin_return_address(0));
  return __libc_malloc(n);
}
void* calloc(std::size_t n, std::size_t size) noexcept {
  count_own(__builtin_return_address(0));
  return __libc_calloc(n, size);
}
void* realloc(void* p, std::size_t n) noexcept {
  count_own(__builtin_return_address(0));
  return __libc_realloc(p, n);
}
void* aligned_alloc(std::size_t alignment, std::size_t n) noexcept {
  count_own(__builtin_return_address(0));
  return __libc_memalign(alignment, n);
}
int posix_memalign(void** p, std::size_t alignment, std::size_t n) noexcept {
  count_own(__builtin_return_address(0));
  *p = __libc_memalign(alignment, n);
  return *p == nullptr ? ENOMEM : 0;
}
}

namespace {

void* take(std::size_t n) { return __libc_malloc(n); }
void* take(std::size_t n, std::align_val_t alignment) {
  return __libc_memalign(static_cast<std::size_t>(alignment), n);
}

}  // namespace

#else

namespace {

void* take(std::size_t n) { return std::malloc(n); }
void* take(std::size_t n, std::align_val_t alignment) {
  const auto a = static_cast<std::size_t>(alignment);
  return std::aligned_alloc(a, (n + a - 1) / a * a);
}

}  // namespace

#endif

namespace {

template <class... Alignment>
void* counted(std::size_t n, Alignment... alignment) {
  ++count;
  if (void* p = take(n == 0 ? 1 : n, alignment...)) return p;
  throw std::bad_alloc();
}

}  // namespace

void* operator new(std::size_t n) { return counted(n); }
void* operator new[](std::size_t n) { return counted(n); }
void* operator new(std::size_t n, std::align_val_t a) { return counted(n, a); }
void* operator new[](std::size_t n, std::align_val_t a) { return counted(n, a); }
void* operator new(std::size_t n, const std::nothrow_t&) noexcept { return ++count, take(n == 0 ? 1 : n); }
void* operator new[](std::size_t n, const std::nothrow_t&) noexcept { return ++count, take(n == 0 ? 1 : n); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete[](void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, const std::nothrow_t&) noexcept { std::free(p); }
void operator delete[](void* p, const std::nothrow_t&) noexcept { std::free(p); }

namespace deltapipe::testing {

std::int64_t heap_allocations() { return count.load(); }

}  // namespace deltapipe::testing
