// Linear layer y = x w^T + bias over tokens.
#pragma once

#include "kernels/linear.h"
#include "model/context.h"
#include "model/parameters.h"
#include "model/weight_tape.h"

namespace deltapipe {

class Linear {
 public:
  Linear() = default;
  explicit Linear(Parameter& weight, Parameter* bias = nullptr) : weight_(&weight), bias_(bias) {}

  std::int64_t inputs() const { return weight_->spec.shape[1]; }
  std::int64_t outputs() const { return weight_->spec.shape[0]; }

  /// x [M, I] -> y [M, O]; rows of y, and of dy below, may be longer (kernels/linear.h)
  void forward(const Context& c, const Tensor& x, const Tensor& y) const {
    kernels::linear_forward(c.stream, x, weight_->value, bias_ ? bias_->value : Tensor(), y);
  }
  /// dx [M, I] = (accumulate ? dx : 0) + dy w; the weight's gradient is added, or noted on c.tape, unless it is frozen.
  void backward(const Context& c, const Tensor& dy, const Tensor& x, const Tensor& dx, bool accumulate = false) const {
    kernels::linear_backward_input(c.stream, dy, weight_->value, dx, accumulate, c.workspace);
    if (c.tape == nullptr) {
      backward_weight(c, dy, x);
    } else if (weight_->trainable || (bias_ != nullptr && bias_->trainable)) {
      c.tape->add(c, *this, dy, x);
    }
  }
  void backward_weight(const Context& c, const Tensor& dy, const Tensor& x) const {
    const Tensor dw = weight_->gradient();
    const Tensor db = bias_ ? bias_->gradient() : Tensor();
    if (dw || db) kernels::linear_backward_weight(c.stream, dy, x, dw, db);
  }

 private:
  Parameter* weight_ = nullptr;
  Parameter* bias_ = nullptr;
};

}  // namespace deltapipe
