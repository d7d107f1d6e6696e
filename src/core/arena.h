// Arena: one named block of memory, handed out from the bottom up. Sizes are known before the first allocation: a
// measuring arena hands out addresses that are never touched and records its peak; a real one of that size follows.
#pragma once

#include "core/tensor.h"

#include <cstddef>
#include <string>

namespace deltapipe {

class Arena {
 public:
  static constexpr std::size_t alignment = 256;  // bytes; a multiple of every vector load and cache line in use

  /// A measuring arena without memory: every allocation succeeds and must not be touched.
  static Arena measuring(std::string name, Device device = {});
  /// Takes `capacity` bytes of `device` now. Throws MemoryError that names the arena and size.
  Arena(std::string name, std::size_t capacity, Device device = {});
  /// Hands out `memory`, which another arena owns and which outlives this one.
  static Arena over(std::string name, const Tensor& memory);
  ~Arena();
  Arena(Arena&&) noexcept;
  Arena& operator=(Arena&&) noexcept;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  /// Page-locks a host arena, so that copies between it and CUDA devices run beside other work. Nothing for other
  /// arenas and on machines without a CUDA device. Throws MemoryError when the system refuses.
  void page_lock();

  /// Uninitialised memory, valid until the enclosing Scope ends (or for the arena's life). `label` names the tensor in
  /// errors. Throws MemoryError when the arena is full.
  Tensor allocate(DType dtype, const Shape& shape, const char* label);

  std::size_t used() const { return used_; }
  std::size_t peak() const { return peak_; }
  std::size_t capacity() const { return capacity_; }
  bool is_measuring() const { return measuring_; }
  const std::string& name() const { return name_; }
  Device device() const { return device_; }
  void reset() { used_ = 0; }

  /// Frees everything allocated since its construction. Scopes nest like blocks.
  class Scope {
   public:
    explicit Scope(Arena& arena) : arena_(arena), mark_(arena.used_) {}
    ~Scope() { arena_.used_ = mark_; }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Arena& arena_;
    std::size_t mark_;
  };
  [[nodiscard]] Scope scope() { return Scope(*this); }

 private:
  Arena(std::string name, Device device, bool measuring);
  void release();

  std::string name_;
  Device device_;
  bool measuring_ = false;
  bool owning_ = true;
  bool page_locked_ = false;
  std::byte* base_ = nullptr;
  std::size_t capacity_ = 0;
  std::size_t used_ = 0;
  std::size_t peak_ = 0;
};

}  // namespace deltapipe
