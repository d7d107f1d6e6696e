#include "kernels/distill_loss.h"

#include "kernels/cpu/common.h"
#include "kernels/cpu/vector_math.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>

namespace deltapipe::kernels::cpu {
namespace {

// A row is walked in tiles that stay in the first-level cache. Terms are in T, sums in double: in float, adding
// hundreds of like terms to a large one rounds the same way each time, and the error would depend on the vector width.
constexpr std::int64_t tile_size = 512;
// Rows are cut into at most this many tasks, whose sums lie on the stack until they are added in order.
constexpr std::int64_t most_tasks = 256;

using Sums = std::array<double, LossSum::count>;

/// f(begin, count) over the tiles of [0, n).
template <class F>
void for_tiles(std::int64_t n, const F& f) {
  for (std::int64_t i = 0; i < n; i += tile_size) f(i, std::min(tile_size, n - i));
}

/// e^-x - 1 + x for |x| <= 1/2, to full relative precision: x^2/2 (1 - x/3 (1 - x/4 (...))). The first term left out is
/// below 3e-9 of the result in float (x^8 2 / 10!), 6e-18 in double (x^14 2 / 16!).
template <class T>
T exp_second_order(T x) {
  constexpr int last = sizeof(T) == 4 ? 9 : 15;
  T s = 1;
#pragma GCC unroll 16
  for (int k = last; k >= 3; --k) s = T(1) - s * x * (T(1) / static_cast<T>(k));
  return T(0.5) * x * x * s;
}

/// log(1 + u) for u in (-1, 0], vectorisable in float: 2 atanh(f) with f = (w - 1) / (w + 1), w = (1 + u) / 2^e scaled
/// to [sqrt(1/2), sqrt(2)); |f| < 0.172, and the first term left out, 2 f^11 / 11, is below 3e-9 of the result.
inline float vlog1p(float u) {
  const float w = 1.0f + u;
  const std::int32_t bits = std::bit_cast<std::int32_t>(w);
  const std::int32_t e = (bits - 0x3f3504f3) >> 23;  // 0x3f3504f3: sqrt(1/2)
  const float scaled = std::bit_cast<float>(bits - (e << 23));
  const float f = (e == 0 ? u : scaled - 1.0f) / ((e == 0 ? u : scaled - 1.0f) + 2.0f);
  const float f2 = f * f;
  float s = 1.0f / 9.0f;
  s = s * f2 + 1.0f / 7.0f;
  s = s * f2 + 1.0f / 5.0f;
  s = s * f2 + 1.0f / 3.0f;
  s = s * f2 + 1.0f;
  const float y = static_cast<float>(e) * 0.693147181f + 2.0f * f * s;
  return u != u ? u : y;
}
inline double vlog1p(double u) { return std::log1p(u); }

/// p log(p / q) - p + q >= 0, given d = log(p / q).
template <class T>
T kl_term(T p, T q, T d) {
  const T close = p * exp_second_order(d);
  const T far = p * (d - T(1)) + q;
  return std::abs(d) <= T(0.5) ? close : far;
}

template <class T>
T sign(T x) {
  return (x > 0 ? T(1) : T(0)) - (x < 0 ? T(1) : T(0));
}

/// A row's largest logit, its lowest index, and log(sum exp(z - largest)) at temperature 1 and T.
template <class T>
struct Normaliser {
  T largest = -std::numeric_limits<T>::infinity();
  std::int64_t argmax = 0;
  double log_sum = 0;    // at temperature 1
  double log_sum_t = 0;  // at temperature T
  T inverse_sum = 0;
  T inverse_sum_t = 0;

  /// -log softmax(z)[label] at temperature 1.
  double cross_entropy(const T* z, std::int64_t label) const {
    return log_sum - (static_cast<double>(z[label]) - static_cast<double>(largest));
  }
};

template <class T>
double sum_exp_tile(const T* z, std::int64_t count, T largest, T inverse_temperature) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < count; ++i) sum += static_cast<double>(vexp((z[i] - largest) * inverse_temperature));
  return sum;
}

