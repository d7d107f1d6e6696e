// SequenceParallel::scan and scan_backward. Both walk the segments from the end where the state is known to be zero; v
// is this rank's place in the walk. `first` is this rank's segment nearer to that end, `second` (zigzag) the other.
#include "comm/block_copy.h"
#include "comm/sequence_parallel.h"
#include "kernels/elementwise.h"
#include "kernels/kda.h"

#include <utility>

namespace deltapipe {
namespace {

struct Map {
  Tensor m, e;  // [B, H, K, K], [B, H, K, V]
};

/// Room for two maps in one message: e and m of the first, then of the second.
struct Message {
  Tensor flat;
  Map first, second;
  Tensor first_e;    // the message of a run whose incoming state is zero
  Tensor first_map;  // the message of one map
};

class Scan {
 public:
  /// `transpose`: maps apply as m^T.
  Scan(const Stream& stream, Communicator& comm, const Shape& state, DType dtype, bool transpose, bool reversed,
       Arena& workspace)
      : stream_(stream),
        comm_(comm),
        state_(state),
        dtype_(dtype),
        transpose_(transpose),
        reversed_(reversed),
        workspace_(workspace),
        ranks_(comm.size()),
        v_(reversed ? ranks_ - 1 - comm.rank() : comm.rank()) {
    if (transpose_) {
      zero_ = workspace_.allocate(dtype_, matrix_shape(), "scan zeros");
      kernels::fill_zero(stream_, zero_);
    }
  }

  /// own -> the state that enters it.
  void run_single(const Map& own, const Tensor& state_in) { run(own, nullptr, state_in, Tensor()); }
  /// first and second -> the states that enter them.
  void run_pair(const Map& first, const Map& second, const Tensor& first_in, const Tensor& second_in) {
    run(first, &second, first_in, second_in);
  }

 private:
  Shape matrix_shape() const { return {state_[0], state_[1], state_[2], state_[2]}; }

  Message allocate(int maps) {
    const std::int64_t e = state_.numel(), m = matrix_shape().numel();
    Message out;
    out.flat = workspace_.allocate(dtype_, {maps * (e + m)}, "scan maps");
    const auto map_at = [&](std::int64_t at) {
      return Map{out.flat.rows(at + e, at + e + m).view(matrix_shape()), out.flat.rows(at, at + e).view(state_)};
    };
    out.first = map_at(0);
    if (maps == 2) out.second = map_at(e + m);
    out.first_e = out.flat.rows(0, e);
    out.first_map = out.flat.rows(0, e + m);
    return out;
  }

  void copy(const Map& from, const Map& to) const {
    copy_all(stream_, from.m, to.m);
    copy_all(stream_, from.e, to.e);
  }
  /// out = one, then two.
  void compose(const Map& one, const Map& two, const Map& out) const {
    if (!transpose_) {
      kernels::kda_compose_maps(stream_, one.m, one.e, two.m, two.e, out.m, out.e);
      return;
    }
    kernels::kda_apply_map(stream_, one.m, false, two.m, zero_, out.m);  // (m1 m2)^T = m2^T m1^T
    apply(two, one.e, out.e);
  }
  void apply(const Map& map, const Tensor& state, const Tensor& out) const {
    kernels::kda_apply_map(stream_, map.m, transpose_, state, map.e, out);
  }
  int rank_of(int v) const { return reversed_ ? ranks_ - 1 - v : v; }

  // Runs towards the start of the walk. `lower_` covers the segments just before `first`.

