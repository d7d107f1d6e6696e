// The mesh: world = data x pipeline x sequence, sequence fastest, so that the ranks that talk most are neighbours:
//   rank = (data * P + pipeline) * N + sequence
// for D data-parallel replicas, P pipeline stages and N ranks a sequence.
#pragma once

#include "comm/communicator.h"
#include "comm/mpi_runtime.h"

#include <memory>
#include <string_view>
#include <vector>

namespace deltapipe {

/// The groups that a rank belongs to. `data_sequence` joins data and sequence (ordered data first): the ranks that hold
/// the same layers, over which gradients are summed and the optimizer is sharded.
enum class Axis : std::uint8_t { data, pipeline, sequence, data_sequence, world };
inline constexpr std::size_t axis_count = 5;
std::string_view name_of(Axis axis);

struct Coordinate {
  int data = 0, pipeline = 0, sequence = 0;
  friend bool operator==(const Coordinate&, const Coordinate&) = default;
};

struct MeshShape {
  int data = 1, pipeline = 1, sequence = 1;  // 0: what the others leave, for at most one
  friend bool operator==(const MeshShape&, const MeshShape&) = default;

  /// The shape for `world` ranks, without zeros. Throws ConfigError when there is none.
  MeshShape resolve(int world) const;

  // Of a resolved shape.
  int size() const { return data * pipeline * sequence; }
  Coordinate coordinate_of(int rank) const;
  int rank_of(const Coordinate& c) const { return (c.data * pipeline + c.pipeline) * sequence + c.sequence; }
  /// World ranks of the group of `rank` along `axis`, in the order of that axis' communicator.
  std::vector<int> group_ranks(Axis axis, int rank) const;
};

/// This rank's place and its communicators.
class Mesh {
 public:
  /// Collective over the world. `runtime` outlives the mesh. Throws ConfigError as MeshShape::resolve does.
  /// On a CUDA device communicators carry its memory, over NCCL, and host memory as before.
  Mesh(MpiRuntime& runtime, const MeshShape& shape, Device device = {});
  /// The mesh as `rank` of a resolved shape would see it, without the other ranks: for dry streams alone.
  Mesh(const MeshShape& shape, int rank, Device device = {});
  /// A rank by itself.
  Mesh() : Mesh(MeshShape(), 0) {}

  const MeshShape& shape() const { return shape_; }
  const Coordinate& coordinate() const { return coordinate_; }
  int rank() const { return shape_.rank_of(coordinate_); }

  Communicator& operator[](Axis axis);

 private:
  MeshShape shape_;
  Coordinate coordinate_;
  std::array<std::unique_ptr<Communicator>, axis_count> communicators_;  // the world's is the runtime's, unless planned
  std::array<std::unique_ptr<Communicator>, axis_count> device_communicators_;  // on CUDA; they use those above
  Communicator* world_;
};

}  // namespace deltapipe
