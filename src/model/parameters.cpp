#include "model/parameters.h"

#include "core/error.h"
#include "core/stream.h"
#include "kernels/elementwise.h"

namespace deltapipe {

ParameterTable::ParameterTable(const std::vector<ParameterSpec>& specs, DType dtype, Arena& arena) : dtype_(dtype) {
  for (const ParameterSpec& spec : specs) {
    const DType stored = spec.keep_float32 ? accumulation_dtype(dtype) : dtype;
    Parameter& p = list_.emplace_back();
    p.spec = spec;
    p.value = arena.allocate(stored, spec.shape, spec.name.c_str());
    by_name_.emplace(spec.name, &list_.back());
  }
}

void ParameterTable::allocate_gradients(Arena& arena, const std::function<bool(const ParameterSpec&)>& trained,
                                        std::int64_t shards) {
  constexpr std::int64_t alignment = 64;  // elements: no two gradients share a cache line or a vector load
  const auto align = [](std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; };
  std::int64_t total = 0;
  for (Parameter& p : list_) {
    if (!trained(p.spec)) continue;
    p.gradient_offset = total;
    total += align(p.spec.shape.numel(), alignment);
  }
  if (total == 0) return;
  const DType dtype = accumulation_dtype(dtype_);
  flat_gradients_ = arena.allocate(dtype, {align(total, alignment * shards)}, "gradients");
  for (Parameter& p : list_) {
    if (!trained(p.spec)) continue;
    const std::int64_t n = p.spec.shape.numel();
    p.gradient_memory = flat_gradients_.rows(p.gradient_offset, p.gradient_offset + n).view(p.spec.shape);
  }
}

void ParameterTable::zero_gradients(const Stream& stream) {
  if (flat_gradients_) kernels::fill_zero(stream, flat_gradients_);
}

const Parameter* ParameterTable::find(std::string_view name) const {
  const auto it = by_name_.find(std::string(name));
  return it == by_name_.end() ? nullptr : it->second;
}

const Parameter& ParameterTable::at(std::string_view name) const {
  const Parameter* p = find(name);
  if (p == nullptr) fail<InternalError>("model has no parameter {}", name);
  return *p;
}

Parameter& ParameterTable::at(std::string_view name) {
  return const_cast<Parameter&>(static_cast<const ParameterTable&>(*this).at(name));
}

}  // namespace deltapipe
