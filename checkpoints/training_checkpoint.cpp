#include "checkpoints/training_checkpoint.h"

#include "checkpoints/slice_buffer.h"
#include "core/error.h"
#include "core/file.h"
#include "core/log.h"
#include "core/parallel.h"

#include <fcntl.h>
#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <iterator>
#include <system_error>
#include <tuple>
#include <utility>

namespace deltapipe {
namespace fs = std::filesystem;
using manifest::Manifest;
using manifest::SliceEntry;
using manifest::TensorEntry;

namespace {

constexpr std::string_view step_prefix = "step-";
constexpr std::string_view partial_suffix = ".partial";
constexpr std::string_view deleting_suffix = ".deleting";

fs::path hidden(const fs::path& dir, std::int64_t step, std::string_view suffix) {
  return dir / fmt::format(".{}{}", checkpoint_name(step), suffix);
}

/// The step of a checkpoint's folder name; nullopt for any other name.
std::optional<std::int64_t> step_of(std::string_view name) {
  if (!name.starts_with(step_prefix)) return std::nullopt;
  name.remove_prefix(step_prefix.size());
  std::int64_t step = 0;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), step);
  if (error != std::errc() || end != name.data() + name.size() || step < 0) return std::nullopt;
  return step;
}

std::vector<std::string> names_in(const fs::path& dir) {
  std::error_code error;
  std::vector<std::string> names;
  fs::directory_iterator it(dir, error);
  if (error == std::errc::no_such_file_or_directory) return names;
  for (; !error && it != fs::directory_iterator(); it.increment(error)) names.push_back(it->path().filename().string());
  if (error) fail<IoError>("cannot list {}: {}", dir.string(), error.message());
  return names;
}

/// Steps that have a folder, highest first.
std::vector<std::int64_t> steps_in(const fs::path& dir) {
  std::vector<std::int64_t> steps;
  for (const std::string& name : names_in(dir)) {
    // A name with fewer or more zeros is not one of ours.
    if (const auto step = step_of(name); step && checkpoint_name(*step) == name) steps.push_back(*step);
  }
  std::sort(steps.begin(), steps.end(), std::greater<>());
  return steps;
}

void remove_folder(const fs::path& path) {
  std::error_code error;
  fs::remove_all(path, error);
  // Where the parent itself is gone there is nothing to remove.
  if (error && error != std::errc::not_a_directory) log::warn("cannot remove {}: {}", path.string(), error.message());
}

void rename_path(const fs::path& from, const fs::path& to) {
  if (std::rename(from.c_str(), to.c_str()) != 0) {
    fail<IoError>("cannot rename {} to {}: {}", from.string(), to.filename().string(), std::strerror(errno));
  }
}

/// Leftovers of a run that was killed.
void remove_leftovers(const fs::path& dir) {
  for (const std::string& name : names_in(dir)) {
    if (!name.starts_with(".") || !std::string_view(name).substr(1).starts_with(step_prefix)) continue;
    if (name.ends_with(partial_suffix) || name.ends_with(deleting_suffix)) remove_folder(dir / name);
  }
}

/// Under another name first: a half-removed folder is never taken for a checkpoint.
void remove_checkpoint(const fs::path& dir, std::int64_t step) {
  const fs::path doomed = hidden(dir, step, deleting_suffix);
  rename_path(dir / checkpoint_name(step), doomed);
  remove_folder(doomed);
}

FileRecord record_of(const fs::path& path) {
  FileRecord record;
  std::error_code error;
  record.bytes = fs::file_size(path, error);
  if (error) fail<IoError>("cannot examine {}: {}", path.string(), error.message());
  const std::string hex = hash_file_hex(path);
  std::from_chars(hex.data(), hex.data() + hex.size(), record.hash, 16);
  return record;
}

void verify_size(const fs::path& folder, const manifest::FileEntry& file) {
  const fs::path path = folder / file.name;
  std::error_code error;
  const std::uint64_t bytes = fs::file_size(path, error);
  if (error == std::errc::no_such_file_or_directory) fail<FormatError>("{}: damaged: is missing", path.string());
  if (error) fail<IoError>("cannot examine {}: {}", path.string(), error.message());
  if (bytes != file.bytes) {
    fail<FormatError>("{}: damaged: has {} bytes, the manifest says {}", path.string(), bytes, file.bytes);
  }
}

