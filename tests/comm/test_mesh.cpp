#include "comm/mesh.h"

#include "tests/comm/testing.h"

namespace deltapipe {
namespace {

using testing::Owned;
using testing::runtime;

TEST(Mesh, EveryShapeHasTheCommunicatorsOfItsArithmetic) {
  const int world = runtime().size();
  int shapes = 0;
  for (int data = 1; data <= world; ++data) {
    for (int pipeline = 1; pipeline <= world / data; ++pipeline) {
      if (world % (data * pipeline) != 0) continue;
      ++shapes;
      Mesh mesh(runtime(), {data, pipeline, 0});
      const MeshShape& shape = mesh.shape();
      ASSERT_EQ(shape.size(), world);
      EXPECT_EQ(shape.rank_of(mesh.coordinate()), mesh.rank());
      EXPECT_EQ(mesh[Axis::data].rank(), mesh.coordinate().data);
      EXPECT_EQ(mesh[Axis::pipeline].rank(), mesh.coordinate().pipeline);
      EXPECT_EQ(mesh[Axis::sequence].rank(), mesh.coordinate().sequence);
      for (const Axis axis : {Axis::data, Axis::pipeline, Axis::sequence, Axis::data_sequence, Axis::world}) {
        Communicator& comm = mesh[axis];
        EXPECT_EQ(comm.axis(), name_of(axis));
        const std::vector<int> expected = shape.group_ranks(axis, mesh.rank());
        ASSERT_EQ(static_cast<std::size_t>(comm.size()), expected.size());
        Owned<std::int32_t> own({1}), all({comm.size()});
        own[0] = mesh.rank();
        comm.all_gather(Stream::cpu(), own, all, Purpose::control);
        EXPECT_EQ(std::vector<int>(all.begin(), all.end()), expected) << name_of(axis);
      }
    }
  }
  EXPECT_GE(shapes, world == 1 ? 1 : 3);
}

TEST(Mesh, ShapeThatDoesNotFit) { EXPECT_THROW(Mesh(runtime(), {runtime().size() + 1, 1, 1}), ConfigError); }

}  // namespace
}  // namespace deltapipe