template <class T>
double sum_exp(const T* z, std::int64_t n, T largest, T inverse_temperature) {
  double total = 0;
  for_tiles(n, [&](std::int64_t begin, std::int64_t count) {
    total += sum_exp_tile(z + begin, count, largest, inverse_temperature);
  });
  return total;
}

template <class T>
Normaliser<T> read_row(const T* z, std::int64_t n, T inverse_temperature) {
  Normaliser<T> h;
  std::int64_t where = 0;  // first tile that holds the largest value
  for_tiles(n, [&](std::int64_t begin, std::int64_t count) {
    const T* x = z + begin;
    T m = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : m)
    for (std::int64_t i = 0; i < count; ++i) m = x[i] > m ? x[i] : m;
    if (m > h.largest) {
      h.largest = m;
      where = begin;
    }
  });
  const T* tile = z + where;
  h.argmax = where + (std::find(tile, z + n, h.largest) - tile);
  const double sum = sum_exp(z, n, h.largest, T(1));
  const double sum_t = inverse_temperature == T(1) ? sum : sum_exp(z, n, h.largest, inverse_temperature);
  h.log_sum = std::log(sum);
  h.log_sum_t = std::log(sum_t);
  h.inverse_sum = static_cast<T>(1 / sum);
  h.inverse_sum_t = static_cast<T>(1 / sum_t);
  return h;
}

/// Sums over one row, without the factor T^2.
struct Divergences {
  double kl = 0;
  double reverse_kl = 0;
  double jsd = 0;
  double student_to_mixture = 0;  // KL(q || m)
  double tvd = 0;
  double mean_sign = 0;  // sum q sign(q - p)
};

/// The losses of rows of N logits under fixed weights. Holds a tile of probabilities: one object a task.
template <class T>
class RowLoss {
 public:
  RowLoss(const DistillWeights& weights, std::int64_t n, double gradient_scale, bool write_gradient)
      : weights_(weights),
        n_(n),
        write_gradient_(write_gradient),
        inverse_temperature_(static_cast<T>(1 / static_cast<double>(weights.temperature))),
        beta_(static_cast<T>(weights.jsd_beta)) {
    const double t = weights.temperature;
    ce_ = static_cast<T>(gradient_scale * weights.ce);
    kl_ = static_cast<T>(gradient_scale * weights.kl * t);
    reverse_kl_ = static_cast<T>(gradient_scale * weights.reverse_kl * t);
    jsd_ = static_cast<T>(gradient_scale * weights.jsd * t * (1 - static_cast<double>(weights.jsd_beta)));
    tvd_ = static_cast<T>(gradient_scale * weights.tvd * 0.5 / t);
  }

  /// `teacher` may be null. Overwrites `student` when the gradient is wanted.
  void run(T* student, const T* teacher, std::int64_t label, Sums& sums) {
    const Normaliser<T> hs = read_row(student, n_, teacher ? inverse_temperature_ : T(1));
    sums[LossSum::ce] += hs.cross_entropy(student, label);
    sums[LossSum::student_correct] += hs.argmax == label;
    sums[LossSum::tokens] += 1;
    if (!teacher) {
      if (write_gradient_) {
        for_tiles(n_, [&](std::int64_t begin, std::int64_t count) {
          std::fill_n(gradient_.begin(), count, T(0));
          store_gradient(student + begin, hs, count);
        });
        student[label] -= ce_;
      }
      return;
    }

    const Normaliser<T> ht = read_row(teacher, n_, inverse_temperature_);
    sums[LossSum::teacher_ce] += ht.cross_entropy(teacher, label);
    sums[LossSum::teacher_correct] += ht.argmax == label;
    sums[LossSum::top1_agree] += hs.argmax == ht.argmax;

    // The gradients of ce and kl need no sum over the row, so one pass gives value and gradient.
    const bool one_pass = weights_.reverse_kl == 0 && weights_.jsd == 0 && weights_.tvd == 0;
    Divergences row;
    for_tiles(n_, [&](std::int64_t begin, std::int64_t count) {
      load(student + begin, teacher + begin, hs, ht, count);
      measure(count, row);
      if (write_gradient_ && one_pass) {
        differentiate(count, row);
        store_gradient(student + begin, hs, count);
      }
    });
    if (write_gradient_ && !one_pass) {
      for_tiles(n_, [&](std::int64_t begin, std::int64_t count) {
        load(student + begin, teacher + begin, hs, ht, count);
        differentiate(count, row);
        store_gradient(student + begin, hs, count);
      });
    }
    if (write_gradient_) student[label] -= ce_;
    const double t2 = static_cast<double>(weights_.temperature) * weights_.temperature;
    sums[LossSum::kl] += t2 * row.kl;
    sums[LossSum::reverse_kl] += t2 * row.reverse_kl;
    sums[LossSum::jsd] += t2 * row.jsd;
    sums[LossSum::tvd] += row.tvd;
  }

