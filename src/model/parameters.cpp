#include "model/parameters.h"

#include "core/error.h"
#include "core/stream.h"
#include "kernels/elementwise.h"

namespace deltapipe {

ParameterTable::ParameterTable(const std::vector<ParameterSpec>& specs, DType dtype, Arena& arena) : dtype_(dtype) {
  for (const ParameterSpec& spec : specs) {
    const DType stored = spec.keep_float32 ? accumulation_dtype(dtype) : dtype;
    list_.push_back({spec, arena.allocate(stored, spec.shape, spec.name.c_str()), {}, false});
    by_name_.emplace(spec.name, &list_.back());
  }
}

void ParameterTable::allocate_gradients(Arena& arena, const std::function<bool(const ParameterSpec&)>& trained) {
  for (Parameter& p : list_) {
    if (trained(p.spec)) {
      p.gradient_memory = arena.allocate(accumulation_dtype(p.value.dtype), p.spec.shape, p.spec.name.c_str());
    }
  }
}

void ParameterTable::zero_gradients(const Stream& stream) {
  for (const Parameter& p : list_) {
    if (p.gradient_memory) kernels::fill_zero(stream, p.gradient_memory);
  }
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