void verify_hash(const fs::path& folder, const manifest::FileEntry& file) {
  const fs::path path = folder / file.name;
  if (record_of(path).hash != file.hash) {
    fail<FormatError>("{}: damaged: its content does not have the hash that the manifest gives", path.string());
  }
}

Manifest read_manifest(const fs::path& folder) {
  const fs::path path = folder / manifest::file_name;
  std::error_code error;
  if (!fs::is_directory(folder, error)) fail<IoError>("{}: there is no such checkpoint folder", folder.string());
  if (!fs::exists(path, error) && !error) {
    fail<FormatError>("{}: is not a whole checkpoint: it has no {}", folder.string(), manifest::file_name);
  }
  return manifest::parse(read_file(path), path.string());
}

/// Manifest and sizes, not hashes.
Manifest read_whole_manifest(const fs::path& folder) {
  Manifest m = read_manifest(folder);
  for (const auto& file : m.files) verify_size(folder, file);
  return m;
}

bool is_whole(const fs::path& folder) {
  try {
    read_whole_manifest(folder);
    return true;
  } catch (const Error& e) {
    log::warn("checkpoint passed over: {}", e.what());
    return false;
  }
}

std::string dataset_path(std::string_view group, std::string_view name) { return fmt::format("/{}/{}", group, name); }

/// Every tensor that the rank files hold, by group and name, its slices in ascending order.
std::vector<TensorEntry> gather_tensors(const fs::path& partial, std::size_t ranks) {
  std::map<std::pair<std::string, std::string>, TensorEntry> found;
  for (std::size_t rank = 0; rank < ranks; ++rank) {
    const auto file = hdf5::File::open(partial / manifest::rank_file_name(static_cast<std::int64_t>(rank)));
    for (const std::string& group : file.list("/")) {
      for (const std::string& name : file.list("/" + group)) {
        const std::string path = dataset_path(group, name);
        const hdf5::Dataset dataset = file.dataset(path);
        TensorEntry entry{{group, name, dataset.dtype(), {}}, {}};
        for (std::int64_t d : file.attribute<std::vector<std::int64_t>>(path, "shape")) entry.shape.append(d);
        const auto [at, is_new] = found.try_emplace({group, name}, entry);
        TensorEntry& known = at->second;
        if (known.dtype != entry.dtype || known.shape != entry.shape) {
          fail<InternalError>("checkpoint: {} is {} {} on rank {}, {} {} on a rank before", path, name_of(entry.dtype),
                              entry.shape.str(), rank, name_of(known.dtype), known.shape.str());
        }
        known.slices.push_back({static_cast<int>(rank), file.attribute<std::int64_t>(path, "begin"),
                                file.attribute<std::int64_t>(path, "end")});
      }
    }
  }
  std::vector<TensorEntry> tensors;
  for (auto& [key, entry] : found) {
    std::sort(entry.slices.begin(), entry.slices.end(),
              [](const SliceEntry& a, const SliceEntry& b) { return a.begin < b.begin; });
    if (const std::string gap = manifest::describe_gap(entry); !gap.empty()) fail<InternalError>("checkpoint: {}", gap);
    tensors.push_back(std::move(entry));
  }
  return tensors;
}

void write_whole_file(const fs::path& path, std::int64_t step, std::span<const TensorEntry> tensors) {
  hdf5::File file = hdf5::File::create(path);
  file.set_attribute("/", "format", "deltapipe training checkpoint");
  file.set_attribute("/", "version", std::int64_t{manifest::version});
  file.set_attribute("/", "step", step);
  for (const TensorEntry& t : tensors) {
    const std::string dataset = dataset_path(t.group, t.name);
    std::vector<hdf5::VirtualPiece> pieces;
    for (const SliceEntry& s : t.slices) {
      pieces.push_back({manifest::rank_file_name(s.rank), dataset, s.end - s.begin, 0, s.begin, s.end});
    }
    file.create_virtual(dataset, t.dtype, t.shape, pieces);
  }
  file.close();
  sync_path(path);
}

