// The operations of kernels/*.h but KDA on plain device pointers, as adaptors (NAME.cpp) call them and .cu files define
// them. Every function queues its kernels on `stream` and returns the first launch error. Templates are instantiated
// for std::uint16_t (the bits of a bfloat16) and float, where "or double" is said for double too. Shapes, what may
// alias and formulas are those of the contracts. A pointer that a contract calls "may be empty" may be null.
//
// Work is cut by shapes alone and every sum has one order, so a call on the same input gives the same bits.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace deltapipe::kernels::cuda {

// Elementwise: n elements.

template <class T>  // or double
cudaError_t add(const T* a, const T* b, T* out, std::int64_t n, cudaStream_t stream);
template <class T>  // or double
cudaError_t scale_in_place(double factor, T* x, std::int64_t n, cudaStream_t stream);
/// Any two different types of the three.
template <class From, class To>
cudaError_t cast(const From* src, To* dst, std::int64_t n, cudaStream_t stream);
template <class T>
cudaError_t squared_relu_forward(const T* x, T* y, std::int64_t n, cudaStream_t stream);
template <class T>
cudaError_t squared_relu_backward(const T* dy, const T* x, T* dx, std::int64_t n, cudaStream_t stream);
template <class T>
cudaError_t gated_silu_forward(const T* gate, const T* up, T* y, std::int64_t n, cudaStream_t stream);
template <class T>
cudaError_t gated_silu_backward(const T* dy, const T* gate, const T* up, T* dgate, T* dup, std::int64_t n,
                                cudaStream_t stream);

/// Constants of one update of kernels/adamw.h, prepared in double.
struct AdamWConstants {
  float gradient_scale, beta1, rest1, beta2, rest2;  // rest = 1 - beta
  float keep;                                        // 1 - learning rate * weight decay
  float rate;                                        // learning rate / (1 - beta1^step)
  float correction;                                  // 1 / sqrt(1 - beta2^step)
  float epsilon;
};
/// P is the type of param, which is left alone when it is master.
template <class P>
cudaError_t adamw(const AdamWConstants& c, float* master, const float* gradient, float* exp_avg, float* exp_avg_sq,
                  P* param, std::int64_t n, cudaStream_t stream);
/// Element i takes the random bits that kernels/adamw.h says of element offset + i; `stream` has the step in it.
struct RoundingBits {
  std::uint64_t seed, stream, offset;
};
cudaError_t adamw_bfloat16(const AdamWConstants& c, const RoundingBits& random, std::uint16_t* weights,
                           const float* gradient, std::uint16_t* exp_avg, std::uint16_t* exp_avg_sq, std::int64_t n,
                           cudaStream_t stream);

// Sums.

/// Partial sums that sum_of_squares of n elements needs room for.
std::int64_t sum_of_squares_partials(std::int64_t n);
template <class T>  // or double
cudaError_t sum_of_squares(const T* x, std::int64_t n, double* partials, double* out, cudaStream_t stream);

/// out [columns] += sum of the rows of partials [rows, columns], in an order that depends on rows alone.
cudaError_t add_column_sums(const float* partials, std::int64_t rows, std::int64_t columns, float* out,
                            cudaStream_t stream);
cudaError_t add_column_sums(const double* partials, std::int64_t rows, std::int64_t columns, double* out,
                            cudaStream_t stream);

// Rows.

/// Most elements of a row of T that rms_norm and hidden_loss take.
template <class T>
inline constexpr std::int64_t most_row_elements = 32768 / static_cast<std::int64_t>(sizeof(T));

/// h and sum are null, or sum = x + h is what is normalised.
template <class T>
cudaError_t rms_norm_forward(const T* x, const T* h, const T* w, float eps, T* sum, T* y, float* rstd,
                             std::int64_t rows, std::int64_t d, cudaStream_t stream);
