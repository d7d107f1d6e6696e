#include "kernels/embedding.h"

#include "kernels/cpu/common.h"

#include <algorithm>

namespace deltapipe::kernels::cpu {
namespace {

void check_token(std::int32_t token, std::int64_t t, std::int64_t n, const char* what) {
  if (token < 0 || token >= n) {
    fail<InternalError>("{}: token {} at index {} is outside the table of {} rows", what, token, t, n);
  }
}

}  // namespace

void embedding_forward(const Stream&, const Tensor& tokens, const Tensor& table, const Tensor& out) {
  for_real(table.dtype, "embedding_forward", [&]<class T>() {
    const std::int64_t n = table.dim(0), d = table.dim(1);
    const auto* pt = tokens.as<std::int32_t>();
    const T* rows = table.as<T>();
    T* po = out.as<T>();
    parallel_blocks(tokens.dim(0), rows_per_task(d), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t t = begin; t < end; ++t) {
        check_token(pt[t], t, n, "embedding_forward");
        std::copy_n(rows + pt[t] * d, d, po + t * d);
      }
    });
  });
}

void embedding_backward(const Stream&, const Tensor& dout, const Tensor& tokens, const Tensor& dtable) {
  for_real(dout.dtype, "embedding_backward", [&]<class T>() {
    const std::int64_t n = dtable.dim(0), d = dtable.dim(1), length = tokens.dim(0);
    const auto* pt = tokens.as<std::int32_t>();
    const T* g = dout.as<T>();
    T* rows = dtable.as<T>();
    for (std::int64_t t = 0; t < length; ++t) check_token(pt[t], t, n, "embedding_backward");
    // Columns are split over tasks, so that each element of the table has one owner, which adds in token order.
    parallel_blocks(d, 64, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t t = 0; t < length; ++t) axpy(T(1), g + t * d + begin, rows + pt[t] * d + begin, end - begin);
    });
  });
}

}  // namespace deltapipe::kernels::cpu