/// Gives the partial folder its name. A checkpoint of that step which is there already changes places with it in one
/// operation where the file system can do that, so that one of the two always exists.
void rename_into_place(const fs::path& dir, std::int64_t step) {
  const fs::path partial = partial_folder(dir, step);
  const fs::path target = dir / checkpoint_name(step);
  const fs::path old = hidden(dir, step, deleting_suffix);
  std::error_code error;
  if (!fs::exists(target, error)) {
    rename_path(partial, target);
    sync_path(dir);
    return;
  }
  if (renameat2(AT_FDCWD, partial.c_str(), AT_FDCWD, target.c_str(), RENAME_EXCHANGE) == 0) {
    rename_path(partial, old);
  } else {
    rename_path(target, old);
    rename_path(partial, target);
  }
  sync_path(dir);
  remove_folder(old);
}

void check_slice(const TensorSlice& s) {
  const auto usable = [](const std::string& name) {
    return !name.empty() && name != "." && name.find('/') == std::string::npos && name.find('\0') == std::string::npos;
  };
  if (!usable(s.group) || !usable(s.name)) {
    fail<InternalError>("checkpoint: \"{}\" / \"{}\" cannot name a tensor", s.group, s.name);
  }
  if (s.shape.rank() == 0 || s.begin < 0 || s.end <= s.begin || s.end > s.shape.numel() ||
      s.data.numel() != s.end - s.begin) {
    fail<InternalError>("checkpoint: slice [{}, {}) of {} {} {}, with {} elements of data, is not possible", s.begin,
                        s.end, s.group, s.name, s.shape.str(), s.data.numel());
  }
}

}  // namespace

std::string checkpoint_name(std::int64_t step) { return fmt::format("{}{:08}", step_prefix, step); }

fs::path partial_folder(const fs::path& dir, std::int64_t step) { return hidden(dir, step, partial_suffix); }

fs::path begin_checkpoint(const fs::path& dir, std::int64_t step) {
  require(step >= 0, "checkpoint: a step is not negative");
  remove_leftovers(dir);
  const fs::path partial = partial_folder(dir, step);
  make_writable_folder(partial);
  return partial;
}

FileRecord write_rank_file(const fs::path& partial, int rank, std::span<const TensorSlice> slices) {
  const fs::path path = partial / manifest::rank_file_name(rank);
  hdf5::File file = hdf5::File::create(path);
  for (const TensorSlice& s : slices) {
    check_slice(s);
    require(s.data.device.is_cpu(), "write_rank_file: a slice is not in host memory");
    const std::string name = dataset_path(s.group, s.name);
    file.create_dataset(name, s.data.dtype, {s.end - s.begin}).write(s.data);
    file.set_attribute(name, "begin", s.begin);
    file.set_attribute(name, "end", s.end);
    std::vector<std::int64_t> dims;
    for (int i = 0; i < s.shape.rank(); ++i) dims.push_back(s.shape[i]);
    file.set_attribute(name, "shape", dims);
  }
  file.close();
  sync_path(path);
  return record_of(path);
}

fs::path publish_checkpoint(const fs::path& dir, const TrainingState& state, std::span<const FileRecord> records) {
  const fs::path partial = partial_folder(dir, state.step);
  Manifest m;
  m.state = state;
  for (const FileRecord& r : records) {
    m.files.push_back({manifest::rank_file_name(static_cast<std::int64_t>(m.files.size())), r.bytes, r.hash});
  }
  m.tensors = gather_tensors(partial, records.size());
  write_whole_file(partial / manifest::whole_file_name, state.step, m.tensors);
  const FileRecord whole = record_of(partial / manifest::whole_file_name);
  m.files.push_back({manifest::whole_file_name, whole.bytes, whole.hash});
  write_file_atomically(partial / manifest::file_name, manifest::format(m));
  sync_path(partial);
  rename_into_place(dir, state.step);
  return dir / checkpoint_name(state.step);
}

