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
#include <vector>

namespace deltapipe {

struct Parameter {
  ParameterSpec spec;
  Tensor value;                      // compute dtype; accumulation dtype where spec.keep_float32
  Tensor gradient_memory;            // accumulation dtype, the value's shape; empty when never trained
  std::int64_t gradient_offset = 0;  // first element in the table's flat gradients
  bool trainable = false;            // in the current stage

  /// Where a backward pass adds this weight's gradient; empty when it is frozen.
  Tensor gradient() const { return trainable ? gradient_memory : Tensor(); }
};

class ParameterTable {
 public:
  /// Takes room for every weight of `specs` from `arena`; values are uninitialised.
  ParameterTable(const std::vector<ParameterSpec>& specs, DType dtype, Arena& arena);

  /// Takes gradient room for the weights that `trained` selects: one flat tensor, whose size is a multiple of `shards`
  /// aligned parts, in which each gradient begins at an aligned element.
  void allocate_gradients(Arena& arena, const std::function<bool(const ParameterSpec&)>& trained,
                          std::int64_t shards = 1);
  /// All gradients [n], padding included; empty when nothing is trained.
  const Tensor& flat_gradients() const { return flat_gradients_; }
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
  std::deque<Parameter> list_;  // addresses stay valid: layers keep pointers
  std::unordered_map<std::string, Parameter*> by_name_;
};

}  // namespace deltapipe
