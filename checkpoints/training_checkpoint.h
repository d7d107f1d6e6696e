// Training checkpoints: DIR/step-00000123/{rank-00000.h5, ..., checkpoint.h5, manifest.json}.
//
//   rank-R.h5       datasets /master/NAME, /exp_avg/NAME, /exp_avg_sq/NAME: 1-D slices of that rank, each with
//                   attributes begin, end (flat elements of the whole tensor) and shape (of the whole tensor)
//   checkpoint.h5   the same paths as virtual datasets of true shape over the rank files beside it, for any HDF5 reader
//   manifest.json   the state of the run, size and hash of each file, the place of each tensor
//
// A checkpoint is built as DIR/.step-00000123.partial, fsynced and renamed: it exists whole or not at all. One run
// writes into DIR at a time. Names beginning with a dot are leftovers that the next writer removes and no reader takes.
//
// Errors: IoError when the system refuses, FormatError when a file is damaged; both name it.
#pragma once

#include "checkpoints/checkpoint_manifest.h"
#include "core/hdf5.h"
#include "core/stream.h"
#include "core/tensor.h"

#include <cstdint>
#include <filesystem>
#include <future>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace deltapipe {

/// This rank's part of a tensor. A rank holds at most one slice of a tensor in a group; empty slices are left out.
struct TensorSlice {
  std::string group;  // "master", "exp_avg" or "exp_avg_sq"
  std::string name;   // Hugging Face name
  Shape shape;        // of the whole tensor, at least one dimension
  std::int64_t begin = 0;
  std::int64_t end = 0;
  Tensor data;  // end - begin elements, on any device for the writers, in host memory for write_rank_file
};

class SliceBuffer;

/// Writes checkpoints of a run of one rank in the background.
class CheckpointWriter {
 public:
  /// After each write only the `keep` newest whole checkpoints of `dir` stay (0: all); the one just written always
  /// does, damaged ones are left for a person to look at. Makes `dir`; throws IoError when that fails.
  CheckpointWriter(std::filesystem::path dir, int keep);
  /// Waits; logs an error that nobody has asked for.
  ~CheckpointWriter();
  CheckpointWriter(const CheckpointWriter&) = delete;
  CheckpointWriter& operator=(const CheckpointWriter&) = delete;

  /// Waits for the previous write and rethrows its error (then nothing new is begun). Copies the slices into a buffer
  /// that later calls reuse, and returns: the memory they point to may change at once, the files follow. A step that
  /// is there already is replaced. `stream` is of the slices' device.
  void write(const TrainingState& state, std::span<const TensorSlice> slices, const Stream& stream = Stream::cpu());
  /// Until the last write is on disk. Rethrows its error, once; its partial folder is gone then.
  void wait();
  bool is_writing() const;

 private:
  std::filesystem::path dir_;
  int keep_;
  std::unique_ptr<SliceBuffer> buffer_;
  std::future<void> pending_;
};

/// The parts of a write, for several ranks on one file system:
///   rank 0 begin_checkpoint; barrier; every rank write_rank_file; gather the records (16 bytes a rank) on rank 0;
///   rank 0 publish_checkpoint, prune_checkpoints. On any rank's failure: rank 0 abandon_checkpoint.
struct FileRecord {
  std::uint64_t bytes = 0;
  std::uint64_t hash = 0;  // XXH3, 64 bits
};
/// Removes leftovers in `dir` and makes the partial folder of this step, which it returns.
std::filesystem::path begin_checkpoint(const std::filesystem::path& dir, std::int64_t step);
std::filesystem::path partial_folder(const std::filesystem::path& dir, std::int64_t step);
/// Writes and fsyncs this rank's file into the partial folder.
FileRecord write_rank_file(const std::filesystem::path& partial, int rank, std::span<const TensorSlice> slices);
/// Joins the rank files (records in order of rank), writes the manifest, and gives the checkpoint its name. Throws
/// InternalError when the slices of all ranks do not cover each tensor exactly once. Returns its folder.
std::filesystem::path publish_checkpoint(const std::filesystem::path& dir, const TrainingState& state,
                                         std::span<const FileRecord> records);
/// As CheckpointWriter's `keep`. Failures are warnings: the new checkpoint is whole.
void prune_checkpoints(const std::filesystem::path& dir, int keep, std::int64_t just_written);
/// Removes the partial folder; never throws.
void abandon_checkpoint(const std::filesystem::path& dir, std::int64_t step) noexcept;

/// "step-00000123"
std::string checkpoint_name(std::int64_t step);
/// The checkpoint of the highest step whose manifest is whole and whose files are there in full size; others are passed
/// over with a warning that says why. Hashes are left to CheckpointReader. nullopt: none, or no such folder.
std::optional<std::filesystem::path> newest_checkpoint(const std::filesystem::path& dir);
/// What a user means: a checkpoint's own folder, a folder of checkpoints, or its "latest". Throws IoError.
std::filesystem::path find_checkpoint(const std::filesystem::path& path);
TrainingState read_state(const std::filesystem::path& folder);

/// Reads any part of any tensor, whatever mesh wrote it.
class CheckpointReader {
 public:
  /// Sizes are always verified on construction. Hashes: `everything` on construction, every file, on all cores;
  /// `on_use` each rank file before its first element is read.
  enum class Verify { everything, on_use };
  explicit CheckpointReader(std::filesystem::path folder, Verify verify = Verify::everything);

  const std::filesystem::path& folder() const { return folder_; }
  const TrainingState& state() const { return manifest_.state; }
  /// By group, then name.
  std::vector<TensorInfo> tensors() const;
  bool contains(std::string_view group, std::string_view name) const;
  /// Flat elements [begin, end) into host memory of the stored dtype and end - begin elements.
  void read(std::string_view group, std::string_view name, std::int64_t begin, std::int64_t end, const Tensor& out);

 private:
  const manifest::TensorEntry* find(std::string_view group, std::string_view name) const;
  const hdf5::File& rank_file(int rank);

  std::filesystem::path folder_;
  manifest::Manifest manifest_;
  Verify verify_;
  std::map<int, hdf5::File> open_;
};

/// A table for people: the state, files and tensors. Reads the manifest alone.
std::string describe_checkpoint(const std::filesystem::path& folder);

}  // namespace deltapipe