void prune_checkpoints(const fs::path& dir, int keep, std::int64_t just_written) {
  if (keep <= 0) return;
  try {
    int kept = 1;  // the one just written
    for (const std::int64_t step : steps_in(dir)) {
      if (step == just_written || !is_whole(dir / checkpoint_name(step))) continue;
      if (kept < keep) {
        ++kept;
      } else {
        remove_checkpoint(dir, step);
      }
    }
  } catch (const Error& e) {
    log::warn("old checkpoints stay: {}", e.what());
  }
}

void abandon_checkpoint(const fs::path& dir, std::int64_t step) noexcept {
  try {
    remove_folder(partial_folder(dir, step));
  } catch (...) {
    // Out of memory while making a message; begin_checkpoint removes the leftover.
  }
}

CheckpointWriter::CheckpointWriter(fs::path dir, int keep)
    : dir_(std::move(dir)), keep_(keep), buffer_(std::make_unique<SliceBuffer>()) {
  make_writable_folder(dir_);
}

CheckpointWriter::~CheckpointWriter() {
  try {
    wait();
  } catch (const std::exception& e) {
    log::error("checkpoint not written: {}", e.what());
  }
}

void CheckpointWriter::write(const TrainingState& state, std::span<const TensorSlice> slices, const Stream& stream) {
  wait();
  for (const TensorSlice& s : slices) check_slice(s);
  std::vector<TensorSlice> copies = buffer_->copy(slices, stream);
  pending_ = std::async(std::launch::async, [dir = dir_, keep = keep_, state, copies = std::move(copies)] {
    try {
      const FileRecord record = write_rank_file(begin_checkpoint(dir, state.step), 0, copies);
      publish_checkpoint(dir, state, std::span(&record, 1));
    } catch (...) {
      abandon_checkpoint(dir, state.step);
      throw;
    }
    prune_checkpoints(dir, keep, state.step);
  });
}

void CheckpointWriter::wait() {
  if (pending_.valid()) pending_.get();
}

bool CheckpointWriter::is_writing() const {
  return pending_.valid() && pending_.wait_for(std::chrono::seconds(0)) != std::future_status::ready;
}

std::optional<fs::path> newest_checkpoint(const fs::path& dir) {
  for (const std::int64_t step : steps_in(dir)) {
    if (const fs::path folder = dir / checkpoint_name(step); is_whole(folder)) return folder;
  }
  return std::nullopt;
}

fs::path find_checkpoint(const fs::path& wanted) {
  std::error_code error;
  const fs::path path = wanted.has_filename() ? wanted : wanted.parent_path();  // without a slash at the end
  if (fs::exists(path / manifest::file_name, error)) return path;
  const bool latest = path.filename() == "latest" && !fs::exists(path, error);
  const fs::path dir = !latest ? path : path.has_parent_path() ? path.parent_path() : fs::path(".");
  if (!fs::is_directory(dir, error)) fail<IoError>("{}: there is no such checkpoint folder", path.string());
  if (auto found = newest_checkpoint(dir)) return *found;
  fail<IoError>("{}: holds no whole checkpoint", dir.string());
}

TrainingState read_state(const fs::path& folder) { return read_manifest(folder).state; }

CheckpointReader::CheckpointReader(fs::path folder, Verify verify)
    : folder_(std::move(folder)), manifest_(read_whole_manifest(folder_)), verify_(verify) {
  if (verify_ == Verify::everything) {
    const auto& files = manifest_.files;
    parallel_for(static_cast<std::int64_t>(files.size()),
                 [&](std::int64_t i) { verify_hash(folder_, files[static_cast<std::size_t>(i)]); });
  }
}

std::vector<TensorInfo> CheckpointReader::tensors() const {
  return {manifest_.tensors.begin(), manifest_.tensors.end()};
}

const TensorEntry* CheckpointReader::find(std::string_view group, std::string_view name) const {
  const auto key = std::tie(group, name);
  const auto at = std::lower_bound(manifest_.tensors.begin(), manifest_.tensors.end(), key,
                                   [](const TensorEntry& t, const std::tuple<std::string_view, std::string_view>& k) {
                                     return std::tuple<std::string_view, std::string_view>(t.group, t.name) < k;
                                   });
  return at != manifest_.tensors.end() && at->group == group && at->name == name ? &*at : nullptr;
}