/// Rows [., d] of partial sums of dw.
std::int64_t rms_norm_partial_rows(std::int64_t rows);
/// residual may be null. partials may be null: then dw is not summed. With it the caller adds its column sums to dw.
template <class T>
cudaError_t rms_norm_backward(const T* dy, const T* x, const T* w, const float* rstd, const T* residual, T* dx,
                              float* partials, std::int64_t rows, std::int64_t d, cudaStream_t stream);

template <class T>
cudaError_t gated_rms_norm_forward(const T* x, const T* gate, const T* w, float eps, T* y, float* rstd,
                                   std::int64_t rows, int channels, cudaStream_t stream);
/// Rows [., channels] of partial sums of dw.
std::int64_t gated_rms_norm_partial_rows(std::int64_t rows);
/// partials as in rms_norm_backward.
template <class T>
cudaError_t gated_rms_norm_backward(const T* dy, const T* x, const T* gate, const T* w, const float* rstd, T* dx,
                                    T* dgate, float* partials, std::int64_t rows, int channels, cudaStream_t stream);

/// Pairs of partial sums.
std::int64_t hidden_loss_partials(std::int64_t rows);
/// G, the type of d_student, is T or float.
template <class T, class G>
cudaError_t hidden_loss(const T* student, const T* teacher, const std::int32_t* labels, double cosine_scale,
                        double mse_scale, G* d_student, double* partials, double* sums, std::int64_t rows,
                        std::int64_t d, cudaStream_t stream);

// Tokens.

template <class T>
cudaError_t embedding_forward(const std::int32_t* tokens, const T* table, T* out, std::int64_t length,
                              std::int64_t vocabulary, std::int64_t d, cudaStream_t stream);
template <class T>
cudaError_t embedding_backward(const T* dout, const std::int32_t* tokens, float* dtable, std::int64_t length,
                               std::int64_t vocabulary, std::int64_t d, cudaStream_t stream);

/// direction is 1 for the rotation, -1 for its transpose.
template <class T>
cudaError_t rope(const T* x, const std::int32_t* positions, const float* inverse_frequencies, float attention_factor,
                 float direction, T* out, std::int64_t tokens, int heads, int d, cudaStream_t stream);

/// `count` convolutions of these sizes go together.
struct ConvolutionShape {
  std::int64_t segments, length, channels;
  int taps, count;
};
/// What one of them has of its own; halo, dhalo and partials may be null. partials as in rms_norm_backward.
template <class T>
struct Convolution {
  const T *x, *w, *halo;
  T* y;
};
template <class T>
struct ConvolutionGradient {
  const T *dy, *x, *w, *halo;
  T *dx, *dhalo;
  float* partials;
};
/// A kernel's argument.
template <class C>
struct Convolutions {
  C each[3];
};
template <class T>
cudaError_t short_conv_forward(const ConvolutionShape& shape, const Convolutions<Convolution<T>>& convolutions,
                               const std::int32_t* start, cudaStream_t stream);
/// Rows [., channels * taps] of partial sums of a convolution's dw.
std::int64_t short_conv_partial_rows(const ConvolutionShape& shape);
template <class T>
cudaError_t short_conv_backward(const ConvolutionShape& shape, const Convolutions<ConvolutionGradient<T>>& convolutions,
                                const std::int32_t* start, cudaStream_t stream);

// Losses on logits.

/// What kernels/distill_loss.h says of its weights, with the gradient's constants prepared in double.
struct DistillConstants {
  float temperature, inverse_temperature, beta;
  float ce, kl, reverse_kl, jsd, tvd;        // factors of the gradient
  bool with_reverse_kl, with_jsd, with_tvd;  // wanted sums
  bool write_gradient;
};
/// Most classes N of a row.
template <class T>
std::int64_t most_classes();
/// Rows of n logits begin every `pitch`. teacher may be null: then the temperature is 1. row_sums [rows, 10] in the
/// order of LossSum; every entry is written.
template <class T>
cudaError_t distill_loss(const DistillConstants& c, T* student, const T* teacher, const std::int32_t* labels,
                         double* row_sums, std::int64_t rows, std::int64_t n, std::int64_t pitch, cudaStream_t stream);

}  // namespace deltapipe::kernels::cuda