 private:
  using Tile = std::array<T, tile_size>;

  /// p, q, d = log(p / q), and with jsd log(p / m), log(q / m).
  void load(const T* zs, const T* zt, const Normaliser<T>& hs, const Normaliser<T>& ht, std::int64_t count) {
    const auto shift = static_cast<T>(ht.log_sum_t - hs.log_sum_t);
    const T inverse_t = inverse_temperature_, largest_s = hs.largest, largest_t = ht.largest;
    const T inverse_sum_s = hs.inverse_sum_t, inverse_sum_t = ht.inverse_sum_t;
    T *p = p_.data(), *q = q_.data(), *d = d_.data();
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) {
      // The largest logit is taken off each side first: where p or q matters, the difference then has no cancellation.
      const T xs = zs[i] - largest_s, xt = zt[i] - largest_t;
      p[i] = vexp(xt * inverse_t) * inverse_sum_t;
      q[i] = vexp(xs * inverse_t) * inverse_sum_s;
      d[i] = (xt - xs) * inverse_t - shift;
    }
    if (weights_.jsd == 0) return;
    T *teacher_to_mixture = p_over_m_.data(), *student_to_mixture = q_over_m_.data();
    const T beta = beta_;
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) {
      // m over the larger of p and q is 1 + weight (e^-|d| - 1), never near 0.
      const T x = std::abs(d[i]);
      const T minus_one = x <= T(0.5) ? exp_second_order(x) - x : vexp(-x) - T(1);
      const T larger = -vlog1p((d[i] >= 0 ? T(1) - beta : beta) * minus_one);
      teacher_to_mixture[i] = d[i] >= 0 ? larger : larger + d[i];
      student_to_mixture[i] = d[i] >= 0 ? larger - d[i] : larger;
    }
  }

  /// Adds the tile's share of the divergences.
  void measure(std::int64_t count, Divergences& row) const {
    const T *p = p_.data(), *q = q_.data(), *d = d_.data();
    double kl = 0;
#pragma omp simd reduction(+ : kl)
    for (std::int64_t i = 0; i < count; ++i) kl += static_cast<double>(kl_term(p[i], q[i], d[i]));
    row.kl += kl;
    if (weights_.reverse_kl > 0) {
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (std::int64_t i = 0; i < count; ++i) sum += static_cast<double>(kl_term(q[i], p[i], -d[i]));
      row.reverse_kl += sum;
    }
    if (weights_.jsd > 0) {
      const T *a = p_over_m_.data(), *b = q_over_m_.data();
      const T beta = beta_;
      double both = 0, student = 0;
#pragma omp simd reduction(+ : both, student)
      for (std::int64_t i = 0; i < count; ++i) {
        both += static_cast<double>(beta * p[i] * a[i] + (T(1) - beta) * q[i] * b[i]);
        student += static_cast<double>(q[i] * b[i]);
      }
      row.jsd += both;
      row.student_to_mixture += student;
    }
    if (weights_.tvd > 0) {
      double distance = 0, mean = 0;
#pragma omp simd reduction(+ : distance, mean)
      for (std::int64_t i = 0; i < count; ++i) {
        distance += static_cast<double>(std::abs(p[i] - q[i]));
        mean += static_cast<double>(q[i] * sign(q[i] - p[i]));
      }
      row.tvd += 0.5 * distance;
      row.mean_sign += mean;
    }
  }

  /// gradient_ = the divergences' part of the gradient.
  void differentiate(std::int64_t count, const Divergences& row) {
    const T *p = p_.data(), *q = q_.data(), *d = d_.data();
    T* g = gradient_.data();
    const T kl = kl_;
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) g[i] = kl * (q[i] - p[i]);
    if (weights_.reverse_kl > 0) {
      const T scale = reverse_kl_, mean = static_cast<T>(row.reverse_kl);
#pragma omp simd
      for (std::int64_t i = 0; i < count; ++i) g[i] += scale * q[i] * (-d[i] - mean);
    }
    if (weights_.jsd > 0) {
      const T* b = q_over_m_.data();
      const T scale = jsd_, mean = static_cast<T>(row.student_to_mixture);
#pragma omp simd
      for (std::int64_t i = 0; i < count; ++i) g[i] += scale * q[i] * (b[i] - mean);
    }
    if (weights_.tvd > 0) {
      const T scale = tvd_, mean = static_cast<T>(row.mean_sign);
#pragma omp simd
      for (std::int64_t i = 0; i < count; ++i) g[i] += scale * q[i] * (sign(q[i] - p[i]) - mean);
    }
  }

  /// student = gradient_ + ce's softmax at temperature 1; the caller takes 1 off at the label.
  void store_gradient(T* student, const Normaliser<T>& norm, std::int64_t count) const {
    const T* g = gradient_.data();
    if (weights_.ce == 0) {
      std::copy_n(g, count, student);
      return;
    }
    const T scale = ce_ * norm.inverse_sum, largest = norm.largest;
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) student[i] = g[i] + scale * vexp(student[i] - largest);
  }

  const DistillWeights weights_;
  const std::int64_t n_;
  const bool write_gradient_;
  const T inverse_temperature_;
  const T beta_;
  T ce_, kl_, reverse_kl_, jsd_, tvd_;  // weights times everything of the gradient that is constant
  Tile p_, q_, d_, p_over_m_, q_over_m_, gradient_;
};

}  // namespace