bool CheckpointReader::contains(std::string_view group, std::string_view name) const {
  return find(group, name) != nullptr;
}

const hdf5::File& CheckpointReader::rank_file(int rank) {
  const auto at = open_.find(rank);
  if (at != open_.end()) return at->second;
  const auto& file = manifest_.files[static_cast<std::size_t>(rank)];
  if (verify_ == Verify::on_use) verify_hash(folder_, file);
  return open_.emplace(rank, hdf5::File::open(folder_ / file.name)).first->second;
}

void CheckpointReader::read(std::string_view group, std::string_view name, std::int64_t begin, std::int64_t end,
                            const Tensor& out) {
  const TensorEntry* tensor = find(group, name);
  if (tensor == nullptr) fail<FormatError>("{}: holds no {} of {}", folder_.string(), group, name);
  if (out.dtype != tensor->dtype) {
    fail<FormatError>("{}: {} of {} is {}, expected {}", folder_.string(), group, name, name_of(tensor->dtype),
                      name_of(out.dtype));
  }
  if (begin < 0 || end < begin || end > tensor->shape.numel() || out.numel() != end - begin) {
    fail<InternalError>("checkpoint: elements [{}, {}) of {} {} {} cannot be read into {}", begin, end, group, name,
                        tensor->shape.str(), out.shape.str());
  }
  const std::string path = dataset_path(group, name);
  for (const SliceEntry& s : tensor->slices) {
    const std::int64_t from = std::max(begin, s.begin);
    const std::int64_t to = std::min(end, s.end);
    if (from >= to) continue;
    const auto offset = static_cast<std::size_t>(from - begin) * size_of(out.dtype);
    const Tensor part(static_cast<std::byte*>(out.data) + offset, out.dtype, {to - from});
    rank_file(s.rank).dataset(path).read(from - s.begin, part);
  }
}

std::string describe_checkpoint(const fs::path& folder) {
  const Manifest m = read_manifest(folder);
  const TrainingState& s = m.state;
  std::string text;
  const auto line = [&](std::string_view key, const std::string& value) {
    fmt::format_to(std::back_inserter(text), "{:<18}{}\n", key, value);
  };
  line("checkpoint", folder.string());
  line("step", fmt::format("{} (stage {}, step {} of it)", s.step, s.stage, s.stage_step));
  line("tokens seen", fmt::format("{}", s.tokens_seen));
  line("data", fmt::format("epoch {}, position {}", s.data_epoch, s.data_position));
  line("skipped steps", fmt::format("{}, of those {} just now in a row", s.skipped_steps, s.skipped_in_a_row));
  line("mesh", fmt::format("data {}, pipeline {}, sequence {}", s.mesh.data, s.mesh.pipeline, s.mesh.sequence));
  for (const auto& [name, seed] : s.seeds) line("seed " + name, fmt::format("{}", seed));
  for (const auto& [name, value] : s.values) line(name, fmt::format("{}", value));
  text += "\n";
  for (const auto& file : m.files) {
    fmt::format_to(std::back_inserter(text), "{:<18}{:>16} bytes  {:016x}\n", file.name, file.bytes, file.hash);
  }
  std::size_t width = 0;
  for (const TensorEntry& t : m.tensors) width = std::max(width, t.name.size());
  std::string group;
  for (const TensorEntry& t : m.tensors) {
    if (t.group != group) {
      group = t.group;
      std::int64_t tensors = 0;
      std::int64_t elements = 0;
      for (const TensorEntry& other : m.tensors) {
        if (other.group != group) continue;
        ++tensors;
        elements += other.shape.numel();
      }
      fmt::format_to(std::back_inserter(text), "\n{}: {} tensors, {} elements\n", group, tensors, elements);
    }
    fmt::format_to(std::back_inserter(text), "  {:<{}}  {:<9} {}\n", t.name, width, name_of(t.dtype), t.shape.str());
  }
  return text;
}

}  // namespace deltapipe
