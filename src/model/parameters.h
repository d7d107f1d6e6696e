// ParameterTable: the weights of one model, or of the part of it that a rank holds, with their gradients.
#pragma once

#include "core/arena.h"
#include "core/tensor.h"
#include "model/spec.h"

#include <deque>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace deltapipe {

struct Parameter {
  ParameterSpec spec;
  Tensor value;                      // compute dtype; accumulation dtype where spec.keep_float32
  Tensor gradient_memory;            // accumulation dtype, the value's shape; empty when never trained
  std::int64_t gradient_offset = 0;  // first element in the table's flat gradients
  std::size_t bucket = 0;            // of ParameterTable::buckets(), where there is gradient memory
  bool trainable = false;            // in the current stage

  /// Where a backward pass adds this weight's gradient; empty when it is frozen.
  Tensor gradient() const { return trainable ? gradient_memory : Tensor(); }
};

/// Gradients that are complete at one moment of a backward pass: a layer's, the embedding's, those of final norm and
/// head. Ranks with the same layers sum them in one message and shard them in equal parts.
struct GradientBucket {
  std::int64_t layer = 0;           // ParameterSpec::layer of its parameters
  std::int64_t begin = 0, end = 0;  // elements of the table's flat gradients, padding included

  /// Part `index` of `count`, as elements of the flat gradients. `count` divides the shards that the table has room
  /// for.
  std::pair<std::int64_t, std::int64_t> shard(int index, int count) const;
};

inline constexpr std::int64_t embedding_layer = -1;  // ParameterSpec::layer of the embedding

/// Told of a layer (ParameterSpec::layer) whose gradients a backward pass has completed. May be empty.
using GradientsComplete = std::function<void(std::int64_t layer)>;

class ParameterTable {
 public:
  /// Takes room for every weight of `specs` from `arena`; values are uninitialised.
  ParameterTable(const std::vector<ParameterSpec>& specs, DType dtype, Arena& arena);

  /// Takes gradient room for the weights that `trained` selects: one flat tensor, in which each gradient begins at an
  /// aligned element and each bucket is a multiple of `shards` aligned parts.
  void allocate_gradients(Arena& arena, const std::function<bool(const ParameterSpec&)>& trained,
                          std::int64_t shards = 1);
  /// All gradients [n], padding included; empty when nothing is trained.
  const Tensor& flat_gradients() const { return flat_gradients_; }
  /// In the table's order; together they are the flat gradients.
  const std::vector<GradientBucket>& buckets() const { return buckets_; }
  void zero_gradients(const class Stream& stream);

  /// Throws InternalError when the table has no such weight.
  Parameter& at(std::string_view name);
  const Parameter& at(std::string_view name) const;
  const Parameter* find(std::string_view name) const;

  std::deque<Parameter>& all() { return list_; }
  const std::deque<Parameter>& all() const { return list_; }
  DType dtype() const { return dtype_; }

 private:
  DType dtype_;
  Tensor flat_gradients_;
  std::vector<GradientBucket> buckets_;
  std::deque<Parameter> list_;  // addresses stay valid: layers keep pointers
  std::unordered_map<std::string, Parameter*> by_name_;
};

}  // namespace deltapipe
