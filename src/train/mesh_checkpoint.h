// Training checkpoints of all ranks of a job, written in the background (checkpoints/training_checkpoint.h has the
// parts).
#pragma once

#include "checkpoints/slice_buffer.h"
#include "checkpoints/training_checkpoint.h"
#include "comm/mpi_runtime.h"

#include <filesystem>
#include <future>
#include <memory>
#include <optional>
#include <span>

namespace deltapipe {

/// Every rank has one and makes the same calls. Throws on all ranks when writing fails on any: IoError, or PeerError
/// where another rank tells; the partial checkpoint is gone then and the ones before it stay. One that is neither
/// finished nor failed when this object goes leaves its partial folder to the next writer.
class MeshCheckpointWriter {
 public:
  /// `keep` as for CheckpointWriter. Rank 0 makes `dir`, on a file system that all ranks share.
  MeshCheckpointWriter(MpiRuntime& runtime, std::filesystem::path dir, int keep);
  ~MeshCheckpointWriter();
  MeshCheckpointWriter(const MeshCheckpointWriter&) = delete;
  MeshCheckpointWriter& operator=(const MeshCheckpointWriter&) = delete;

  /// Finishes the write before, copies the slices and returns; this rank's file follows in the background.
  /// `stream` is of the slices' device.
  void write(const TrainingState& state, std::span<const TensorSlice> slices, const Stream& stream = Stream::cpu());
  /// Whether this rank has written all it has to; true when nothing is under way.
  bool is_done() const;
  /// Waits for every rank's file, and rank 0 gives the checkpoint its name. With several ranks a checkpoint exists
  /// after this alone.
  void finish();

 private:
  MpiRuntime& runtime_;
  std::optional<CheckpointWriter> alone_;  // a job of one rank: publishing too goes on in the background
  std::filesystem::path dir_;
  int keep_;
  SliceBuffer buffer_;
  std::optional<TrainingState> state_;  // of the write under way
  std::future<FileRecord> pending_;
};

}  // namespace deltapipe
