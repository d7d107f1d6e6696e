#include "train/mesh_checkpoint.h"

#include "core/file.h"
#include "core/log.h"
#include "core/trace.h"

#include <chrono>
#include <vector>

namespace deltapipe {

MeshCheckpointWriter::MeshCheckpointWriter(MpiRuntime& runtime, std::filesystem::path dir, int keep)
    : runtime_(runtime), dir_(std::move(dir)), keep_(keep) {
  if (runtime_.size() == 1) {
    alone_.emplace(dir_, keep_);
    return;
  }
  runtime_.together([&] {
    if (runtime_.rank() == 0) make_writable_folder(dir_);
  });
}

MeshCheckpointWriter::~MeshCheckpointWriter() {
  if (!pending_.valid()) return;
  try {
    pending_.get();
  } catch (const std::exception& e) {
    log::warn("checkpoint given up: {}", e.what());
  }
}

void MeshCheckpointWriter::write(const TrainingState& state, std::span<const TensorSlice> slices,
                                 const Stream& stream) {
  const trace::Span span("checkpoint", "checkpoint snapshot");
  if (alone_) return alone_->write(state, slices, stream);
  finish();
  runtime_.together([&] {
    if (runtime_.rank() == 0) begin_checkpoint(dir_, state.step);
  });
  std::vector<TensorSlice> copies = buffer_.copy(slices, stream);
  state_ = state;
  pending_ =
      std::async(std::launch::async, [folder = partial_folder(dir_, state.step), rank = runtime_.rank(),
                                      copies = std::move(copies)] { return write_rank_file(folder, rank, copies); });
}

bool MeshCheckpointWriter::is_done() const {
  return !pending_.valid() || pending_.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
}

void MeshCheckpointWriter::finish() {
  if (alone_) return alone_->wait();
  if (!state_) return;
  const trace::Span span("checkpoint", "checkpoint publication");
  const TrainingState state = std::move(*state_);
  state_.reset();
  FileRecord own;
  std::vector<FileRecord> records(static_cast<std::size_t>(runtime_.size()));
  try {
    runtime_.together([&] { own = pending_.get(); });
    constexpr auto bytes = static_cast<std::int64_t>(sizeof(FileRecord));
    runtime_.world().all_gather(Stream::cpu(), Tensor(&own, DType::u8, {bytes}),
                                Tensor(records.data(), DType::u8, {runtime_.size() * bytes}), Purpose::control);
    runtime_.together([&] {
      if (runtime_.rank() != 0) return;
      publish_checkpoint(dir_, state, records);
      prune_checkpoints(dir_, keep_, state.step);
    });
  } catch (...) {
    if (runtime_.rank() == 0) abandon_checkpoint(dir_, state.step);
    throw;
  }
}

}  // namespace deltapipe
