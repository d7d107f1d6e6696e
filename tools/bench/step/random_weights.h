// Weights for measurements: random ones, quickly.
#pragma once

#include "core/arena.h"
#include "core/stream.h"
#include "model/parameters.h"

#include <string_view>

namespace deltapipe::bench {

/// Numbers from N(0, std) in the memory of a stream's device: a block of 1,048,573 of them (a prime: rows do not
/// repeat) laid end to end.
class RandomBlock {
 public:
  RandomBlock(DType dtype, double std, const Stream& stream);
  /// From a place in the block that depends on the name. The block outlives what `stream` is given.
  void fill(const Tensor& x, std::string_view name) const;

 private:
  Stream stream_;
  Arena memory_;
  Tensor numbers_;
};

/// Matrices from N(0, 0.02), everything else (norms, gates, convolutions) as a student's first weights. The same on
/// every rank.
void fill_randomly(ParameterTable& parameters, const Stream& stream);

}  // namespace deltapipe::bench
