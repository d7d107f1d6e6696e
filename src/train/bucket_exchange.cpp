#include "train/bucket_exchange.h"

#include "core/error.h"

#include <algorithm>

namespace deltapipe {

BucketExchange::BucketExchange(ParameterTable& parameters, Communicator& peers, Arena& communication)
    : parameters_(parameters), peers_(peers) {
  const std::vector<GradientBucket>& buckets = parameters.buckets();
  if (peers.size() == 1 || buckets.empty()) return;
  std::size_t bytes = 0;
  for (const GradientBucket& bucket : buckets) {
    Arena scratch = Arena::measuring("gradient sum scratch", communication.device());
    start(Stream::dry(communication.device()), bucket, scratch).wait(Stream::dry(communication.device()));
    bytes = std::max(bytes, scratch.peak());
  }
  const std::size_t slots = bytes == 0 ? buckets.size() : std::min<std::size_t>(2, buckets.size());
  for (std::size_t i = 0; i < slots; ++i) {
    constexpr const char* label = "gradient sum scratch";
    const Tensor memory = communication.allocate(DType::u8, {static_cast<std::int64_t>(bytes)}, label);
    slots_.push_back({Arena::over(label, memory), {}});
  }
  gathers_.resize(buckets.size());
  is_selected_.assign(buckets.size(), true);
  is_started_.assign(buckets.size(), false);
}

void BucketExchange::select() {
  if (!has_peers()) return;
  is_selected_.assign(is_selected_.size(), false);
  for (const Parameter& p : parameters_.all()) {
    if (p.trainable) is_selected_[p.bucket] = true;
  }
}

Tensor BucketExchange::whole_of(const GradientBucket& bucket) const {
  return parameters_.flat_gradients().rows(bucket.begin, bucket.end);
}

Tensor BucketExchange::shard_of(const GradientBucket& bucket) const {
  const auto [begin, end] = bucket.shard(peers_.rank(), peers_.size());
  return parameters_.flat_gradients().rows(begin, end);
}

Pending BucketExchange::start(const Stream& stream, const GradientBucket& bucket, Arena& scratch) const {
  return peers_.start_reduce_scatter_sum(stream, whole_of(bucket), shard_of(bucket), Purpose::gradients, scratch);
}

void BucketExchange::start_next(const Stream& stream, std::size_t bucket) {
  require(!is_started_[bucket], "BucketExchange: gradients of a bucket were summed twice in one step");
  is_started_[bucket] = true;
  Slot& slot = slots_[next_slot_];
  next_slot_ = (next_slot_ + 1) % slots_.size();
  slot.sum.wait(stream);
  slot.scratch.reset();
  slot.sum = start(stream, parameters_.buckets()[bucket], slot.scratch);
}

void BucketExchange::start_sum(const Stream& stream, std::int64_t layer) {
  if (!has_peers()) return;
  const std::vector<GradientBucket>& buckets = parameters_.buckets();
  const auto at = std::find_if(buckets.begin(), buckets.end(), [&](const auto& b) { return b.layer == layer; });
  if (at == buckets.end()) return;  // no stage of the recipe trains this layer
  const auto i = static_cast<std::size_t>(at - buckets.begin());
  if (is_selected_[i]) start_next(stream, i);
}

void BucketExchange::finish_sums(const Stream& stream) {
  if (!has_peers()) return;
  for (std::size_t i = 0; i < is_started_.size(); ++i) {
    if (is_selected_[i] && !is_started_[i]) start_next(stream, i);
  }
  for (std::size_t i = 0; i < slots_.size(); ++i) {  // the oldest first
    slots_[next_slot_].sum.wait(stream);
    next_slot_ = (next_slot_ + 1) % slots_.size();
  }
  is_started_.assign(is_started_.size(), false);
}

void BucketExchange::gather(const Stream& stream, bool all, const OnBucket& fill, const OnBucket& take) {
  if (!has_peers()) return;
  const std::vector<GradientBucket>& buckets = parameters_.buckets();
  for (std::size_t i = 0; i < buckets.size(); ++i) {
    if (!all && !is_selected_[i]) continue;
    fill(i);
    gathers_[i] = peers_.start_all_gather(stream, shard_of(buckets[i]), whole_of(buckets[i]), Purpose::weights);
  }
  for (std::size_t i = 0; i < buckets.size(); ++i) {
    if (!all && !is_selected_[i]) continue;
    gathers_[i].wait(stream);
    take(i);
  }
}

}  // namespace deltapipe
