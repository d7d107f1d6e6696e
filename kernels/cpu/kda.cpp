#include "kernels/kda.h"

#include "kernels/cpu/common.h"
#include "kernels/cpu/kda_chunk.h"
#include "kernels/cpu/small_gemm.h"

#include <algorithm>

namespace deltapipe::kernels::cpu {
namespace {

using kda::Carver;
using kda::Chunk;
using kda::FlushSubnormals;
using kda::Head;
using kda::HeadGradients;
using kda::Scratch;

constexpr std::int64_t most_lanes = 16;          // heads in flight when there are at least as many
constexpr std::int64_t most_scratch_slots = 32;  // chunks in flight when there are fewer

/// f(task, slot) for every task in [0, tasks): slot l takes tasks l, l + slots, ... one after another.
template <class F>
void parallel_slots(std::int64_t tasks, std::int64_t slots, const F& f) {
  parallel_for(std::min(tasks, slots), [&](std::int64_t slot) {
    const FlushSubnormals guard;
    for (std::int64_t task = slot; task < tasks; task += slots) f(task, slot);
  });
}

/// Sizes, memory and order of work of one call. A "head" below is a pair (segment, head), segments outermost.
/// With at least most_lanes of them, lanes run whole heads one after another. With fewer, each phase runs over all
/// heads and, where no state is involved, over their chunks. The choice and all sizes follow from the shapes alone.
template <class T>
class Call {
 public:
  Call(const KdaInputs& in, std::int64_t extra_columns, bool gradients)
      : in_(in),
        segments_(in.q.dim(0)),
        length_(in.q.dim(1)),
        heads_(in.q.dim(2)),
        k_(in.q.dim(3)),
        v_(in.v.dim(3)),
        columns_(v_ + extra_columns),
        gradients_(gradients) {
    const std::int64_t all = total_heads();
    by_head_ = all >= most_lanes;
    const std::int64_t rounds = (all + most_lanes - 1) / most_lanes;
    lanes_ = by_head_ ? (all + rounds - 1) / rounds : all;
    // Forward alone uses a chunk as soon as it is prepared.
    chunk_slots_ = by_head_ && !gradients ? lanes_ : lanes_ * chunks();
    scratch_slots_ = by_head_ ? lanes_ : std::max(2 * all, std::min(all * chunks(), most_scratch_slots));
    chunk_size_ = Chunk<T>::elements(k_, v_, gradients);
    scratch_size_ = Scratch<T>::elements(k_, v_, columns_, gradients);
  }

  void take_workspace(Arena& workspace) {
    chunk_memory_ = workspace.allocate(dtype_of<T>, {chunk_slots_, chunk_size_}, "KDA chunks");
    scratch_memory_ = workspace.allocate(dtype_of<T>, {scratch_slots_, scratch_size_}, "KDA scratch");
  }

  std::int64_t total_heads() const { return segments_ * heads_; }
  std::int64_t chunks() const { return (length_ + kda::chunk_tokens - 1) / kda::chunk_tokens; }
  std::int64_t k() const { return k_; }
  std::int64_t v() const { return v_; }
  std::int64_t heads() const { return heads_; }
  std::int64_t segments() const { return segments_; }
  std::int64_t columns() const { return columns_; }
  bool by_head() const { return by_head_; }
  std::int64_t scratch_slots() const { return scratch_slots_; }
  /// Elements from the tensor's start to the first token of a head, for rows of H * width.
  std::int64_t offset(std::int64_t head, std::int64_t width) const {
    return (head / heads_ * length_ * heads_ + head % heads_) * width;
  }

