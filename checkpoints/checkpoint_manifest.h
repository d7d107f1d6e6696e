// What a training checkpoint says about itself: the state of the run, the files and the tensors. Stored as
// manifest.json, whose first line carries the XXH3 hash of every byte after it; it is written last and names size and
// hash of each other file, so no flipped byte anywhere goes unseen.
#pragma once

#include "core/tensor.h"

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace deltapipe {

/// The mesh that wrote a checkpoint; a reader may have any other.
struct SavedMesh {
  int data = 1;
  int pipeline = 1;
  int sequence = 1;
  int ranks() const { return data * pipeline * sequence; }
  friend bool operator==(const SavedMesh&, const SavedMesh&) = default;
};

/// Everything besides tensors that a run needs to go on exactly where it was.
struct TrainingState {
  std::int64_t step = 0;              // optimizer steps done, skipped ones included
  std::int64_t stage = 0;             // index into the recipe's stages
  std::int64_t stage_step = 0;        // steps done in that stage
  std::uint64_t data_epoch = 0;       // with data_position: the loader's whole state
  std::uint64_t data_position = 0;    // sequences taken since the start of the stage
  std::uint64_t tokens_seen = 0;      // over all stages and ranks
  std::int64_t skipped_steps = 0;     // for a non-finite loss or gradient, in the whole run
  std::int64_t skipped_in_a_row = 0;  // of those, the latest without a good step between
  std::map<std::string, std::uint64_t> seeds;
  std::map<std::string, double> values;  // anything else, such as a loss average; any double, bit for bit but NaNs
  SavedMesh mesh;
  std::string config_toml;   // the run's configuration as text
  std::string model_config;  // the student's config.json as an export would have it; it fixes the tensors' shapes
  friend bool operator==(const TrainingState&, const TrainingState&) = default;
};

struct TensorInfo {
  std::string group;  // "master", "exp_avg" or "exp_avg_sq"
  std::string name;   // Hugging Face name
  DType dtype = DType::f32;
  Shape shape;  // of the whole tensor
};

namespace manifest {

constexpr int version = 1;
constexpr const char* file_name = "manifest.json";
constexpr const char* whole_file_name = "checkpoint.h5";

/// "rank-00003.h5"
std::string rank_file_name(std::int64_t rank);

struct FileEntry {
  std::string name;
  std::uint64_t bytes = 0;
  std::uint64_t hash = 0;  // XXH3, 64 bits
};

/// Flat elements [begin, end) of a tensor lie in the file of `rank`.
struct SliceEntry {
  int rank = 0;
  std::int64_t begin = 0;
  std::int64_t end = 0;
};

struct TensorEntry : TensorInfo {
  std::vector<SliceEntry> slices;  // ascending; they cover the tensor once
};

struct Manifest {
  TrainingState state;
  std::vector<FileEntry> files;      // those of rank 0, 1, ..., then checkpoint.h5
  std::vector<TensorEntry> tensors;  // by group, then name
};

/// Empty when ascending slices cover [0, numel) exactly once; otherwise what is wrong.
std::string describe_gap(const TensorEntry& tensor);

std::string format(const Manifest& manifest);
/// `where` is the file's path, for messages. Throws FormatError.
Manifest parse(std::string_view text, const std::string& where);

}  // namespace manifest
}  // namespace deltapipe