void distill_loss(const Stream& stream, const DistillWeights& weights, const Tensor& student_logits,
                  const Tensor& teacher_logits, const Tensor& labels, double gradient_scale, bool write_gradient,
                  const Tensor& sums, Arena&, std::int64_t classes) {
  if (stream.is_dry()) return;
  for_real(student_logits.dtype, "distill_loss", [&]<class T>() {
    const std::int64_t rows = student_logits.dim(0), pitch = student_logits.dim(1), n = classes;
    T* student = student_logits.as<T>();
    const T* teacher = teacher_logits ? teacher_logits.as<T>() : nullptr;
    const auto* label = labels.as<std::int32_t>();
    const std::int64_t block = std::max(rows_per_task(16 * n), (rows + most_tasks - 1) / most_tasks);
    std::array<Sums, most_tasks> partial;
    parallel_blocks(rows, block, [&](std::int64_t begin, std::int64_t end) {
      RowLoss<T> loss(weights, n, gradient_scale, write_gradient);
      Sums task{};
      for (std::int64_t r = begin; r < end; ++r) {
        T* row = student + r * pitch;
        if (label[r] >= n) fail<InternalError>("distill_loss: row {} has label {} of {} classes", r, label[r], n);
        if (label[r] >= 0) {
          loss.run(row, teacher ? teacher + r * pitch : nullptr, label[r], task);
        } else if (write_gradient) {
          std::fill_n(row, n, T(0));
        }
      }
      partial[static_cast<std::size_t>(begin / block)] = task;
    });
    auto* total = sums.as<double>();
    for (std::int64_t i = 0; i * block < rows; ++i) {
      for (int k = 0; k < LossSum::count; ++k) {
        total[k] += partial[static_cast<std::size_t>(i)][static_cast<std::size_t>(k)];
      }
    }
  });
}

}  // namespace deltapipe::kernels::cpu