  /// The message to v + distance: lower_ then first.
  Tensor lower_message(const Map& first, int distance) {
    const Message& out = lower_sent_;
    if (v_ < distance) {  // the run begins where the state is zero
      if (has_lower_) {
        apply(first, lower_.first.e, out.first.e);
      } else {
        copy_all(stream_, first.e, out.first.e);
      }
      return out.first_e;
    }
    if (has_lower_) {
      compose(lower_.first, first, out.first);
    } else {
      copy(first, out.first);
    }
    return out.first_map;
  }
  void join_lower(int distance) {
    if (!has_lower_) {
      std::swap(lower_, lower_received_);
    } else if (v_ - distance < distance) {
      apply(lower_.first, lower_received_.first.e, lower_spare_.first.e);
      std::swap(lower_, lower_spare_);
    } else {
      compose(lower_received_.first, lower_.first, lower_spare_.first);
      std::swap(lower_, lower_spare_);
    }
    has_lower_ = true;
  }

  // Runs between `first` and `second`, of the ranks v + 1, v + 2, ...: `inner_` is a pair, or one map once it reaches
  // the last rank.

  /// The message to v - distance: first, inner_, second.
  Tensor inner_message(const Map& first, const Map& second, int distance) {
    const Message& out = inner_sent_;
    if (v_ + distance >= ranks_) {
      if (!has_inner_) {
        compose(first, second, out.first);
      } else {
        compose(first, inner_.first, temporary_.first);
        compose(temporary_.first, second, out.first);
      }
      return out.first_map;
    }
    if (!has_inner_) {
      copy(first, out.first);
      copy(second, out.second);
    } else {
      compose(first, inner_.first, out.first);
      compose(inner_.second, second, out.second);
    }
    return out.flat;
  }
  void join_inner(int distance) {
    const bool to_last = v_ + 2 * distance >= ranks_;
    if (!has_inner_) {
      std::swap(inner_, inner_received_);
    } else if (to_last) {
      compose(inner_.first, inner_received_.first, temporary_.first);
      compose(temporary_.first, inner_.second, inner_spare_.first);
      std::swap(inner_, inner_spare_);
    } else {
      compose(inner_.first, inner_received_.first, inner_spare_.first);
      compose(inner_received_.second, inner_.second, inner_spare_.second);
      std::swap(inner_, inner_spare_);
    }
    has_inner_ = true;
  }

  void run(const Map& first, const Map* second, const Tensor& first_in, const Tensor& second_in) {
    if (ranks_ > 1) {
      for (Message* m : {&lower_, &lower_spare_, &lower_sent_, &lower_received_}) *m = allocate(1);
      if (second != nullptr) {
        for (Message* m : {&inner_, &inner_spare_, &inner_sent_, &inner_received_}) *m = allocate(2);
        temporary_ = allocate(1);
      }
    }
    for (int d = 1; d < ranks_; d *= 2) exchange_round(first, second, d);
    if (!has_lower_) {
      kernels::fill_zero(stream_, first_in);
    } else {
      copy_all(stream_, lower_.first.e, first_in);
    }
    if (second == nullptr) return;
    if (!has_inner_) {
      apply(first, first_in, second_in);
    } else {
      apply(first, first_in, temporary_.first.e);
      apply(inner_.first, temporary_.first.e, second_in);
    }
  }

  void exchange_round(const Map& first, const Map* second, int d) {
    std::array<Transfer, 2> sends, receives;
    std::size_t send_count = 0, receive_count = 0;
    if (v_ + d < ranks_) sends[send_count++] = {rank_of(v_ + d), lower_message(first, d)};
    if (v_ - d >= 0) {
      receives[receive_count++] = {rank_of(v_ - d), v_ - d < d ? lower_received_.first_e : lower_received_.first_map};
    }
    if (second != nullptr && v_ - d >= 0) sends[send_count++] = {rank_of(v_ - d), inner_message(first, *second, d)};
    if (second != nullptr && v_ + d < ranks_) {
      receives[receive_count++] = {rank_of(v_ + d),
                                   v_ + 2 * d >= ranks_ ? inner_received_.first_map : inner_received_.flat};
    }
    comm_.exchange(stream_, {sends.data(), send_count}, {receives.data(), receive_count}, Purpose::kda_state);
    if (v_ - d >= 0) join_lower(d);
    if (second != nullptr && v_ + d < ranks_) join_inner(d);
  }

