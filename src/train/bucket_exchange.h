// BucketExchange: gradients on their way to the shards, and weights back, bucket by bucket (ParameterTable::buckets),
// between the ranks that hold the same layers.
//
// A bucket's sum is started as soon as its gradients are complete and runs beside the backward pass of other layers.
// All ranks start the same buckets in the same order, as the communicator asks: they run the same list of tasks, which
// alone says when a bucket is complete, and train the same parameters.
//
// Waiting for an earlier sum in the middle of a backward pass stops no schedule: ranks of this axis are at most as far
// apart as if they ran in step, and in step their lists are legal.
#pragma once

#include "comm/communicator.h"
#include "core/arena.h"
#include "core/stream.h"
#include "model/parameters.h"

#include <functional>
#include <vector>

namespace deltapipe {

class BucketExchange {
 public:
  /// Gradients have been allocated for peers.size() shards. Takes from `communication` what sums borrow while they are
  /// under way: of two at a time, so that it does not grow with the buckets; where sums borrow nothing (NCCL) all may
  /// be under way. `parameters` and `peers` outlive this object.
  BucketExchange(ParameterTable& parameters, Communicator& peers, Arena& communication);

  /// False: this rank holds all shards, and nothing below does anything.
  bool has_peers() const { return !slots_.empty(); }
  /// After Parameter::trainable was set: buckets without a trainable parameter travel no more.
  void select();

  /// Starts the sum of the layer's gradients (ParameterSpec::layer), which are not touched until finish_sums().
  void start_sum(const Stream& stream, std::int64_t layer);
  /// Starts what has not been started and waits for all: each rank's shard of every bucket is the sum.
  void finish_sums(const Stream& stream);

  /// Every rank's shard of the flat gradients to all, whatever it holds: of the selected buckets, or of all. fill(i)
  /// writes this rank's shard of bucket i, take(i) reads the whole of it; the others are under way meanwhile.
  using OnBucket = std::function<void(std::size_t)>;
  void gather(const Stream& stream, bool all, const OnBucket& fill, const OnBucket& take);

 private:
  /// A sum under way with what it borrows.
  struct Slot {
    Arena scratch;
    Pending sum;
  };
  Pending start(const Stream& stream, const GradientBucket& bucket, Arena& scratch) const;
  void start_next(const Stream& stream, std::size_t bucket);
  Tensor whole_of(const GradientBucket& bucket) const;
  Tensor shard_of(const GradientBucket& bucket) const;

  ParameterTable& parameters_;
  Communicator& peers_;
  std::vector<Slot> slots_;  // used in turn; none without peers or gradients
  std::size_t next_slot_ = 0;
  std::vector<Pending> gathers_;                // one a bucket
  std::vector<bool> is_selected_, is_started_;  // one a bucket
};

}  // namespace deltapipe
