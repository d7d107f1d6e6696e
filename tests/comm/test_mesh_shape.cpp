#include "comm/mesh.h"

#include <gtest/gtest.h>

#include <set>

namespace deltapipe {
namespace {

std::string config_error(const MeshShape& shape, int world) {
  try {
    shape.resolve(world);
  } catch (const ConfigError& e) {
    return e.what();
  }
  return "";
}

TEST(MeshShape, ResolvesOneZero) {
  EXPECT_EQ((MeshShape{0, 4, 2}.resolve(16)), (MeshShape{2, 4, 2}));
  EXPECT_EQ((MeshShape{3, 0, 2}.resolve(6)), (MeshShape{3, 1, 2}));
  EXPECT_EQ((MeshShape{1, 1, 0}.resolve(7)), (MeshShape{1, 1, 7}));
  EXPECT_EQ((MeshShape{2, 2, 2}.resolve(8)), (MeshShape{2, 2, 2}));
}

TEST(MeshShape, SaysWhatDoesNotFit) {
  EXPECT_EQ(config_error({2, 2, 2}, 6),
            "mesh.data = 2 x mesh.pipeline = 2 x mesh.sequence = 2 must be the number of ranks started, 6");
  EXPECT_EQ(config_error({0, 4, 1}, 6),
            "mesh.data = 0 x mesh.pipeline = 4 x mesh.sequence = 1 must divide the number of ranks started, 6");
  EXPECT_EQ(config_error({0, 1, 0}, 6),
            "mesh.data and mesh.sequence are both 0: at most one may be found from the number of ranks");
  EXPECT_EQ(config_error({1, -2, 1}, 2), "mesh.pipeline = -2: expected a number of ranks, or 0 for the ranks left");
  EXPECT_NE(config_error({0, 16, 1}, 8), "");
  EXPECT_NE(config_error({1 << 30, 1 << 30, 16}, 8), "");  // the product overflows 64 bits
  EXPECT_NE(config_error({0, 1 << 16, 1 << 16}, 8), "");
}

TEST(MeshShape, RankAndCoordinateAreInverse) {
  for (const MeshShape& shape : {MeshShape{1, 1, 1}, MeshShape{2, 3, 4}, MeshShape{4, 1, 2}, MeshShape{1, 5, 1}}) {
    for (int rank = 0; rank < shape.size(); ++rank) {
      const Coordinate c = shape.coordinate_of(rank);
      EXPECT_EQ(shape.rank_of(c), rank);
      EXPECT_LT(c.data, shape.data);
      EXPECT_LT(c.pipeline, shape.pipeline);
      EXPECT_LT(c.sequence, shape.sequence);
    }
  }
  const MeshShape shape{2, 3, 4};
  EXPECT_EQ(shape.coordinate_of(1), (Coordinate{0, 0, 1}));  // sequence fastest
  EXPECT_EQ(shape.coordinate_of(4), (Coordinate{0, 1, 0}));
  EXPECT_EQ(shape.coordinate_of(12), (Coordinate{1, 0, 0}));
  EXPECT_THROW(shape.coordinate_of(24), InternalError);
}

TEST(PlannedMesh, TakesTheWorkspaceOfItsDevice) {
  for (const Device device : {Device(), Device{Device::Kind::cuda, 0}}) {
    Mesh mesh({4, 1, 1}, 2, device);
    const Stream dry = Stream::dry(device);
    Arena workspace = Arena::measuring("workspace", device);
    Communicator& data = mesh[Axis::data];
    const auto tensor = [&](DType dtype, std::int64_t n) {
      return Arena::measuring("tensors", device).allocate(dtype, {n}, "x");
    };
    data.all_reduce_sum(dry, tensor(DType::f32, 1024), Purpose::gradients, workspace);
    data.reduce_scatter_sum(dry, tensor(DType::f32, 4096), tensor(DType::f32, 1024), Purpose::gradients, workspace);
    if (device.is_cpu()) {
      EXPECT_EQ(workspace.peak(), 3u * 1024 * 4) << "a part from every peer";
      EXPECT_THROW(data.all_reduce_sum(dry, tensor(DType::bf16, 8), Purpose::gradients, workspace), InternalError);
    } else {
      EXPECT_EQ(workspace.peak(), 0u);
      data.all_reduce_sum(dry, tensor(DType::bf16, 8), Purpose::gradients, workspace);
    }
  }
}

TEST(MeshShape, GroupRanks) {
  const MeshShape shape{2, 3, 4};
  EXPECT_EQ(shape.group_ranks(Axis::sequence, 6), (std::vector<int>{4, 5, 6, 7}));
  EXPECT_EQ(shape.group_ranks(Axis::pipeline, 6), (std::vector<int>{2, 6, 10}));
  EXPECT_EQ(shape.group_ranks(Axis::data, 6), (std::vector<int>{6, 18}));
  EXPECT_EQ(shape.group_ranks(Axis::data_sequence, 6), (std::vector<int>{4, 5, 6, 7, 16, 17, 18, 19}));
  EXPECT_EQ(shape.group_ranks(Axis::world, 6).size(), 24u);
}

TEST(MeshShape, GroupsOfAnAxisPartitionTheWorld) {
  const MeshShape shape{2, 3, 4};
  for (const Axis axis : {Axis::data, Axis::pipeline, Axis::sequence, Axis::data_sequence, Axis::world}) {
    std::set<std::vector<int>> groups;
    for (int rank = 0; rank < shape.size(); ++rank) groups.insert(shape.group_ranks(axis, rank));
    std::multiset<int> ranks;
    for (const auto& group : groups) ranks.insert(group.begin(), group.end());
    EXPECT_EQ(ranks.size(), 24u) << name_of(axis);
    EXPECT_EQ(std::set<int>(ranks.begin(), ranks.end()).size(), 24u) << name_of(axis);
  }
}

}  // namespace
}  // namespace deltapipe