  const Stream& stream_;
  Communicator& comm_;
  Shape state_;
  DType dtype_;
  bool transpose_, reversed_;
  Arena& workspace_;
  int ranks_, v_;
  Tensor zero_;
  Message lower_, lower_spare_, lower_sent_, lower_received_;
  Message inner_, inner_spare_, inner_sent_, inner_received_, temporary_;
  bool has_lower_ = false, has_inner_ = false;
};

void check_scan(const Tensor& m, const Tensor& e, const Tensor& out, const char* what) {
  const bool fits = m.shape.rank() == 4 && e.shape.rank() == 4 && m.dim(2) == m.dim(3) &&
                    e.shape == Shape{m.dim(0), m.dim(1), m.dim(2), e.dim(3)} && out.shape == e.shape;
  if (!fits || m.dtype != e.dtype || out.dtype != e.dtype || (m.dtype != DType::f32 && m.dtype != DType::f64)) {
    fail<InternalError>("{}: m {} {}, e {} {} and states {} {} do not fit", what, name_of(m.dtype), m.shape.str(),
                        name_of(e.dtype), e.shape.str(), name_of(out.dtype), out.shape.str());
  }
}

/// Slot `slot` of every sequence, [B, ...] out of [B * 2, ...].
Tensor take_slot(const Stream& stream, const Tensor& from, int slot, Arena& workspace) {
  const std::int64_t batch = from.dim(0) / 2;
  if (batch == 1) return from.rows(slot, slot + 1);
  const std::int64_t segment = from.numel() / from.dim(0);
  const Tensor out = workspace.allocate(from.dtype, {batch, from.dim(1), from.dim(2), from.dim(3)}, "scan segments");
  copy_blocks(stream, batch, segment, from, slot * segment, 2 * segment, out, 0, segment);
  return out;
}

void run_scan(const Stream& stream, Communicator& comm, const SequenceLayout& layout, const Tensor& m, const Tensor& e,
              const Tensor& states, bool backward, Arena& workspace) {
  const auto scope = workspace.scope();
  if (layout.local_segments() == 1) {
    Scan(stream, comm, e.shape, e.dtype, backward, backward, workspace).run_single({m, e}, states);
    return;
  }
  require(m.dim(0) % 2 == 0, "scan: a zigzag rank holds two segments a sequence");
  const std::int64_t batch = e.dim(0) / 2, segment = e.numel() / e.dim(0);
  const int near = backward ? 1 : 0;  // the slot nearer to where the walk begins
  const Map first{take_slot(stream, m, near, workspace), take_slot(stream, e, near, workspace)};
  const Map second{take_slot(stream, m, 1 - near, workspace), take_slot(stream, e, 1 - near, workspace)};
  const Shape state{batch, e.dim(1), e.dim(2), e.dim(3)};
  const Tensor first_in = workspace.allocate(e.dtype, state, "scan state"),
               second_in = workspace.allocate(e.dtype, state, "scan state");
  Scan(stream, comm, state, e.dtype, backward, false, workspace).run_pair(first, second, first_in, second_in);
  copy_blocks(stream, batch, segment, first_in, 0, segment, states, near * segment, 2 * segment);
  copy_blocks(stream, batch, segment, second_in, 0, segment, states, (1 - near) * segment, 2 * segment);
}

}  // namespace

void SequenceParallel::scan(const Stream& stream, const Tensor& m, const Tensor& e, const Tensor& state_in,
                            Arena& workspace) const {
  check_scan(m, e, state_in, "scan");
  run_scan(stream, comm_, layout_, m, e, state_in, false, workspace);
}

void SequenceParallel::scan_backward(const Stream& stream, const Tensor& m, const Tensor& e, const Tensor& dstate_out,
                                     Arena& workspace) const {
  check_scan(m, e, dstate_out, "scan_backward");
  run_scan(stream, comm_, layout_, m, e, dstate_out, true, workspace);
}

}  // namespace deltapipe