  Head<T> head(std::int64_t i) const {
    const std::int64_t h = i % heads_, at_k = offset(i, k_);
    return {.length = length_,
            .k_dim = k_,
            .v_dim = v_,
            .row_k = heads_ * k_,
            .row_v = heads_ * v_,
            .row_b = heads_,
            .q = in_.q.as<T>() + at_k,
            .k = in_.k.as<T>() + at_k,
            .v = in_.v.as<T>() + offset(i, v_),
            .f = in_.f.as<T>() + at_k,
            .b = in_.b.as<T>() + offset(i, 1),
            .dt_bias = in_.dt_bias.as<T>() + h * k_,
            .gate = {std::exp(in_.a_log.as<T>()[h]), static_cast<T>(in_.gate_lower_bound)},
            .scale = static_cast<T>(in_.scale),
            .start = in_.start.as<std::int32_t>() + i / heads_ * length_};
  }
  /// The memory of a chunk; `lane` is a slot when working by head, else the head.
  Chunk<T> chunk(std::int64_t lane, std::int64_t index) const {
    const std::int64_t slot = by_head_ && !gradients_ ? lane : lane * chunks() + index;
    Carver<T> carver(chunk_memory_.as<T>() + slot * chunk_size_);
    Chunk<T> c(carver, k_, v_, gradients_);
    c.first = index * kda::chunk_tokens;
    c.n = std::min(kda::chunk_tokens, length_ - c.first);
    return c;
  }
  Scratch<T> scratch(std::int64_t slot) const {
    Carver<T> carver(scratch_memory_.as<T>() + slot * scratch_size_);
    return {carver, k_, v_, columns_, gradients_};
  }
  void prepare(const Head<T>& h, std::int64_t lane, std::int64_t index, Scratch<T>& s) const {
    Chunk<T> c = chunk(lane, index);
    kda::prepare_chunk(h, c.first, c.n, c, s);
  }
  /// Prepares every chunk of every head, in parallel over chunks; for the mode that keeps them all.
  void prepare_all() const {
    parallel_slots(total_heads() * chunks(), scratch_slots_, [&](std::int64_t task, std::int64_t slot) {
      Scratch<T> s = scratch(slot);
      prepare(head(task / chunks()), task / chunks(), task % chunks(), s);
    });
  }
  /// f(head, lane, scratch, prepared) for every head; prepared: its chunks are ready.
  template <class F>
  void for_heads(const F& f) const {
    if (!by_head_) prepare_all();
    parallel_slots(total_heads(), by_head_ ? lanes_ : scratch_slots_, [&](std::int64_t i, std::int64_t slot) {
      Scratch<T> s = scratch(slot);
      f(i, by_head_ ? slot : i, s, !by_head_);
    });
  }

