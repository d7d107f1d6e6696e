#include "comm/mesh.h"

#include "comm/mpi_communicator.h"

#include <algorithm>

namespace deltapipe {

std::string_view name_of(Axis axis) {
  switch (axis) {
    case Axis::data: return "data";
    case Axis::pipeline: return "pipeline";
    case Axis::sequence: return "sequence";
    case Axis::data_sequence: return "data_sequence";
    case Axis::world: return "world";
  }
  return "?";
}

MeshShape MeshShape::resolve(int world) const {
  MeshShape out = *this;
  struct Entry {
    const char* key;
    int& value;
  };
  const std::array<Entry, 3> entries{
      {{"mesh.data", out.data}, {"mesh.pipeline", out.pipeline}, {"mesh.sequence", out.sequence}}};
  const Entry* automatic = nullptr;
  std::int64_t product = 1;  // of what is given, and at most 2^31: it cannot overflow
  for (const Entry& e : entries) {
    if (e.value < 0) fail<ConfigError>("{} = {}: expected a number of ranks, or 0 for the ranks left", e.key, e.value);
    if (e.value > 0) {
      product = std::min<std::int64_t>(product * e.value, std::int64_t{1} << 31);
      continue;
    }
    if (automatic != nullptr) {
      fail<ConfigError>("{} and {} are both 0: at most one may be found from the number of ranks", automatic->key,
                        e.key);
    }
    automatic = &e;
  }
  if (automatic != nullptr && world % product == 0) {
    automatic->value = static_cast<int>(world / product);
    product = world;
  }
  if (product != world) {
    const char* rule = automatic != nullptr ? "must divide" : "must be";
    fail<ConfigError>("mesh.data = {} x mesh.pipeline = {} x mesh.sequence = {} {} the number of ranks started, {}",
                      data, pipeline, sequence, rule, world);
  }
  return out;
}

Coordinate MeshShape::coordinate_of(int rank) const {
  require(rank >= 0 && rank < size(), "MeshShape::coordinate_of: rank outside the mesh");
  return {rank / (pipeline * sequence), rank / sequence % pipeline, rank % sequence};
}

std::vector<int> MeshShape::group_ranks(Axis axis, int rank) const {
  const Coordinate own = coordinate_of(rank);
  const bool along_data = axis == Axis::data || axis == Axis::data_sequence || axis == Axis::world;
  const bool along_pipeline = axis == Axis::pipeline || axis == Axis::world;
  const bool along_sequence = axis == Axis::sequence || axis == Axis::data_sequence || axis == Axis::world;
  std::vector<int> ranks;
  for (int other = 0; other < size(); ++other) {
    const Coordinate c = coordinate_of(other);
    if ((along_data || c.data == own.data) && (along_pipeline || c.pipeline == own.pipeline) &&
        (along_sequence || c.sequence == own.sequence)) {
      ranks.push_back(other);
    }
  }
  return ranks;
}

Mesh::Mesh(MpiRuntime& runtime, const MeshShape& shape, Device device)
    : shape_(shape.resolve(runtime.size())),
      coordinate_(shape_.coordinate_of(runtime.rank())),
      world_(&runtime.world()) {
  for (std::size_t i = 0; i + 1 < communicators_.size(); ++i) {
    const auto axis = static_cast<Axis>(i);
    // A group is told from the others by its first rank.
    communicators_[i] = runtime.split(shape_.group_ranks(axis, rank()).front(), rank(), std::string(name_of(axis)));
  }
  if (device.is_cpu()) return;
  for (std::size_t i = 0; i < device_communicators_.size(); ++i) {
    device_communicators_[i] = runtime.on_device((*this)[static_cast<Axis>(i)], device);
  }
}

Mesh::Mesh(const MeshShape& shape, int rank, Device device) : shape_(shape), coordinate_(shape.coordinate_of(rank)) {
  for (std::size_t i = 0; i < communicators_.size(); ++i) {
    const auto axis = static_cast<Axis>(i);
    const std::vector<int> group = shape_.group_ranks(axis, rank);
    const auto place = std::find(group.begin(), group.end(), rank) - group.begin();
    communicators_[i] = planned_communicator(static_cast<int>(place), static_cast<int>(group.size()),
                                             std::string(name_of(axis)), device);
  }
  world_ = communicators_.back().get();
}

Communicator& Mesh::operator[](Axis axis) {
  if (const auto& on_device = device_communicators_[static_cast<std::size_t>(axis)]) return *on_device;
  return axis == Axis::world ? *world_ : *communicators_[static_cast<std::size_t>(axis)];
}

}  // namespace deltapipe
