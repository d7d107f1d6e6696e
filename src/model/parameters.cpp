#include "model/parameters.h"

#include "core/error.h"
#include "core/stream.h"
#include "kernels/elementwise.h"

namespace deltapipe {

std::pair<std::int64_t, std::int64_t> GradientBucket::shard(int index, int count) const {
  require((end - begin) % count == 0, "GradientBucket: gradients were allocated for another number of shards");
  const std::int64_t part = (end - begin) / count;
  return {begin + index * part, begin + (index + 1) * part};
}

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
  std::int64_t next = 0;
  for (Parameter& p : list_) {
    if (!trained(p.spec)) continue;
    if (buckets_.empty() || buckets_.back().layer != p.spec.layer) {
      next = buckets_.empty() ? 0 : buckets_.back().end;
      buckets_.push_back({p.spec.layer, next, next});
    }
    GradientBucket& bucket = buckets_.back();
    p.bucket = buckets_.size() - 1;
    p.gradient_offset = next;
    next += align(p.spec.shape.numel(), alignment);
    bucket.end = bucket.begin + align(next - bucket.begin, alignment * shards);
  }
  if (buckets_.empty()) return;
  const DType dtype = accumulation_dtype(dtype_);
  flat_gradients_ = arena.allocate(dtype, {buckets_.back().end}, "gradients");
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