 private:
  const KdaInputs& in_;
  std::int64_t segments_, length_, heads_, k_, v_, columns_;
  bool gradients_;
  bool by_head_ = false;
  std::int64_t lanes_ = 0, chunk_slots_ = 0, scratch_slots_ = 0, chunk_size_ = 0, scratch_size_ = 0;
  Tensor chunk_memory_, scratch_memory_;
};

template <class T>
void copy_or_zero(const T* in, std::int64_t n, T* out) {
  if (in != nullptr) {
    std::copy_n(in, n, out);
  } else {
    std::fill_n(out, n, T(0));
  }
}

template <class T>
T* optional(const Tensor& t) {
  return t ? t.as<T>() : nullptr;
}

/// Row block i of size n of an optional tensor.
template <class T>
T* part(T* p, std::int64_t i, std::int64_t n) {
  return p == nullptr ? nullptr : p + i * n;
}

/// Incoming states and v_new of all chunks of a head, from the first to the last.
template <class T>
void scan_states(const Call<T>& call, std::int64_t i, std::int64_t lane, const T* state_in, Scratch<T>& s) {
  const Head<T> h = call.head(i);
  const std::int64_t size = call.k() * call.v();
  copy_or_zero(state_in, size, s.state);
  for (std::int64_t j = 0; j < call.chunks(); ++j) {
    const Chunk<T> c = call.chunk(lane, j);
    std::copy_n(s.state, size, c.state);
    kda::advance_state<T>(h, c, call.v(), s.state, c.v_new, nullptr, s);
  }
}

/// Gradients of the outgoing states and z of all chunks of a head, from the last to the first.
template <class T>
void scan_state_gradients(const Call<T>& call, std::int64_t i, std::int64_t lane, const T* d_o, const T* dstate_out,
                          T* dstate_in, Scratch<T>& s) {
  const Head<T> h = call.head(i);
  const std::int64_t size = call.k() * call.v();
  copy_or_zero(dstate_out, size, s.state);
  for (std::int64_t j = call.chunks() - 1; j >= 0; --j) {
    const Chunk<T> c = call.chunk(lane, j);
    std::copy_n(s.state, size, c.dstate);
    kda::retreat_state(h, c, d_o + c.first * h.row_v, s.state, c.z, s);
  }
  if (dstate_in != nullptr) std::copy_n(s.state, size, dstate_in);
}

/// sums [segments, heads, chunks, K + 1] -> da_log and ddt_bias, in one order. Overwrites sums.
template <class T>
void reduce_parameter_gradients(const Call<T>& call, T* sums, T* da_log, T* ddt_bias) {
  const std::int64_t k = call.k(), size = k + 1;
  parallel_for(call.heads(), [&](std::int64_t h) {
    T* total = sums + h * call.chunks() * size;  // the head's first chunk in the first segment
    for (std::int64_t s = 0; s < call.segments(); ++s) {
      for (std::int64_t j = s == 0 ? 1 : 0; j < call.chunks(); ++j) {
        axpy(T(1), sums + ((s * call.heads() + h) * call.chunks() + j) * size, total, size);
      }
    }
    if (ddt_bias != nullptr) axpy(T(1), total, ddt_bias + h * k, k);
    if (da_log != nullptr) da_log[h] += total[k];
  });
}

}  // namespace

std::int64_t kda_records_bytes(const Stream& /*stream*/, const KdaInputs& /*inputs*/) { return 0; }

void kda_forward(const Stream& stream, const KdaInputs& inputs, const Tensor& /*records*/, const Tensor& state_in,
                 const Tensor& o, const Tensor& state_out, Arena& workspace) {
  for_real(inputs.q.dtype, "kda_forward", [&]<class T>() {
    Call<T> call(inputs, 0, false);
    const auto scope = workspace.scope();
    call.take_workspace(workspace);
    if (stream.is_dry()) return;
    const std::int64_t size = call.k() * call.v();
    const T* in = optional<T>(state_in);
    T *out = optional<T>(state_out), *po = o.as<T>();
    call.for_heads([&](std::int64_t i, std::int64_t lane, Scratch<T>& s, bool prepared) {
      const Head<T> h = call.head(i);
      copy_or_zero(part(in, i, size), size, s.state);
      for (std::int64_t j = 0; j < call.chunks(); ++j) {
        if (!prepared) call.prepare(h, lane, j, s);
        const Chunk<T> c = call.chunk(lane, j);
        kda::advance_state(h, c, call.v(), s.state, s.v_new, po + call.offset(i, call.v()) + c.first * h.row_v, s);
      }
      if (out != nullptr) std::copy_n(s.state, size, out + i * size);
    });
  });
}

void kda_backward(const Stream& stream, const KdaInputs& inputs, const Tensor& /*records*/, const Tensor& state_in,
                  const Tensor& d_o, const Tensor& dstate_out, const KdaGradients& gradients, const Tensor& dstate_in,
                  Arena& workspace) {
  for_real(inputs.q.dtype, "kda_backward", [&]<class T>() {
    Call<T> call(inputs, 0, true);
    const std::int64_t heads = call.total_heads(), chunks = call.chunks(), sum_size = call.k() + 1;
    const auto scope = workspace.scope();
    call.take_workspace(workspace);
    const Tensor sums = workspace.allocate(dtype_of<T>, {heads, chunks, sum_size}, "KDA parameter gradients");
    if (stream.is_dry()) return;
    const std::int64_t size = call.k() * call.v();
    const T *in = optional<T>(state_in), *dout = optional<T>(dstate_out), *pdo = d_o.as<T>();
    T *din = optional<T>(dstate_in), *psums = sums.as<T>();

    const auto scan_forward = [&](std::int64_t i, std::int64_t lane, Scratch<T>& s) {
      scan_states<T>(call, i, lane, part(in, i, size), s);
    };
    const auto scan_backward = [&](std::int64_t i, std::int64_t lane, Scratch<T>& s) {
      scan_state_gradients<T>(call, i, lane, pdo + call.offset(i, call.v()), part(dout, i, size), part(din, i, size),
                              s);
    };
    const auto differentiate = [&](std::int64_t i, std::int64_t lane, std::int64_t j, Scratch<T>& s) {
      const std::int64_t at_k = call.offset(i, call.k());
      const HeadGradients<T> out{gradients.dq.as<T>() + at_k, gradients.dk.as<T>() + at_k,
                                 gradients.dv.as<T>() + call.offset(i, call.v()), gradients.df.as<T>() + at_k,
                                 gradients.db.as<T>() + call.offset(i, 1)};
      kda::chunk_gradients(call.head(i), call.chunk(lane, j), out, psums + (i * chunks + j) * sum_size, s);
    };

    if (call.by_head()) {
      call.for_heads([&](std::int64_t i, std::int64_t lane, Scratch<T>& s, bool) {
        for (std::int64_t j = 0; j < chunks; ++j) call.prepare(call.head(i), lane, j, s);
        scan_forward(i, lane, s);
        scan_backward(i, lane, s);
        for (std::int64_t j = 0; j < chunks; ++j) differentiate(i, lane, j, s);
      });
    } else {
      call.prepare_all();
      parallel_slots(2 * heads, call.scratch_slots(), [&](std::int64_t task, std::int64_t slot) {
        Scratch<T> s = call.scratch(slot);
        task < heads ? scan_forward(task, task, s) : scan_backward(task - heads, task - heads, s);
      });
      parallel_slots(heads * chunks, call.scratch_slots(), [&](std::int64_t task, std::int64_t slot) {
        Scratch<T> s = call.scratch(slot);
        differentiate(task / chunks, task / chunks, task % chunks, s);
      });
    }
    if (gradients.da_log || gradients.ddt_bias) {
      reduce_parameter_gradients<T>(call, psums, optional<T>(gradients.da_log), optional<T>(gradients.ddt_bias));
    }
  });
}

// The map's columns ride with the state's: starting from [0 | I], with values [v | 0], the state ends as [E | M].
void kda_segment_map(const Stream& stream, const KdaInputs& inputs, const Tensor& /*records*/, const Tensor& m,
                     const Tensor& e, Arena& workspace) {
  for_real(inputs.q.dtype, "kda_segment_map", [&]<class T>() {
    Call<T> call(inputs, inputs.q.dim(3), false);
    const auto scope = workspace.scope();
    call.take_workspace(workspace);
    if (stream.is_dry()) return;
    const std::int64_t k = call.k(), v = call.v(), columns = call.columns();
    T *pm = m.as<T>(), *pe = e.as<T>();
    call.for_heads([&](std::int64_t i, std::int64_t lane, Scratch<T>& s, bool prepared) {
      const Head<T> h = call.head(i);
      std::fill_n(s.state, k * columns, T(0));
      for (std::int64_t x = 0; x < k; ++x) s.state[x * columns + v + x] = T(1);
      for (std::int64_t j = 0; j < call.chunks(); ++j) {
        if (!prepared) call.prepare(h, lane, j, s);
        kda::advance_state<T>(h, call.chunk(lane, j), columns, s.state, s.v_new, nullptr, s);
      }
      for (std::int64_t x = 0; x < k; ++x) {
        std::copy_n(s.state + x * columns, v, pe + (i * k + x) * v);
        std::copy_n(s.state + x * columns + v, k, pm + (i * k + x) * k);
      }
    });
  });
}

void kda_backward_map(const Stream& stream, const KdaInputs& inputs, const Tensor& /*records*/, const Tensor& d_o,
                      const Tensor& e, Arena& workspace) {
  for_real(inputs.q.dtype, "kda_backward_map", [&]<class T>() {
    Call<T> call(inputs, 0, false);
    const auto scope = workspace.scope();
    call.take_workspace(workspace);
    if (stream.is_dry()) return;
    const std::int64_t size = call.k() * call.v();
    const T* pdo = d_o.as<T>();
    T* pe = e.as<T>();
    call.for_heads([&](std::int64_t i, std::int64_t lane, Scratch<T>& s, bool prepared) {
      const Head<T> h = call.head(i);
      std::fill_n(s.state, size, T(0));
      for (std::int64_t j = call.chunks() - 1; j >= 0; --j) {
        if (!prepared) call.prepare(h, lane, j, s);
        const Chunk<T> c = call.chunk(lane, j);
        kda::retreat_state(h, c, pdo + call.offset(i, call.v()) + c.first * h.row_v, s.state, s.ps, s);
      }
      std::copy_n(s.state, size, pe + i * size);
    });
  });
}

void kda_compose_maps(const Stream&, const Tensor& m1, const Tensor& e1, const Tensor& m2, const Tensor& e2,
                      const Tensor& m_out, const Tensor& e_out) {
  for_real(m1.dtype, "kda_compose_maps", [&]<class T>() {
    const std::int64_t k = m1.dim(2), v = e1.dim(3);
    parallel_for(m1.dim(0) * m1.dim(1), [&](std::int64_t i) {
      const FlushSubnormals guard;
      const T* second = m2.as<T>() + i * k * k;
      T* e = e_out.as<T>() + i * k * v;
      small_gemm<false>(k, k, k, second, k, 1, m1.as<T>() + i * k * k, k, m_out.as<T>() + i * k * k, k);
      std::copy_n(e2.as<T>() + i * k * v, k * v, e);
      small_gemm<true>(k, v, k, second, k, 1, e1.as<T>() + i * k * v, v, e, v);
    });
  });
}

void kda_apply_map(const Stream&, const Tensor& m, bool transpose_m, const Tensor& state, const Tensor& e,
                   const Tensor& out) {
  for_real(m.dtype, "kda_apply_map", [&]<class T>() {
    const std::int64_t k = m.dim(2), v = e.dim(3);
    parallel_for(m.dim(0) * m.dim(1), [&](std::int64_t i) {
      const FlushSubnormals guard;
      T* p = out.as<T>() + i * k * v;
      std::copy_n(e.as<T>() + i * k * v, k * v, p);
      small_gemm<true>(k, v, k, m.as<T>() + i * k * k, transpose_m ? 1 : k, transpose_m ? k : 1,
                       state.as<T>() + i * k * v, v, p, v);
    });
  });
}

}  // namespace deltapipe::kernels::cpu
